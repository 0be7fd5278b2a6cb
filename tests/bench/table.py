"""What benchmarks have found: a row for each figure, and one table of them all at the end, under the machine's name."""

import os
import platform
import shutil
import sqlite3
import statistics
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

_PACKAGES = ("uvicorn", "httptools", "starlette", "sqlalchemy", "psycopg", "httpx", "uvloop")


@dataclass(frozen=True)
class Row:
    """One figure, as each round found it."""

    name: str
    found: Sequence[float]
    unit: str
    at_most: float | None
    at_least: float | None

    @property
    def median(self) -> float:
        return statistics.median(self.found)

    def target(self) -> str:
        if self.at_most is not None:
            return f"<= {self.at_most:g}{self.unit}"
        return f">= {self.at_least:g}{self.unit}" if self.at_least is not None else ""

    def verdict(self) -> str:
        if self.at_most is None and self.at_least is None:
            return ""
        met = (self.at_most is None or self.median <= self.at_most) and (
            self.at_least is None or self.median >= self.at_least
        )
        return "met" if met else "MISSED"

    def cells(self) -> tuple[str, ...]:
        spread = f"{_figure(min(self.found))}-{_figure(max(self.found))}"
        return (
            self.name,
            self.target(),
            f"{_figure(self.median)}{self.unit}",
            spread,
            str(len(self.found)),
            self.verdict(),
        )


@dataclass
class Table:
    """The rows so far."""

    rows: list[Row] = field(default_factory=list)

    def row(
        self,
        name: str,
        found: Sequence[float],
        unit: str = "",
        *,
        at_most: float | None = None,
        at_least: float | None = None,
    ) -> None:
        self.rows.append(Row(name, tuple(found), unit, at_most, at_least))

    def render(self) -> str:
        """Return it all as a Markdown table that is also fit to be read on a terminal."""
        lines = [
            ("what", "target", "median", "lowest-highest", "rounds", ""),
            *(row.cells() for row in self.rows),
        ]
        widths = [max(len(line[column]) for line in lines) for column in range(6)]
        lines.insert(1, tuple("-" * width for width in widths))
        return "\n".join(
            f"| {' | '.join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))} |"
            for line in lines
        )


def ratios(these: Sequence[float], those: Sequence[float]) -> list[float]:
    """Return round by round how many times one is the other."""
    return [this / that for this, that in zip(these, those, strict=True)]


def machine() -> str:
    """Return what was measured on: processor, load before anything ran, versions."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next(
        (line.partition(":")[2].strip() for line in lines if "model name" in line), platform.machine()
    )
    return (
        f"{model}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}\n"
        f"Python {platform.python_version()}, SQLite {sqlite3.sqlite_version}, {_node()}"
        f"{', '.join(f'{name} {found}' for name in _PACKAGES if (found := _version(name)))}"
    )


def _node() -> str:
    node = shutil.which("node")
    if node is None:
        return ""
    return f"node {subprocess.run([node, '--version'], capture_output=True, check=True, text=True).stdout.strip()}, "


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _figure(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.2f}"
