"""The outcomes of a batch: spooled to disk while it runs, then written to `results.csv`."""

import csv
import errno
import json
import os
import sys
import tempfile
import threading
from array import array
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from io import TextIOWrapper
from pathlib import Path
from typing import IO

from receiver.client.messages import RunView
from receiver.net.ownership import match_owner

_NOWHERE, _IN_MEMORY = -1, -2
"""Offsets of outcomes that are not in the file."""
_PIECE = 4096
_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n", "\uff1d", "\uff0b", "\uff0d", "\uff20")
"""Beginnings of a cell that spreadsheets calculate, as OWASP lists them; the last are full-width."""
COLUMNS = ("key", "run_id", "state", "verdict", "cost", "error_code", "error_message", "files")
NOT_STARTED, REFUSED, UNKNOWN, UNFINISHED = "not_started", "refused", "unknown", "unfinished"
"""States of rows without a finished run.

Not requested; refused by FLORA; possibly started, with no way to find the run; still in progress.
"""


@dataclass(frozen=True, slots=True)
class Outcome:
    """The outcome of one row; `cost` is in USD.

    `state` is the run's (`completed`, `failed`, `lost`) or one of the four above.
    """

    row: int
    key: str
    state: str
    run_id: str | None = None
    verdict: str | None = None
    cost: float | None = None
    cost_final: bool = True
    error_code: str | None = None
    error_message: str | None = None
    files: tuple[str, ...] = ()

    @property
    def succeeded(self) -> bool:
        """Whether the run completed and every handler did its work."""
        return self.state == "completed" and self.error_code is None


def to_outcome(run: RunView, *, row: int, key: str) -> Outcome:
    """Return the outcome of a row whose run is finished."""
    code, message = run.error_code, run.error_message
    dead = next((each for each in run.dispatches if each.state == "dead"), None)
    if run.state == "lost":
        code = run.lost_reason or "lost"
        message = "given up; `flora-receiver runs refresh` reads it again"
    elif not run.succeeded and code is None and dead is not None:
        code, message = "not_stored", f"{dead.handler}: {dead.last_error or 'failed'}"
    return Outcome(
        row=row,
        key=key,
        state=run.state,
        run_id=run.run_id,
        verdict=run.verdict,
        cost=run.charged_cost,
        cost_final=run.cost_final,
        error_code=code,
        error_message=message,
        files=tuple(each.location for each in run.files),
    )


@dataclass(frozen=True, slots=True)
class Summary:
    """Totals of a batch; `cost` is in USD as charged, over the rows whose cost is known."""

    rows: int
    succeeded: int
    states: dict[str, int]
    cost: float
    cost_unknown: int
    """Settled runs whose final cost did not arrive in time."""

    @property
    def ok(self) -> bool:
        return self.succeeded == self.rows


class Spool:
    """Outcomes in a file, by the row's position; each takes eight bytes of memory. Thread-safe.

    What the file does not take is kept in memory: a full disk loses no outcome.
    """

    def __init__(self, file: IO[bytes] | None) -> None:
        """`file` is unbuffered; without one, everything is in memory."""
        self._file = file
        self._offsets = array("q")
        self._kept: dict[int, bytes] = {}
        self._lock = threading.Lock()

    def store(self, position: int, outcome: Outcome) -> None:
        """Store an outcome, replacing an earlier one of the same position."""
        line = json.dumps(asdict(outcome)).encode() + b"\n"
        with self._lock:
            offset = self._append(line)
            while len(self._offsets) <= position:
                self._offsets.append(_NOWHERE)
            self._kept.pop(position, None)
            if offset == _IN_MEMORY:
                self._kept[position] = line
            self._offsets[position] = offset

    def __iter__(self) -> Iterator[Outcome]:
        """Yield the outcomes in the order of the table."""
        return (outcome for _, outcome in self.items())

    def items(self) -> Iterator[tuple[int, Outcome]]:
        for position in range(len(self._offsets)):
            if self._offsets[position] != _NOWHERE:
                yield position, self.get(position)

    def get(self, position: int) -> Outcome:
        with self._lock:
            offset = self._offsets[position]
            data = json.loads(self._kept[position] if offset == _IN_MEMORY else self._read_line(offset))
        return replace(Outcome(**data), files=tuple(data["files"]))

    def _append(self, line: bytes) -> int:
        """Write a line and return its offset, or `_IN_MEMORY` if it cannot be written whole."""
        if self._file is None:
            return _IN_MEMORY
        try:
            offset = self._file.seek(0, os.SEEK_END)
            return offset if self._file.write(line) == len(line) else _IN_MEMORY
        except OSError:
            return _IN_MEMORY

    def _read_line(self, offset: int) -> bytes:
        assert self._file is not None
        line = b""
        while b"\n" not in line and (piece := os.pread(self._file.fileno(), _PIECE, offset + len(line))):
            line += piece
        return line.partition(b"\n")[0]


