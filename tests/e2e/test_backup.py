"""A ledger is copied under load, lost, and put back: what was acknowledged before the copy is there, work goes on."""

import asyncio
import json
import sqlite3
import stat
from contextlib import closing
from pathlib import Path

import httpx
import pytest

from receiver.errors import StoreInUseError, StoreUnavailableError
from receiver.store import SqliteDatabase, backup
from tests.cli.conftest import run_command
from tests.support.lives import served
from tests.support.postgres import hand_over
from tests.support.stage import Stage, eventually, free_port

TOKEN = {"token": "0123456789abcdef"}


async def test_a_backup_under_load_is_put_back_after_a_crash(stage: Stage) -> None:
    """The running service makes it; after `kill -9` and the loss of the file, the next life goes on from the copy."""
    config, port = stage.directory / "receiver.toml", free_port()
    operations = {**TOKEN, "port": port}
    async with stage.client() as client:
        async with served(stage, operations=operations) as life:
            await life.ready(client)
            before = [stage.start() for _ in range(15)]
            await eventually(lambda: _settled(stage, 5))
            sending = [
                asyncio.create_task(stage.send(client, stage.body(f"run_x{number}")))
                for number in range(30)
            ]
            env = {"RECEIVER_OPS_TOKEN": TOKEN["token"], "RECEIVER_OPS_URL": f"http://127.0.0.1:{port}"}
            made = await asyncio.to_thread(
                run_command, "backup", "copy.db", "--config", str(config), cwd=stage.directory, env=env
            )
            assert made.returncode == 0, made.stderr
            assert {answer.status_code for answer in await asyncio.gather(*sending)} == {200}
            life.process.kill()
            await life.process.wait()
        copy = stage.directory / "copy.db"
        assert stat.S_IMODE(copy.stat().st_mode) == 0o600
        with closing(sqlite3.connect(copy)) as connection:
            kept = {
                row[0] for row in connection.execute("SELECT run_id FROM runs WHERE settled_at IS NOT NULL")
            }
        assert len(kept) >= 5
        remove_ledger(stage.directory)
        put = await asyncio.to_thread(
            run_command, "restore", "copy.db", "--config", str(config), cwd=stage.directory
        )
        assert put.returncode == 0, put.stderr
        async with served(stage, operations=operations) as life:
            await life.ready(client)
            assert kept <= {row["run_id"] for row in stage.rows("SELECT run_id FROM runs")}
            for run_id in before:  # as FLORA repeats what came after the copy; the rest are duplicates
                assert (await stage.send(client, stage.body(run_id))).status_code == 200
            await stage.over(*before)
    for run_id in before:
        stage.check_files(run_id)


async def test_a_ledger_that_is_removed_under_the_service(stage: Stage) -> None:
    """No callback is acknowledged any more, and everything acknowledged before is there after a restore.

    So it is also if nothing arrives: the service notices by itself.
    """
    config, operations = stage.directory / "receiver.toml", {**TOKEN, "port": free_port()}
    async with stage.client() as client:
        async with served(stage, operations=operations) as life:
            await life.ready(client)
            run_ids = [f"run_before_{number}" for number in range(20)]
            answers = await asyncio.gather(*(stage.send(client, stage.body(run_id)) for run_id in run_ids))
            assert {answer.status_code for answer in answers} == {200}
            remove_ledger(stage.directory)
            await eventually(
                lambda: asyncio.to_thread(find_copy, stage.directory)
            )  # nothing is sent meanwhile
            await eventually(lambda: _is_unready(stage, client))
            answer = await stage.send(client, stage.body("run_late"))
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "unavailable")
            env = {
                "RECEIVER_OPS_TOKEN": TOKEN["token"],
                "RECEIVER_OPS_URL": f"http://127.0.0.1:{operations['port']}",
            }
            made = await asyncio.to_thread(
                run_command, "backup", "by-hand.db", "--config", str(config), cwd=stage.directory, env=env
            )
            assert made.returncode == 0, made.stderr
            assert await life.stop() == 0
        lines = [json.loads(line) for line in life.said.splitlines() if line.startswith(b"{")]
        events = {line["event"]: line for line in lines if line["level"] == "critical"}
        assert "was removed" in events["ledger.lost"]["reason"]
        copy = events["ledger.rescued"]["copy"]
        put = await asyncio.to_thread(
            run_command, "restore", copy, "--config", str(config), cwd=stage.directory
        )
        assert put.returncode == 0, put.stderr
        async with served(stage, operations=operations) as life:
            await life.ready(client)
            assert set(run_ids) <= {row["run_id"] for row in stage.rows("SELECT run_id FROM runs")}
            assert (await stage.send(client, stage.body("run_late"))).json() == {"status": "accepted"}


