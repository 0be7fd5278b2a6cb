"""Six handlers side by side: each applies its effect once for every run, and one that fails for an hour delays no other."""

import asyncio
import base64
import contextlib
import json
import sqlite3
import threading
from collections import Counter
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import structlog

from receiver.handler import Context, SettledRun
from receiver.service.service import Service
from tests.cli.conftest import run_command
from tests.support.stage import Clock, Stage, eventually
from tests.support.targets import target

RUNS = 200
TOKEN = "0123456789abcdef0123456789abcdef"
MINUTE = timedelta(minutes=1)
SECRET = "whsec_" + base64.b64encode(bytes(range(32))).decode()


class Moody:
    """A function that fails while it is told to, and keeps what it did by its idempotency key."""

    def __init__(self) -> None:
        self.failing = True
        self.calls = 0
        self.done: Counter[str] = Counter()

    def __call__(self, run: SettledRun, context: Context) -> None:
        assert run.status == "completed"
        self.calls += 1
        if self.failing:
            raise ConnectionError("their system is down")
        self.done[context.idempotency_key] += 1


moody = Moody()


def handlers(stage: Stage, url: str, reports: Path, lines: Path) -> list[dict[str, Any]]:
    return [
        {"use": "storage", "options": {"url": str(stage.outputs)}},
        {"use": "log"},
        {
            "use": "forward",
            "on": ["settled"],
            "options": {"url": url, "secret": [SECRET], "allow_private": True},
        },
        {
            "use": "command",
            "on": ["settled"],
            "options": {
                "command": ["/bin/sh", "-c", 'printf "%s\\n" "$RUN_IDEMPOTENCY_KEY" >> "$LINES"'],
                "env": {"LINES": str(lines)},
            },
        },
        {"use": "database", "options": {"url": f"sqlite:///{reports}", "create": True}},
        {"use": f"{__name__}:moody", "name": "moody", "timeout_seconds": 30},
    ]


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Twenty-four hundred tracebacks, coloured and framed, would take longer than all else."""
    with structlog.testing.capture_logs():
        yield


@pytest.fixture
def place(stage: Stage, ledger_url: str | None) -> Stage:
    """A stage on either database."""
    stage.postgres = ledger_url
    return stage


async def test_one_that_fails_for_an_hour_delays_no_other(place: Stage, tmp_path: Path) -> None:
    """Two hundred runs: five effects once each, at once; the sixth is tried again and again, dies, and is retried by hand."""
    moody.__init__()  # type: ignore[misc]
    reports, lines, clock = tmp_path / "reports.db", tmp_path / "lines", Clock()
    async with (
        target("127.0.0.1") as hooks,
        place.service(
            clock=clock, operations={"token": TOKEN}, handlers=handlers(place, hooks.url, reports, lines)
        ) as service,
    ):
        run_ids = [await place.track(service, "emu-text" if n % 4 else "emu-image") for n in range(RUNS)]
        healthy = ("storage", "log", "forward", "command", "database")
        await eventually(lambda: _all_done(place, healthy, RUNS), what="the five others")
        assert _states(place, "moody").keys() <= {"ready", "leased"}

        for _ in range(60):
            clock.wrong_by += MINUTE
            service.signals.dispatch.set()
            await eventually(lambda: _nothing_due(place, service, clock))
        assert _states(place, "moody") == {"dead": RUNS}
        assert moody.calls == RUNS * 12
        assert moody.done == Counter()

        moody.failing = False
        dead = await _command(place, service, "dispatches", "list", "--limit", "500", "--json")
        assert {row["run_id"] for row in dead} == set(run_ids)
        assert {row["last_error"] for row in dead} == {"ConnectionError: their system is down"}
        assert (await _command(place, service, "dispatches", "retry", "--all", "--json"))[
            "dispatches"
        ] == RUNS
        await eventually(lambda: _all_done(place, ("moody",), RUNS))

    assert moody.done == Counter({f"{run_id}:moody:settled:0": 1 for run_id in run_ids})
    for run_id in run_ids:
        place.check_files(run_id)
    posted = Counter(post.headers["webhook-id"] for post in hooks.posts)
    assert posted == Counter({f"{run_id}:forward:settled:0": 1 for run_id in run_ids})
    written = Counter(lines.read_text().split())
    assert written == Counter({f"{run_id}:command:settled:0": 1 for run_id in run_ids})
    with contextlib.closing(sqlite3.connect(reports)) as connection:
        [(runs, ended)] = connection.execute(
            "SELECT count(*), count(completed_at) FROM flora_runs"
        ).fetchall()
    assert (runs, ended) == (RUNS, RUNS)


release = threading.Event()


async def hanging(run: SettledRun, context: Context) -> None:
    """Waits in a thread of the loop for what does not come, as a call to a dead mount does."""
    await asyncio.to_thread(release.wait)


async def test_one_whose_threads_hang_delays_no_other_and_no_stop(place: Stage) -> None:
    """More calls than the loop has threads, none of which can be stopped: all other work goes on, and so does the end."""
    release.clear()
    names = [
        {"use": f"{__name__}:hanging", "name": f"hanging-{n}", "timeout_seconds": 60} for n in range(6)
    ]
    storage = {"use": "storage", "options": {"url": str(place.outputs)}}
    try:
        async with place.service(handlers=[*names, storage]) as service:
            first = [await place.track(service, "emu-image") for _ in range(8)]
            await eventually(lambda: _leased(place, 6 * 8), what="calls that hang")
            assert await asyncio.get_running_loop().getaddrinfo("localhost", 80)
            second = [await place.track(service, "emu-image") for _ in range(4)]
            await eventually(lambda: _all_done(place, ("storage",), 12), what="the files")
        for run_id in first + second:
            place.check_files(run_id)
    finally:
        release.set()


async def _leased(stage: Stage, number: int) -> bool:
    rows = stage.rows(
        "SELECT count(*) AS n FROM dispatches WHERE state = 'leased' AND handler LIKE 'hanging%'"
    )
    return bool(rows[0]["n"] >= number)


def _states(stage: Stage, handler: str) -> dict[str, int]:
    rows = stage.rows(
        "SELECT state, count(*) AS n FROM dispatches WHERE handler = ? GROUP BY state", handler
    )
    return {row["state"]: row["n"] for row in rows}


async def _all_done(stage: Stage, names: tuple[str, ...], runs: int) -> bool:
    rows = stage.rows(
        "SELECT handler, state, count(*) AS n FROM dispatches WHERE event = 'settled' GROUP BY handler, state"
    )
    found = {(row["handler"], row["state"]): row["n"] for row in rows if row["handler"] in names}
    return found == {(name, "done"): runs for name in names}


async def _nothing_due(stage: Stage, service: Service, clock: Clock) -> bool:
    now = int(clock().timestamp() * 1000)
    statement = (
        "SELECT count(*) AS n FROM dispatches WHERE state = 'leased' OR (state = 'ready' AND due_at <= ?)"
    )
    left = stage.rows(statement, now)[0]["n"]
    if left:
        service.signals.dispatch.set()
    return not left


async def _command(stage: Stage, service: Service, *arguments: str) -> Any:
    """Run one of our own commands against the service, as an operator would."""
    host, port = service.operations_address
    env = {"RECEIVER_OPS_URL": f"http://{host}:{port}", "RECEIVER_OPS_TOKEN": TOKEN}
    done = await asyncio.to_thread(run_command, *arguments, cwd=stage.directory, env=env)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)
