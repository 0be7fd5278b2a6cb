"""The door: processor time and throughput against a bare route and against rivals.

The server has one core, the load another. Every ratio is of two measurements that follow each other.
"""

import importlib.util
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from tests.bench.load import Requests, drive, write_requests
from tests.bench.servers import Process, door, rival
from tests.bench.table import Table, ratios

ROUNDS = 3
SECONDS = 3
REQUESTS = 60_000
"""More than any server that keeps them can take in that time."""
RIVALS = Path(__file__).with_name("rivals")
NODE_PACKAGES = ("express@5", "@flora-ai/flora@0.11.0", "better-sqlite3@11")
Server = Callable[[Path], AbstractContextManager[Process]]


@dataclass(frozen=True)
class Measured:
    """One server under full load."""

    per_second: float
    cpu_us: float
    """Processor time of the server for one answer, all of its threads."""


def measured(
    server: AbstractContextManager[Process], requests: Requests, *, again: bool = False
) -> Measured:
    with server as process:
        before = process.cpu_seconds()
        result = drive(process.port, requests, seconds=SECONDS, again=again)
        spent = process.cpu_seconds() - before
        assert result.answers, f"{process.command}: no answers; {process.said()}"
        assert not result.failures, f"{process.command}: {result}; {process.said()}"
        return Measured(result.per_second, spent / result.answers * 1e6)


def fresh(room: Path) -> Path:
    return Path(tempfile.mkdtemp(dir=room))


def _installed(*command: str, cwd: Path) -> None:
    done = subprocess.run(command, cwd=cwd, check=False, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr[-2000:]}"


def _node(room: Path) -> tuple[str, str]:
    for program in ("node", "npm"):
        assert shutil.which(program), (
            f"the rivals need {program}; on Debian and Ubuntu: apt-get install nodejs npm"
        )
    folder = fresh(room)
    shutil.copy(RIVALS / "express.mjs", folder)
    (folder / "package.json").write_text('{"type": "module"}')
    _installed("npm", "install", "--no-audit", "--no-fund", *NODE_PACKAGES, cwd=folder)
    return "node", str(folder / "express.mjs")


def _aiosqlite(room: Path) -> str:
    folder = fresh(room)
    _installed(
        sys.executable,
        "-m",
        "pip",
        "install",
        "-q",
        "--target",
        str(folder),
        "aiosqlite==0.22.1",
        cwd=folder,
    )
    return str(folder)


def test_against_rivals(room: Path, table: Table) -> None:
    """Ours keeps more than any of them: deliveries with their bytes, runs with what is next, both with indexes."""
    node, packages = _node(room), _aiosqlite(room)
    servers: dict[str, Server] = {
        "bare": lambda at: rival("bare", at),
        "ours": door,
        "aiosqlite": lambda at: rival("aiosqlite_route", at, PYTHONPATH=packages),
        "express": lambda at: rival("express", at, *node),
        "express and SQLite": lambda at: rival("express", at, *node, STORE="1"),
    }
    if importlib.util.find_spec("uvloop") is not None:
        servers["bare, uvloop"] = lambda at: rival("bare", at, uvloop=True)
        servers["ours, uvloop"] = lambda at: door(at, uvloop=True)
    found: dict[str, list[Measured]] = {name: [] for name in servers}
    mixed: list[Measured] = []
    for _ in range(ROUNDS):
        requests = write_requests(room / "requests", REQUESTS, in_order=True)
        for name, server in servers.items():
            again = name in {"bare", "express", "bare, uvloop"}
            found[name].append(measured(server(fresh(room)), requests, again=again))
        mixed.append(measured(door(fresh(room)), write_requests(room / "requests", REQUESTS)))
    cpu = {name: [each.cpu_us for each in rounds] for name, rounds in found.items()}
    speed = {name: [each.per_second for each in rounds] for name, rounds in found.items()}
    table.row("bare route: CPU per answer", cpu["bare"], " us")
    table.row("the door: CPU per committed callback", cpu["ours"], " us")
    table.row("CPU per callback: door / bare route", ratios(cpu["ours"], cpu["bare"]), at_most=2.2)
    table.row(".. ids in no order", ratios([each.cpu_us for each in mixed], cpu["bare"]))
    table.row("callbacks per second: door / bare route", ratios(speed["ours"], speed["bare"]))
    table.row(".. / Express + unwrap, no storage", ratios(speed["ours"], speed["express"]), at_least=2)
    table.row(
        ".. / Express + unwrap + better-sqlite3",
        ratios(speed["ours"], speed["express and SQLite"]),
        at_least=5,
    )
    table.row(".. / Starlette + aiosqlite", ratios(speed["ours"], speed["aiosqlite"]))
    if "ours, uvloop" in found:
        table.row(
            "with uvloop: CPU per callback: door / bare", ratios(cpu["ours, uvloop"], cpu["bare, uvloop"])
        )
        fast = speed["ours, uvloop"]
        table.row("with uvloop: callbacks per second: door / bare", ratios(fast, speed["bare, uvloop"]))
        table.row("with uvloop: .. / Express + unwrap, no storage", ratios(fast, speed["express"]))
        table.row(
            "with uvloop: .. / Express + unwrap + better-sqlite3", ratios(fast, speed["express and SQLite"])
        )
