"""How long it takes to start: until ready, and for `--help`, beside a Python that does nothing."""

import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.bench.servers import COMMAND, receiver
from tests.bench.table import heading, row

ROUNDS = 7


def _seconds(*command: str) -> float:
    began = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - began


def test_start() -> None:
    """`ready` is the first answer of `/readyz`, with the tables there already."""
    ready, helped, bare = [], [], []
    with tempfile.TemporaryDirectory(prefix="bench-") as directory:
        with receiver(Path(directory), core=None, door=False):
            pass  # makes the tables
        for _ in range(ROUNDS):
            bare.append(_seconds(sys.executable, "-c", "pass"))
            helped.append(_seconds(COMMAND, "--help"))
            with receiver(Path(directory), core=None, door=False) as process:
                ready.append(process.ready_seconds)
    heading("Starting", ROUNDS)
    row("python -c pass", "", bare, " s")
    row("flora-receiver --help", "<= 0.4 s", helped, " s")
    row("flora-receiver serve, until ready", "<= 1.5 s", ready, " s")
    row("--help / python -c pass", "", [h / b for h, b in zip(helped, bare, strict=True)])