def remove_ledger(directory: Path) -> None:
    for path in directory.glob("ledger.db*"):
        path.unlink()


def find_copy(directory: Path) -> list[Path]:
    return list(directory.glob("ledger.db.rescued-*"))


async def _is_unready(stage: Stage, client: httpx.AsyncClient) -> bool:
    return (await client.get(f"https://127.0.0.1:{stage.port}/readyz")).status_code == 503


def test_a_backup_of_no_ledger_is_refused(tmp_path: Path) -> None:
    """An empty ledger is not created to be copied: the file may have been removed by mistake."""
    env = {"RECEIVER_OPS_TOKEN": TOKEN["token"], "RECEIVER_OPS_URL": "http://127.0.0.1:9"}
    done = run_command("backup", "copy.db", cwd=tmp_path, env=env)
    assert done.returncode != 0
    assert "does not exist" in done.stderr
    assert list(tmp_path.iterdir()) == []


async def _settled(stage: Stage, count: int) -> bool:
    return len(stage.rows("SELECT run_id FROM runs WHERE settled_at IS NOT NULL")) >= count


async def test_copies_overwrite_nothing_and_damage_is_told(sqlite_path: Path, tmp_path: Path) -> None:
    """Nor is a ledger replaced that somebody uses, or by what is none."""
    database = SqliteDatabase(sqlite_path)
    target = tmp_path / "copy.db"
    assert await database.read(lambda tx: backup.copy(tx, target)) == target.stat().st_size
    with pytest.raises(StoreUnavailableError, match="overwrites nothing"):
        await database.read(lambda tx: backup.copy(tx, target))
    with pytest.raises(StoreUnavailableError, match="cannot write"):
        await database.read(lambda tx: backup.copy(tx, tmp_path / "nowhere" / "copy.db"))
    with pytest.raises(StoreInUseError):
        backup.restore(target, sqlite_path)
    await database.close()
    other = tmp_path / "other.db"
    with closing(sqlite3.connect(other)) as connection:
        connection.execute("CREATE TABLE x (y)")
    with pytest.raises(StoreUnavailableError, match="not a ledger"):
        backup.restore(other, sqlite_path)
    damaged = tmp_path / "damaged.db"
    raw = bytearray(target.read_bytes())
    raw[4096:8192] = b"\xff" * 4096
    damaged.write_bytes(raw)
    with pytest.raises(StoreUnavailableError):
        backup.restore(damaged, sqlite_path)
    aside = backup.restore(target, sqlite_path)
    assert aside is not None
    assert aside.exists()
    reopened = SqliteDatabase(sqlite_path)
    await reopened.close()


async def test_what_root_puts_back_belongs_to_the_service(sqlite_path: Path, tmp_path: Path) -> None:
    """An operator is root, the service is not: it must be able to open the ledger, and the lock beside it."""
    directory = tmp_path / "state"
    directory.mkdir()
    hand_over(directory)
    ledger = directory / "var/receiver.db"
    assert backup.restore(sqlite_path, ledger) is None
    paths = [ledger, directory / "var/receiver.db.lock"]
    assert {(path.stat().st_uid, path.stat().st_gid) for path in (*paths, ledger.parent)} == {
        (directory.stat().st_uid, directory.stat().st_gid)
    }
    assert [stat.S_IMODE(path.stat().st_mode) for path in paths] == [0o600, 0o600]
