"""A gigabyte from URL to disk, hashed and synced, against curl and its friends; and what it does to the memory."""

import asyncio
import tempfile
import time
from pathlib import Path

from tests.bench.table import Table
from tests.support.lives import served
from tests.support.stage import Stage, run_stage

ROUNDS = 2
SIZE = 1 << 30


def high_water_mib(pid: int) -> float:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


async def stored(stage: Stage, size: int) -> tuple[str, float]:
    """Start a run with one output; return it, and how long its handler took."""
    run_id = stage.start("emu-image", {"kind": "size", "bytes": size})
    await stage.over(run_id, within=200)
    [dispatch] = [each for each in stage.dispatches(run_id, "storage") if each["event"] == "settled"]
    [attempt] = stage.rows("SELECT * FROM dispatch_attempts WHERE dispatch_seq = ?", dispatch["seq"])
    return run_id, (attempt["ended_at"] - attempt["started_at"]) / 1000


async def curl(url: str, target: Path) -> float:
    """The same by hand: fetch, sync, hash."""
    began = time.perf_counter()
    script = 'curl -sf -o "$1" "$2" && sync "$1" && sha256sum "$1" > /dev/null'
    process = await asyncio.create_subprocess_exec("sh", "-c", script, "sh", str(target), url)
    assert await process.wait() == 0
    return time.perf_counter() - began


async def test_a_gigabyte(table: Table) -> None:
    ratios, growth = [], []
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        directory = Path(name)
        async with run_stage(directory) as stage, stage.client() as client:
            for _ in range(ROUNDS):
                log = (directory / "log").open("ab")
                async with served(stage, stdout=log.fileno()) as receiver:
                    await receiver.ready(client)
                    await stored(stage, 100_000)  # everything is loaded once
                    before = high_water_mib(receiver.pid)
                    run_id, seconds = await stored(stage, SIZE)
                    growth.append(high_water_mib(receiver.pid) - before)
                    await receiver.stop()
                log.close()
                for path in stage.files(run_id).values():
                    path.unlink()
                media = await _url(stage, run_id)
                ratios.append(await curl(media, directory / "by-curl") / seconds)
                await asyncio.to_thread((directory / "by-curl").unlink)
    table.row("1 GiB to disk: speed / curl && sync && sha256sum", ratios, at_least=0.8)
    table.row("1 GiB to disk: growth of the peak of resident memory", growth, " MiB", at_most=64)


async def _url(stage: Stage, run_id: str) -> str:
    """Return the output's URL as the ledger has it."""
    return str(stage.rows("SELECT value FROM outputs WHERE run_id = ?", run_id)[0]["value"])
