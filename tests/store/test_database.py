"""The SQLite file: one owner, one writer, group commits, and what happens when it cannot be written."""

import asyncio
import contextlib
import sqlite3
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Connection, event, exc

from receiver.errors import StoreError, StoreInUseError, StoreUnavailableError
from receiver.store import SqliteDatabase, ledger, open_database
from tests.support.core import a_run, all_runs, until
from tests.support.patience import PATIENCE_SECONDS


@pytest.fixture
async def database(sqlite_path: Path) -> AsyncIterator[SqliteDatabase]:
    """What is said here is about SQLite alone."""
    database = SqliteDatabase(sqlite_path, busy_timeout_ms=20)
    yield database
    await database.close()


def insert(run_id: str, size: int = 0) -> Any:
    return lambda tx: ledger.add_runs(tx, [a_run(run_id=run_id, error_message="x" * size)])


async def runs_of(database: SqliteDatabase) -> list[str]:
    return sorted(run.run_id for run in await database.read(all_runs))


@contextlib.contextmanager
def commits(database: SqliteDatabase) -> Iterator[list[Connection]]:
    """Count the commits of the writer."""
    seen: list[Connection] = []
    event.listen(database._writing, "commit", note := seen.append)
    yield seen
    event.remove(database._writing, "commit", note)


@contextlib.asynccontextmanager
async def held_writer(database: SqliteDatabase) -> AsyncIterator[None]:
    """Keep the writer busy inside the block, so that what is queued there waits together."""
    begun, free = threading.Event(), threading.Event()

    def wait(_: Connection) -> None:
        begun.set()
        free.wait(PATIENCE_SECONDS)

    holding = asyncio.create_task(database.write(wait))
    await asyncio.to_thread(begun.wait, 10)
    yield
    free.set()
    await holding


async def together(database: SqliteDatabase, *jobs: Any) -> list[Any]:
    """Run jobs that were queued while the writer was busy; return answers and errors."""
    async with held_writer(database):
        tasks = [asyncio.create_task(database.write(job)) for job in jobs]
        await until(lambda: database._jobs.qsize() >= len(jobs))
    return await asyncio.gather(*tasks, return_exceptions=True)


# --- one owner ---------------------------------------------------------------------------------------------------


async def test_a_second_owner_is_refused(database: SqliteDatabase, sqlite_path: Path) -> None:
    """Even within one process; and the message says what to do."""
    with pytest.raises(StoreInUseError, match="another running flora-receiver"):
        SqliteDatabase(sqlite_path)
    await database.write(insert("run_1"))


