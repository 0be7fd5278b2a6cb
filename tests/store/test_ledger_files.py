"""The ledger is where its path says: files that are removed or replaced under an open database, and the locks on them."""

import asyncio
import contextlib
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
from sqlalchemy import Connection
from structlog.testing import capture_logs

from receiver.errors import StoreUnavailableError
from receiver.store import SqliteDatabase, backup
from receiver.store.sqlite import open_read_only
from tests.store.test_database import insert, runs_of


@contextlib.asynccontextmanager
async def opened(path: Path) -> AsyncIterator[SqliteDatabase]:
    """Open a ledger inside the block."""
    database = SqliteDatabase(path, busy_timeout_ms=20)
    try:
        yield database
    finally:
        await database.close()


@pytest.fixture
async def database(sqlite_path: Path) -> AsyncIterator[SqliteDatabase]:
    async with opened(sqlite_path) as database:
        await database.write(insert("run_1"))
        yield database


def remove(*suffixes: str) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        for suffix in suffixes:
            path.with_name(path.name + suffix).unlink()

    return change


def replace(suffix: str) -> Callable[[Path], None]:
    """As `rsync`, `restore` by hand and editors do: a new file is renamed over the old one."""

    def change(path: Path) -> None:
        file = path.with_name(path.name + suffix)
        shutil.copyfile(file, copy := file.with_name("copy"))
        copy.rename(file)

    return change


def move_directory(path: Path) -> None:
    path.parent.rename(path.parent.with_name("moved"))


def empty(path: Path) -> None:
    path.write_bytes(b"")


def set_aside(path: Path) -> Callable[[], object]:
    """Rename a file; return what puts it back."""
    aside = path.rename(path.with_name("aside"))
    return lambda: aside.rename(path)


def by_driver(sql: str) -> Callable[[Connection], None]:
    """Run what SQLite refuses within a transaction."""

    def job(connection: Connection) -> None:
        connection.connection.cursor().execute(sql)

    return job


