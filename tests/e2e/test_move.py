"""The ledger of a real service goes to PostgreSQL after a `kill -9`, and a service there finishes what was begun."""

import asyncio
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from receiver.client.client import ReceiverClient
from receiver.emulator.faults import parse_faults
from receiver.store.move import TABLES
from tests.cli.conftest import environment, run_command
from tests.support.lives import served
from tests.support.stage import Stage, eventually, free_port

TOKEN = "0123456789abcdef"
METADATA = {"titel": "Überraschung \U0001f9ea\u2028", "n": 2**53}
INPUTS = [{"id": "prompt", "type": "text", "value": "Leuchtturm \U0001f5fc " * 500}]


async def test_a_service_on_postgresql_finishes_what_was_begun_on_sqlite(
    stage: Stage, postgres_url: str
) -> None:
    """Settled runs stay settled and go to no handler again; the others are read and stored as if nothing had been."""
    operations = {"token": TOKEN, "port": free_port()}
    reported, stalled = [], []
    async with stage.client() as client:
        async with served(stage, operations=operations) as life:
            await life.ready(client)
            with ReceiverClient(f"http://127.0.0.1:{operations['port']}", TOKEN) as receiver:
                settled = [
                    await asyncio.to_thread(_started, receiver, stage, key) for key in ("a", "b", "c")
                ]
                await stage.over(*settled)
                stalled.append(stage.start("emu-image", {"kind": "stall"}))
                await asyncio.to_thread(
                    receiver.track, stalled[0], technique_id="emu-image", metadata=METADATA
                )
            await eventually(lambda: _has(stage, "SELECT 1 FROM dispatches WHERE state = 'leased'"))
            stage.emulator.faults.add(parse_faults({"kind": "service_unavailable"}))
            reported += [stage.start("emu-two-images") for _ in range(10)]
            await eventually(
                lambda: _has(stage, "SELECT 1 FROM runs WHERE state = 'reported' LIMIT 1 OFFSET 9")
            )
            large = stage.body("run_large", delivery_id="whd_large", more="\U0001f9ea\\u0000" * 3000)
            assert (await stage.send(client, large)).json() == {"status": "accepted"}
            life.process.kill()
            await life.process.wait()
        before = _everything(stage)
        command = ("move", "--to", postgres_url, "--config", str(stage.directory / "receiver.toml"))
        moved = await asyncio.to_thread(run_command, *command, "--json", cwd=stage.directory)
        assert moved.returncode == 0, moved.stderr
        told = json.loads(moved.stdout)
        assert told["copied"]
        assert {name: held["rows"] for name, held in told["tables"].items()} == {
            n: len(rows) for n, rows in before.items()
        }
        assert _everything(stage) == before, "the source is only read"
        stage.postgres = postgres_url
        assert _everything(stage) == before
        stage.emulator.faults.reset()
        window = {"callback_window_seconds": 4.0}
        async with served(stage, operations=operations, reconcile=window) as life:
            await life.ready(client)
            assert (await stage.send(client, large)).json() == {"status": "duplicate"}
            assert (await stage.send(client, stage.body(settled[0]))).json() == {"status": "accepted"}
            with ReceiverClient(f"http://127.0.0.1:{operations['port']}", TOKEN) as receiver:
                assert await asyncio.to_thread(_started, receiver, stage, "a") == settled[0]
                fresh = await asyncio.to_thread(_started, receiver, stage, "d")
            await stage.over(*settled, *reported, *stalled, fresh)
    for run_id in (*settled, *reported, *stalled, fresh):
        stage.check_files(run_id)
    assert json.loads(stage.run(stalled[0])["metadata"]) == METADATA
    for run_id in settled:
        was = [row for row in before["dispatches"] if row["run_id"] == run_id]
        assert stage.dispatches(run_id) == was


def _started(receiver: ReceiverClient, stage: Stage, key: str) -> str:
    view = receiver.start(
        "emu-everything", INPUTS, idempotency_key=key, metadata=METADATA, callback_url=stage.url
    )
    return str(view.run_id)


async def _has(stage: Stage, statement: str) -> bool:
    return bool(stage.rows(statement))


def _everything(stage: Stage) -> dict[str, list[dict[str, Any]]]:
    """Return every row as the drivers see it, without SQLAlchemy; what SQLite has no type for is made one."""
    found = {}
    for table in TABLES:
        flags = [column.name for column in table.columns if column.type.python_type is bool]
        rows = stage.rows(f"SELECT * FROM {table.name}")  # noqa: S608 -- names of our own
        for row in rows:
            row.update({name: bool(row[name]) for name in flags})
        found[table.name] = sorted(rows, key=repr)
    return found


def test_what_cannot_be_moved_is_told(tmp_path: Path) -> None:
    """Exit code 2 where the settings or the target are of the wrong kind, 1 where there is nothing or nobody."""
    for url, target, status, told in (
        ("postgresql://here/a", "postgresql://here/b", 2, "nothing to move"),
        ("sqlite:///a.db", "sqlite:///b.db", 2, "must be postgresql"),
        ("sqlite:///a.db", "postgresql://127.0.0.1:1/b", 1, "a.db does not exist"),
    ):
        done = run_command("move", "--to", target, cwd=tmp_path, env={"RECEIVER_DATABASE__URL": url})
        assert (done.returncode, told in done.stderr) == (status, True), done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_missing_driver_is_told_with_its_cure(sqlite_path: Path) -> None:
    blocked = "import sys; sys.modules['psycopg'] = None; from receiver.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", blocked, "move", "--to", "postgresql://127.0.0.1/x"],
        env=environment(RECEIVER_DATABASE__URL=f"sqlite:///{sqlite_path}"), cwd=sqlite_path.parent,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, "flora-receiver[postgres]" in done.stderr) == (1, True), done.stderr


@pytest.mark.parametrize("as_json", [True, False])
async def test_a_running_service_keeps_its_ledger(stage: Stage, postgres_url: str, as_json: bool) -> None:
    async with served(stage) as life, stage.client() as client:
        await life.ready(client)
        command = ("move", "--to", postgres_url, "--config", str(stage.directory / "receiver.toml"))
        done = await asyncio.to_thread(run_command, *command, *["--json"] * as_json, cwd=stage.directory)
        assert done.returncode == 1
        if as_json:
            assert json.loads(done.stdout)["error"] == "storeinuse"
        else:
            assert "stop it" in done.stderr