async def test_a_second_process_is_refused(database: SqliteDatabase, sqlite_path: Path) -> None:
    """The lock is the file's, not the process's."""
    script = "import sys, pathlib; from receiver.store import SqliteDatabase; SqliteDatabase(pathlib.Path(sys.argv[1]))"
    done = await asyncio.to_thread(
        subprocess.run,
        [sys.executable, "-c", script, str(sqlite_path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert "StoreInUseError" in done.stderr


async def test_a_closed_file_can_be_taken_again(sqlite_path: Path) -> None:
    """And what was written is there, with the log moved into the file."""
    first = SqliteDatabase(sqlite_path)
    await first.write(insert("run_1"))
    await first.close()
    wal = sqlite_path.with_name(sqlite_path.name + "-wal")
    assert not wal.exists() or wal.stat().st_size == 0
    second = SqliteDatabase(sqlite_path)
    assert await runs_of(second) == ["run_1"]
    await second.close()


async def test_closing_finishes_what_is_queued(sqlite_path: Path) -> None:
    database = SqliteDatabase(sqlite_path)
    tasks = [asyncio.create_task(database.write(insert(f"run_{n}"))) for n in range(100)]
    await asyncio.sleep(0)
    await database.close()
    await asyncio.gather(*tasks)
    reopened = SqliteDatabase(sqlite_path)
    assert len(await runs_of(reopened)) == 100
    await reopened.close()


async def test_a_closed_database_says_so(sqlite_path: Path) -> None:
    """Whoever comes late gets an error, not a wait without end."""
    database = SqliteDatabase(sqlite_path)
    await database.close()
    with pytest.raises(StoreUnavailableError):
        await database.write(insert("run_1"))
    with pytest.raises(StoreUnavailableError):
        await database.run(lambda _: None)


async def test_the_settings_that_durability_rests_on(database: SqliteDatabase) -> None:
    """A commit is an fsync (2: FULL), the log is a WAL, references are checked."""
    for name, value in (
        ("synchronous", 2),
        ("journal_mode", "wal"),
        ("foreign_keys", 1),
        ("busy_timeout", 20),
    ):
        result = await database.run(partial(Connection.exec_driver_sql, statement=f"PRAGMA {name}"))
        assert result.scalar_one() == value
    assert await database.read(lambda tx: tx.exec_driver_sql("PRAGMA query_only").scalar_one()) == 1


async def test_opening_makes_the_directories(tmp_path: Path) -> None:
    database = open_database(f"sqlite:///{tmp_path}/var/deep/receiver.db")
    await database.close()
    assert (tmp_path / "var/deep/receiver.db").exists()


@pytest.mark.parametrize("kind", ["garbage", "directory", "below a file", "postgres"])
def test_what_cannot_be_opened_is_one_kind_of_error(tmp_path: Path, kind: str) -> None:
    """Never a traceback of the driver; and a failed try leaves nothing locked behind."""
    path = tmp_path / "x.db"
    url = f"sqlite:///{path}"
    match kind:
        case "garbage":
            path.write_bytes(b"this is no database, and long enough to be read as a header" * 100)
        case "directory":
            path.mkdir()
        case "below a file":
            path.touch()
            url = f"sqlite:///{path}/y.db"
        case _:
            url = "postgresql://nobody@localhost/x"
    for _ in range(2):
        with pytest.raises(StoreUnavailableError):
            open_database(url)


# --- group commit ------------------------------------------------------------------------------------------------


async def test_jobs_queued_together_share_one_commit(database: SqliteDatabase) -> None:
    """Fifty callers, one fsync."""
    with commits(database) as seen:
        await together(database, *(insert(f"run_{n:02}") for n in range(50)))
    assert len(seen) == 2  # the one that held the writer, and the one for all
    assert len(await runs_of(database)) == 50


async def test_one_bad_job_does_not_spoil_the_others(database: SqliteDatabase) -> None:
    """Its own work is undone, whole, and it alone hears of it; those before and after it are committed."""

    def bad(tx: Connection) -> None:
        insert("run_half")(tx)
        raise KeyError("mine")

    answers = await together(
        database, insert("run_1"), bad, insert("run_1"), lambda _: "answer", insert("run_2")
    )
    assert [type(answer) for answer in answers] == [
        type(None),
        KeyError,
        exc.IntegrityError,
        str,
        type(None),
    ]
    assert await runs_of(database) == ["run_1", "run_2"]


async def test_a_job_sees_what_the_ones_before_it_did(database: SqliteDatabase) -> None:
    answers = await together(database, insert("run_1"), lambda tx: ledger.runs_by_id(tx, ["run_1"]))
    assert set(answers[1]) == {"run_1"}


async def test_an_answer_comes_after_the_commit(database: SqliteDatabase, sqlite_path: Path) -> None:
    """2xx means committed: another connection sees it as soon as the caller hears of it."""
    await database.write(insert("run_1"))
    with contextlib.closing(sqlite3.connect(sqlite_path)) as other:
        assert other.execute("SELECT run_id FROM runs").fetchall() == [("run_1",)]


async def test_a_caller_that_leaves_does_not_stop_its_job(database: SqliteDatabase) -> None:
    """A connection that is cut must not undo, or break, what others share."""
    async with held_writer(database):
        leaving = asyncio.create_task(database.write(insert("run_1")))
        bare = asyncio.create_task(database.run(lambda _: None))
        staying = asyncio.create_task(database.write(insert("run_2")))
        await until(lambda: database._jobs.qsize() >= 3)
        leaving.cancel()
        bare.cancel()
        await asyncio.wait({leaving, bare})
    await staying
    assert leaving.cancelled()
    assert bare.cancelled()
    assert await runs_of(database) == ["run_1", "run_2"]


async def test_the_writer_survives_anything(database: SqliteDatabase) -> None:
    """Even what is no Exception: its batch fails, the next one does not."""

    class Odd(BaseException):
        pass

    def break_it(_: Connection) -> None:
        raise Odd

    answers = await together(database, insert("run_1"), break_it)
    assert all(isinstance(answer, Odd) for answer in answers)
    with pytest.raises(Odd):
        await database.run(break_it)
    await database.write(insert("run_2"))
    assert await runs_of(database) == ["run_2"]


# --- bad weather -------------------------------------------------------------------------------------------------


async def test_a_locked_file_is_unavailable_and_then_works_again(
    database: SqliteDatabase, sqlite_path: Path
) -> None:
    """A backup tool holds the file: everyone waiting is told, nothing is written, and later it works."""
    with contextlib.closing(sqlite3.connect(sqlite_path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        answers = await asyncio.gather(
            *(database.write(insert(f"run_{n}")) for n in range(3)), return_exceptions=True
        )
        assert {type(answer) for answer in answers} == {StoreUnavailableError}
        assert await runs_of(database) == []  # readers do not wait for a writer
        other.execute("ROLLBACK")
    await database.write(insert("run_9"))
    assert await runs_of(database) == ["run_9"]


async def test_a_read_only_file_is_unavailable(database: SqliteDatabase) -> None:
    """As after a remount: the same call works once it is writable again."""
    await database.run(lambda c: c.exec_driver_sql("PRAGMA query_only = ON").close())
    with pytest.raises(StoreUnavailableError):
        await database.write(insert("run_1"))
    await database.run(lambda c: c.exec_driver_sql("PRAGMA query_only = OFF").close())
    await database.write(insert("run_1"))
    assert await runs_of(database) == ["run_1"]


async def test_a_full_disk_writes_nothing_by_halves(database: SqliteDatabase) -> None:
    """SQLite may have ended the transaction itself: the whole batch is told, and none of it is there."""
    await database.run(
        lambda c: c.exec_driver_sql("PRAGMA max_page_count = 1").scalar_one()
    )  # as small as it is now
    answers = await together(database, insert("run_1"), insert("run_2", 1_000_000), insert("run_3"))
    assert {type(answer) for answer in answers} == {StoreUnavailableError}
    assert await runs_of(database) == []
    await database.run(lambda c: c.exec_driver_sql("PRAGMA max_page_count = 1000000").scalar_one())
    await together(database, insert("run_1"), insert("run_2", 1_000_000))
    assert await runs_of(database) == ["run_1", "run_2"]


async def test_a_failing_commit_is_everyones(database: SqliteDatabase) -> None:
    """An error in COMMIT itself: nobody is told that anything is safe."""

    def owe(tx: Connection) -> None:
        tx.exec_driver_sql("PRAGMA defer_foreign_keys = ON")
        tx.exec_driver_sql("INSERT INTO outputs VALUES ('run_nowhere', 0, 'a', 'text', '')")

    answers = await together(database, insert("run_1"), owe)
    assert {type(answer) for answer in answers} == {StoreUnavailableError}
    assert await runs_of(database) == []
    await database.write(insert("run_2"))
    assert await runs_of(database) == ["run_2"]


async def test_readers_cannot_write(database: SqliteDatabase) -> None:
    """Whatever a reader tries, the one writer stays the only one."""
    for sql in ("DELETE FROM runs", "CREATE TABLE x (y)", "INSERT INTO watermarks VALUES ('a', 1, 1)"):
        with pytest.raises(StoreError):
            await database.read(partial(Connection.exec_driver_sql, statement=sql))


async def test_many_readers_do_not_wait_for_the_writer(database: SqliteDatabase) -> None:
    """More reads than connections at once, while the writer is busy: each gets its snapshot."""
    await database.write(insert("run_1"))
    async with held_writer(database):
        found = await asyncio.gather(*(runs_of(database) for _ in range(20)))
    assert found == [["run_1"]] * 20


async def test_a_readers_own_error_is_its_own(database: SqliteDatabase) -> None:
    def break_it(_: Connection) -> None:
        raise KeyError("mine")

    for _ in range(6):  # more often than there are connections: none is left behind in a transaction
        with pytest.raises(KeyError):
            await database.read(break_it)
    assert await runs_of(database) == []
