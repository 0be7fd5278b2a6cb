"""How benchmarks tell what they found: the machine and the versions once, then a row for each target."""

import os
import platform
import sqlite3
import statistics
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path


def machine() -> str:
    model = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ),
        platform.machine(),
    )
    packages = ", ".join(f"{name} {version(name)}" for name in ("uvicorn", "httptools", "starlette", "sqlalchemy"))
    return (
        f"{model}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; Python {platform.python_version()}, "
        f"SQLite {sqlite3.sqlite_version}, {packages}"
    )


def heading(title: str, rounds: int) -> None:
    write(f"\n{title}: medians of {rounds}, lowest and highest in brackets\n{machine()}\n")


def row(name: str, target: str, found: Sequence[float], unit: str = "") -> float:
    """Print one line; return the median."""
    middle = statistics.median(found)
    write(f"  {name:<66} {target:>10}  {middle:8.2f}{unit}  ({min(found):.2f}-{max(found):.2f})\n")
    return middle


def write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
