"""What all benchmarks share: a room on the disk, and the table that is printed when the last one has ended."""

import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.bench.table import Table, machine

_TABLE, _MACHINE, _BEGAN = pytest.StashKey[Table](), pytest.StashKey[str](), pytest.StashKey[float]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_TABLE], config.stash[_MACHINE], config.stash[_BEGAN] = (
        Table(),
        machine(),
        time.monotonic(),
    )


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Print what was found, also if one of the benchmarks failed; why it did stands above."""
    table = config.stash[_TABLE]
    if table.rows:
        terminalreporter.write_line(f"\n{config.stash[_MACHINE]}\n\n{table.render()}\n")
        terminalreporter.write_line(f"{(time.monotonic() - config.stash[_BEGAN]) / 60:.1f} minutes")


@pytest.fixture
def table(pytestconfig: pytest.Config) -> Table:
    return pytestconfig.stash[_TABLE]


@pytest.fixture
def room() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="bench-") as directory:
        yield Path(directory)
