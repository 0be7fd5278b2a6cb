"""The outcomes of a batch: spooled to disk while it runs, then written to `results.csv`."""

import csv
import json
import os
import tempfile
import threading
from array import array
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO

from receiver.client.messages import RunView

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
    """Outcomes in a file, by the row's position; each takes eight bytes of memory. Thread-safe."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._offsets = array("q")
        self._lock = threading.Lock()

    def store(self, position: int, outcome: Outcome) -> None:
        """Store an outcome, replacing an earlier one of the same position."""
        line = json.dumps(asdict(outcome)).encode() + b"\n"
        with self._lock:
            while len(self._offsets) <= position:
                self._offsets.append(-1)
            self._offsets[position] = self._file.seek(0, os.SEEK_END)
            self._file.write(line)

    def __iter__(self) -> Iterator[Outcome]:
        """Yield the outcomes in the order of the table."""
        return (outcome for _, outcome in self.items())

    def items(self) -> Iterator[tuple[int, Outcome]]:
        for position in range(len(self._offsets)):
            if self._offsets[position] >= 0:
                yield position, self.get(position)

    def get(self, position: int) -> Outcome:
        with self._lock:
            self._file.seek(self._offsets[position])
            data = json.loads(self._file.readline())
        return replace(Outcome(**data), files=tuple(data["files"]))


@contextmanager
def open_spool() -> Iterator[Spool]:
    """Yield an empty spool in a temporary file."""
    with tempfile.TemporaryFile(prefix="flora-receiver-results-") as file:
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


def write_results(path: Path, outcomes: Spool) -> None:
    """Write the file atomically. Raises OSError."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with part.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(COLUMNS)
            writer.writerows(_to_fields(outcome) for outcome in outcomes)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def _to_fields(outcome: Outcome) -> tuple[str, ...]:
    return (
        outcome.key,
        outcome.run_id or "",
        outcome.state,
        outcome.verdict or "",
        "" if outcome.cost is None else f"{outcome.cost:.6f}".rstrip("0").rstrip("."),
        outcome.error_code or "",
        outcome.error_message or "",
        " ".join(outcome.files),
    )
