"""The load: signed callbacks made beforehand, each sent once: by wrk as fast as answers come, or by the clock."""

import asyncio
import json
import os
import re
import secrets
import shutil
import subprocess
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from receiver.config.callback_url import CALLBACK_PATH
from receiver.flora.signature import sign

SECRET = "whsec_bench"
SCRIPT = Path(__file__).with_name("load.lua")
SERVER_CORE, LOAD_CORE = 0, 1


@dataclass(frozen=True)
class Requests:
    """A file of whole HTTP requests, all of the same length."""

    path: Path
    size: int
    count: int


@dataclass(frozen=True)
class Result:
    """What wrk saw. `failures`: answers that are neither 2xx nor 3xx, and what went wrong on connections, by its name."""

    answers: int
    seconds: float
    failures: dict[str, int]

    @property
    def per_second(self) -> float:
        return self.answers / self.seconds


def callback(key: str, run_id: str, now: int, workspace_id: str = "ws_bench") -> bytes:
    message = {
        "id": f"whd_{key}",
        "type": "run.completed",
        "api_version": "2026-06-11",
        "created_at": now * 1000,
        "data": {
            "run_id": run_id,
            "run_type": "technique",
            "workspace_id": workspace_id,
            "status": "completed",
        },
    }
    return json.dumps(message, separators=(",", ":")).encode()


def signed(count: int, *, in_order: bool = False) -> Iterator[tuple[bytes, str]]:
    """Return bodies, all of one length, with their signatures; each is about a delivery and a run of its own.

    Ids that follow each other in no order land anywhere in an index, and each dirties pages of its own.
    """
    name, now = secrets.token_hex(4), int(time.time())
    for number in range(count):
        key = f"{name}{number:08x}" if in_order else f"{spread(number)}{name}"
        body = callback(key, f"run_{key}", now)
        yield body, sign(body, SECRET, timestamp=now)


def spread(number: int) -> str:
    """Return eight digits that differ for every number, and follow each other in no order."""
    return f"{number * 2654435761 % 2**32:08x}"


def write_requests(path: Path, count: int, *, in_order: bool = False) -> Requests:
    """Write a file for wrk. It is good for 15 minutes: so old may a signature be."""
    size = 0
    with path.open("wb") as file:
        for body, signature in signed(count, in_order=in_order):
            size = file.write(request(body, signature))
    return Requests(path, size, count)


def request(body: bytes, signature: str) -> bytes:
    return (
        f"POST {CALLBACK_PATH} HTTP/1.1\r\nHost: bench\r\nContent-Type: application/json\r\n"
        f"Flora-Signature: {signature}\r\nContent-Length: {len(body)}\r\n\r\n"
    ).encode() + body


def drive(
    port: int, requests: Requests, *, seconds: int, connections: int = 64, again: bool = False
) -> Result:
    """Send as fast as answers come. Fails if the requests do not last, unless they may be sent again."""
    program = shutil.which("wrk")
    if program is None:
        pytest.fail("the benchmark needs wrk; on Debian and Ubuntu: apt-get install wrk")
    said = subprocess.run(
        ["taskset", "-c", str(LOAD_CORE), program, "-t1", f"-c{connections}", f"-d{seconds}s", "--timeout", "30s",
         "-s", SCRIPT, f"http://127.0.0.1:{port}"],
        env={**os.environ, "BENCH_REQUESTS": str(requests.path), "BENCH_SIZE": str(requests.size),
             **({"BENCH_AGAIN": "1"} if again else {})},
        capture_output=True, check=False, text=True,
    )  # fmt: skip
    found = re.search(r"^RESULT ([0-9 ]+)$", said.stdout, re.MULTILINE)
    if found is None:
        raise AssertionError(f"wrk ended with {said.returncode}: {said.stdout} {said.stderr}")
    answers, microseconds, *failures = (int(number) for number in found[1].split())
    named = zip(("refused", "connect", "read", "write", "timeout"), failures, strict=True)
    return Result(answers, microseconds / 1e6, {name: count for name, count in named if count})


async def send(
    ports: Sequence[int],
    requests: Sequence[bytes],
    *,
    per_second: float | None = None,
    connections: int = 32,
) -> list[tuple[float, float]]:
    """Send by the clock, whether or not answers come, or all at once; to each server the same share.

    Return for each callback the seconds from when it was due to its answer, and from when it was written to its answer.
    """
    loop = asyncio.get_running_loop()
    waiting: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()
    took: list[tuple[float, float]] = []

    async def carry(port: int) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            while True:
                due, bytes_ = await waiting.get()
                wrote = loop.time()
                writer.write(bytes_)
                head = await reader.readuntil(b"\r\n\r\n")
                assert head.startswith(b"HTTP/1.1 200"), head
                await reader.readuntil(b"}")
                took.append((loop.time() - due, loop.time() - wrote))
        finally:
            writer.close()

    carriers = [asyncio.create_task(carry(ports[number % len(ports)])) for number in range(connections)]
    began = loop.time() + 0.1
    for number, each in enumerate(requests):
        due = began + (number / per_second if per_second else 0)
        if due > loop.time():
            await asyncio.sleep(due - loop.time())
        waiting.put_nowait((due, each))
    async with asyncio.timeout(60):
        while len(took) < len(requests):
            for carrier in carriers:
                if carrier.done():
                    carrier.result()
            await asyncio.sleep(0.02)
    for carrier in carriers:
        carrier.cancel()
    await asyncio.wait(carriers)
    await asyncio.sleep(0.1)  # the transports end
    return took


def late(took: Iterable[float], share: float = 0.99) -> float:
    """Return a percentile, in milliseconds."""
    ordered = sorted(took)
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))] * 1000


@contextmanager
def pinned(core: int) -> Iterator[None]:
    """Keep this process, and what it starts, to one core."""
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, allowed)
