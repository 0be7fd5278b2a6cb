"""The load: signed callbacks made beforehand and sent by wrk, each once, from a core of its own."""

import json
import os
import re
import secrets
import shutil
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from receiver.flora.signature import sign
from receiver.web.public import CALLBACK_PATH

SECRET = "whsec_bench"
SCRIPT = Path(__file__).with_name("load.lua")
SERVER_CORE, LOAD_CORE = 0, 1
_DIGITS = 8


@dataclass(frozen=True)
class Requests:
    """A file of whole HTTP requests, all of the same length."""

    path: Path
    size: int
    count: int


@dataclass(frozen=True)
class Result:
    """What wrk saw: answers, seconds, answers other than 2xx and 3xx, connections that failed."""

    answers: int
    seconds: float
    refused: int
    failed: int

    @property
    def per_second(self) -> float:
        return self.answers / self.seconds


def callback(number: int, name: str, now: int) -> bytes:
    """Return a callback's body, as long as every other one."""
    message = {
        "id": f"whd_{name}_{number:0{_DIGITS}}",
        "type": "run.completed",
        "api_version": "2026-06-11",
        "created_at": now * 1000,
        "data": {
            "run_id": f"run_{name}_{number:0{_DIGITS}}",
            "run_type": "technique",
            "workspace_id": "ws_bench",
            "status": "completed",
        },
    }
    return json.dumps(message, separators=(",", ":")).encode()


def signed(count: int, *, name: str | None = None) -> Iterator[tuple[bytes, str]]:
    """Return bodies with their signatures; every one is about a delivery and a run of its own."""
    name, now = name or secrets.token_hex(4), int(time.time())
    for number in range(count):
        body = callback(number, name, now)
        yield body, sign(body, SECRET, timestamp=now)


def write_requests(path: Path, count: int) -> Requests:
    """Write a file for wrk. It is good for 15 minutes: so old may a signature be."""
    size = 0
    with path.open("wb") as file:
        for body, signature in signed(count):
            head = (
                f"POST {CALLBACK_PATH} HTTP/1.1\r\nHost: bench\r\nContent-Type: application/json\r\n"
                f"Flora-Signature: {signature}\r\nContent-Length: {len(body)}\r\n\r\n"
            )
            size = file.write(head.encode() + body)
    return Requests(path, size, count)


def drive(port: int, requests: Requests, *, seconds: int, connections: int = 64) -> Result:
    """Send as fast as answers come. Fails if the requests do not last."""
    program = shutil.which("wrk")
    if program is None:
        pytest.fail("the benchmark needs wrk; on Debian and Ubuntu: apt-get install wrk")
    said = subprocess.run(
        ["taskset", "-c", str(LOAD_CORE), program, "-t1", f"-c{connections}", f"-d{seconds}s", "-s", SCRIPT,
         f"http://127.0.0.1:{port}"],
        env={**os.environ, "BENCH_REQUESTS": str(requests.path), "BENCH_SIZE": str(requests.size)},
        capture_output=True, check=False, text=True,
    )  # fmt: skip
    found = re.search(r"^RESULT (\d+) (\d+) (\d+) (\d+)$", said.stdout, re.MULTILINE)
    if found is None:
        raise AssertionError(f"wrk ended with {said.returncode}: {said.stdout} {said.stderr}")
    answers, microseconds, refused, failed = (int(group) for group in found.groups())
    return Result(answers, microseconds / 1e6, refused, failed)