CHANGES = {
    "everything is removed": remove("", "-wal", "-shm", ".lock"),
    "the ledger is removed": remove(""),
    "the log is removed": remove("-wal"),
    "the log's index is removed": remove("-shm"),
    "the lock is removed": remove(".lock"),
    "the ledger is replaced": replace(""),
    "the log is replaced": replace("-wal"),
    "the lock is replaced": replace(".lock"),
    "the directory is moved": move_directory,
    "the ledger is emptied": empty,
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
async def test_nothing_is_acknowledged_that_is_not_in_the_file(
    tmp_path: Path, migrated: Path, change: Callable[[Path], None]
) -> None:
    """The first write afterwards fails, and so does every later one: there is no way back but a restart."""
    (tmp_path / "var").mkdir()
    path = Path(shutil.copy(migrated, tmp_path / "var/receiver.db"))
    with capture_logs() as logs:
        async with opened(path) as database:
            change(path)
            for number in range(3):
                with pytest.raises(StoreUnavailableError, match="until it is restarted"):
                    await database.write(insert(f"run_{number + 2}"))
            with pytest.raises(StoreUnavailableError, match="until it is restarted"):
                await database.run(lambda _: None)
    assert [entry["log_level"] for entry in logs if entry["event"] == "ledger.lost"] == ["critical"]


async def test_a_file_that_comes_back_changes_nothing(database: SqliteDatabase, sqlite_path: Path) -> None:
    """What was written meanwhile is elsewhere."""
    put_back = set_aside(sqlite_path)
    with pytest.raises(StoreUnavailableError):
        await database.write(insert("run_2"))
    put_back()
    with pytest.raises(StoreUnavailableError):
        await database.write(insert("run_3"))


async def test_every_caller_of_the_commit_gets_the_error(
    database: SqliteDatabase, sqlite_path: Path
) -> None:
    """The check comes between the commit and the answers, for all jobs that share it."""

    def write_and_lose(tx: object) -> None:
        insert("run_2")(tx)
        sqlite_path.unlink()

    jobs = [insert("run_3"), write_and_lose, insert("run_4")]
    answers = await asyncio.gather(*map(database.write, jobs), return_exceptions=True)
    assert {type(answer) for answer in answers} == {StoreUnavailableError}


@pytest.mark.parametrize(
    "change", ["everything is removed", "the log is removed", "the ledger is replaced"]
)
async def test_what_the_process_still_has_is_saved(sqlite_path: Path, tmp_path: Path, change: str) -> None:
    """All that was acknowledged is in a new file, and `restore` puts it in place."""
    with capture_logs() as logs:
        async with opened(sqlite_path) as database:
            for number in range(2, 30):
                await database.write(insert(f"run_{number}"))
            acknowledged = await runs_of(database)
            CHANGES[change](sqlite_path)
            with pytest.raises(StoreUnavailableError):
                await database.write(insert("run_late"))
    [entry] = [entry for entry in logs if entry["event"] == "ledger.rescued"]
    copy = Path(entry["copy"])
    assert copy.parent == tmp_path
    assert f"restore {copy}" in entry["fix"]
    backup.restore(copy, sqlite_path)
    async with opened(sqlite_path) as reopened:
        assert set(acknowledged) <= set(await runs_of(reopened))


async def test_what_cannot_be_saved_is_reported(sqlite_path: Path) -> None:
    """A ledger of which nothing is left: the log says so, and to restore a backup."""
    with capture_logs() as logs:
        async with opened(sqlite_path) as database:
            await database.run(by_driver("PRAGMA wal_checkpoint(TRUNCATE)"))
            empty(sqlite_path)
            with pytest.raises(StoreUnavailableError, match="was emptied"):
                await database.write(lambda _: None)
    [entry] = [entry for entry in logs if entry["event"] == "ledger.not_rescued"]
    assert "restore the latest backup" in entry["fix"]


async def test_a_new_reader_does_not_read_another_file(sqlite_path: Path) -> None:
    """Connections for readers are opened when they are needed, perhaps after the path has a new file."""
    async with opened(sqlite_path) as database:
        replace("")(sqlite_path)
        with pytest.raises(StoreUnavailableError, match="replaced"):
            await runs_of(database)


async def test_a_writer_that_reconnects_does_not_take_another_file(
    database: SqliteDatabase, sqlite_path: Path
) -> None:
    """After a broken connection the path is opened anew; what it names by then must be the same file."""
    await database.run(lambda connection: connection.invalidate())
    await database.write(insert("run_2"))
    await database.run(lambda connection: connection.invalidate())
    replace("")(sqlite_path)
    with pytest.raises(StoreUnavailableError, match="replaced"):
        await database.write(insert("run_3"))


async def test_commits_and_checkpoints_are_no_change(database: SqliteDatabase, sqlite_path: Path) -> None:
    """Nor are the visits of other programs that read or back up the file."""
    for number in range(2, 6):
        await database.write(insert(f"run_{number}", 500_000))
        await database.run(by_driver("PRAGMA wal_checkpoint(TRUNCATE)"))
        with contextlib.closing(sqlite3.connect(sqlite_path)) as other:
            other.execute("INSERT INTO watermarks VALUES (?, 1, 1)", (str(number),))
            other.commit()
            other.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    await database.run(by_driver("VACUUM"))
    await database.write(insert("run_9"))


# --- locks -------------------------------------------------------------------------------------------------------


async def open_elsewhere(path: Path) -> str:
    """Open the ledger in another process; return what it printed on stderr, empty if it could."""
    script = "import sys, pathlib; from receiver.store import SqliteDatabase; SqliteDatabase(pathlib.Path(sys.argv[1]))"
    done = await asyncio.to_thread(
        subprocess.run,
        [sys.executable, "-c", script, str(path)],
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stderr


async def test_a_second_owner_is_refused_without_the_lock_file(sqlite_path: Path) -> None:
    """Before and after the first one has noticed that its lock file is gone, until it ends."""
    async with opened(sqlite_path) as database:
        remove(".lock")(sqlite_path)
        assert "StoreInUseError" in await open_elsewhere(sqlite_path)
        remove(".lock")(sqlite_path)
        with pytest.raises(StoreUnavailableError, match="lock was removed"):
            await database.write(insert("run_1"))
        assert "StoreInUseError" in await open_elsewhere(sqlite_path)
    assert await open_elsewhere(sqlite_path) == ""


async def test_a_restore_is_refused_without_the_lock_file(
    database: SqliteDatabase, sqlite_path: Path, migrated: Path
) -> None:
    remove(".lock")(sqlite_path)
    script = "import sys, pathlib; from receiver.store import backup; backup.restore(*map(pathlib.Path, sys.argv[1:]))"
    done = await asyncio.to_thread(
        subprocess.run, [sys.executable, "-c", script, str(migrated), str(sqlite_path)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert "StoreInUseError" in done.stderr
    assert await runs_of(database) == ["run_1"]


@pytest.mark.parametrize("make", [Path.symlink_to, Path.hardlink_to])
async def test_a_second_owner_by_another_name_is_refused(
    database: SqliteDatabase, sqlite_path: Path, tmp_path: Path, make: Callable[[Path, Path], None]
) -> None:
    """A link in another directory leads to the same ledger."""
    (tmp_path / "elsewhere").mkdir()
    make(link := tmp_path / "elsewhere/receiver.db", sqlite_path)
    assert "StoreInUseError" in await open_elsewhere(link)


async def test_a_ledger_behind_a_link_is_watched_where_it_is(tmp_path: Path, migrated: Path) -> None:
    """A link that leads elsewhere from now on is a change, too."""
    shutil.copy(migrated, tmp_path / "a.db")
    shutil.copy(migrated, tmp_path / "b.db")
    (link := tmp_path / "receiver.db").symlink_to(tmp_path / "a.db")
    async with opened(link) as database:
        await database.write(insert("run_1"))
        link.unlink()
        link.symlink_to(tmp_path / "b.db")
        with pytest.raises(StoreUnavailableError, match="replaced"):
            await database.write(insert("run_2"))


async def test_reading_a_ledger_to_move_it_locks_it(sqlite_path: Path) -> None:
    with open_read_only(sqlite_path):
        remove(".lock")(sqlite_path)
        assert "StoreInUseError" in await open_elsewhere(sqlite_path)
    assert await open_elsewhere(sqlite_path) == ""