@contextmanager
def open_spool() -> Iterator[Spool]:
    """Yield an empty spool in a temporary file, in memory if there cannot be one."""
    with ExitStack() as stack:
        file: IO[bytes] | None = None
        with suppress(OSError):
            file = stack.enter_context(
                tempfile.TemporaryFile(prefix="flora-receiver-results-", buffering=0)
            )
        yield Spool(file)


def summarize(outcomes: Spool) -> Summary:
    states: Counter[str] = Counter()
    rows = succeeded = cost_unknown = 0
    cost = 0.0
    for outcome in outcomes:
        rows += 1
        succeeded += outcome.succeeded
        states[outcome.state] += 1
        cost += outcome.cost or 0.0
        is_open = outcome.cost is None or not outcome.cost_final
        cost_unknown += outcome.run_id is not None and is_open
    return Summary(rows, succeeded, dict(states), round(cost, 6), cost_unknown)


def check_path(path: Path) -> None:
    """Raise OSError if results cannot be written to the path."""
    if not path.exists() or path.is_file():
        with _open_beside(path):
            pass
    elif path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    elif not os.access(path, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


def write_results(path: Path, outcomes: Spool, *, separator: str = ",") -> None:
    """Write the file atomically; a pipe or a device is written in place. Raises OSError."""
    if path.exists() and not path.is_file():
        with path.open("wb") as file:
            _write_rows(file, outcomes, separator)
        return
    with _open_beside(path) as file:
        _write_rows(file, outcomes, separator)
        file.flush()
        os.fsync(file.fileno())
        Path(file.name).replace(path)


def print_results(outcomes: Spool, *, separator: str = ",") -> None:
    """Print the lines of the file on standard output."""
    sys.stdout.flush()
    _write_rows(sys.stdout.buffer, outcomes, separator)
    sys.stdout.buffer.flush()


@contextmanager
def _open_beside(path: Path) -> Iterator[IO[bytes]]:
    """Open a hidden file in the directory of `path`, which is removed unless it is renamed."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            match_owner(file.fileno(), path.parent)
            yield file
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)


def _write_rows(file: IO[bytes], outcomes: Spool, separator: str) -> None:
    # Excel takes a file without a byte order mark for one in the machine's old code page.
    text = TextIOWrapper(file, encoding="utf-8-sig", newline="", write_through=True)
    try:
        writer = csv.writer(text, delimiter=separator)
        writer.writerow(COLUMNS)
        writer.writerows(_to_fields(outcome) for outcome in outcomes)
    finally:
        text.detach()


def _to_fields(outcome: Outcome) -> tuple[str, ...]:
    cost = "" if outcome.cost is None else f"{outcome.cost:.6f}".rstrip("0").rstrip(".")
    texts = (outcome.key, outcome.run_id, outcome.state, outcome.verdict)
    details = (outcome.error_code, outcome.error_message, " ".join(outcome.files))
    return (*map(_to_cell, texts), cost, *map(_to_cell, details))


def _to_cell(text: str | None) -> str:
    """Return a text as a cell that no spreadsheet takes for a formula."""
    return f"'{text}" if text and text.startswith(_FORMULA) else text or ""
