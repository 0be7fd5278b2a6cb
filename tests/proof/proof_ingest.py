"""Ten million runs in the ledger: callbacks still come in at seven tenths of the speed that an empty one allows.

`make proof`. `PROOF_ROWS` bounds it; the file takes some 10 GB of the temporary folder, and its filling most of the time.
"""

# ruff: noqa: T201 -- a proof prints what it has found
import os
import statistics
import tempfile
from pathlib import Path

from tests.bench.bench_ledger import compare
from tests.bench.table import machine, ratios

ROWS = int(os.environ.get("PROOF_ROWS", "10_000_000"))
ROUNDS = 5
AT_LEAST = 0.7


def test_ten_million_rows() -> None:
    """Median of rounds in which both take the same callbacks in turn."""
    with tempfile.TemporaryDirectory(prefix="proof-") as room:
        many, few = compare(Path(room), ROWS, ROUNDS)
    speed = ratios([each.per_second for each in many], [each.per_second for each in few])
    cpu = ratios([each.cpu_us for each in many], [each.cpu_us for each in few])
    print(
        f"\n{machine()}\ncallbacks per second, {ROWS:,} runs / empty ledger: {statistics.median(speed):.2f} "
        f"({min(speed):.2f}-{max(speed):.2f}), CPU {statistics.median(cpu):.2f} ({min(cpu):.2f}-{max(cpu):.2f})"
    )
    assert statistics.median(speed) >= AT_LEAST
