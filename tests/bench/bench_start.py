"""How long it takes to start: until ready, and for `--help`, beside a Python that does nothing."""

import subprocess
import sys
import time
from pathlib import Path

from tests.bench.servers import COMMAND, receiver
from tests.bench.table import Table

ROUNDS = 5


def _seconds(*command: str) -> float:
    began = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - began


def test_start(room: Path, table: Table) -> None:
    """`ready` is the first answer of `/readyz`, with the tables there already."""
    ready, helped, bare = [], [], []
    with receiver(room, core=None):
        pass  # makes the tables
    for _ in range(ROUNDS):
        bare.append(_seconds(sys.executable, "-c", "pass"))
        helped.append(_seconds(COMMAND, "--help"))
        with receiver(room, core=None) as process:
            ready.append(process.ready_seconds)
    table.row("flora-receiver --help", helped, " s", at_most=0.4)
    table.row(".. python -c pass", bare, " s")
    table.row("flora-receiver serve, until ready", ready, " s", at_most=1.5)
