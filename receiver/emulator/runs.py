"""The runs that were started, and the response to a read of each at a given time.

A run changes by the clock alone.
"""

import math
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace

from receiver.emulator.faults import Fault
from receiver.emulator.media import file_type

__all__ = ["PlannedOutput", "Run", "RunBook", "Subject", "apply_fault", "run_to_json"]

# The share of its duration for which a run is pending.
_PENDING_SHARE = 0.1

_MESSAGES = {
    "GENERATION_PROMPT_MODERATED": "The prompt was refused by moderation.",
    "model_timeout": "The model took too long.",
}


@dataclass(frozen=True, slots=True)
class PlannedOutput:
    """An output that a run will have: a `text`, or a file of `size` bytes (0: its natural size)."""

    output_id: str
    type: str
    text: str = ""
    size: int = 0


@dataclass(frozen=True, slots=True)
class Subject:
    """What a run runs: a technique, or a model for a generation."""

    run_type: str
    id: str
    name: str


@dataclass(frozen=True, slots=True)
class Run:
    """One run. Times are unix seconds; `cost` is in USD."""

    run_id: str
    subject: Subject
    workspace_id: str
    project_id: str
    created_at: float
    seconds: float
    cost: float
    outputs: tuple[PlannedOutput, ...]
    read_lag_seconds: float = 0.0
    cost_lag_seconds: float = 0.0
    callback_url: str | None = None
    error_code: str | None = None

    @property
    def started_at(self) -> float:
        return self.created_at + self.seconds * _PENDING_SHARE

    @property
    def ends_at(self) -> float:
        return self.created_at + self.seconds

    @property
    def final_status(self) -> str:
        return "failed" if self.error_code else "completed"

    @property
    def error_message(self) -> str:
        return _MESSAGES.get(self.error_code or "", "The run failed.")

    def status_at(self, now: float) -> str:
        """Return the status that the API states at `now`.

        The end of the run appears after its read lag.
        """
        if now >= self.ends_at + self.read_lag_seconds:
            return self.final_status
        return "pending" if now < self.started_at else "running"

    def poll_path(self) -> str:
        if self.subject.run_type == "technique":
            return f"/techniques/{self.subject.id}/runs/{self.run_id}"
        return f"/runs/{self.run_id}"


def run_to_json(run: Run, now: float, *, origin: str, api: str) -> dict[str, object]:
    """Return the response to a read of the run.

    Media URLs start with `origin`, the poll URL with `api`.
    """
    status = run.status_at(now)
    ended = status in ("completed", "failed")
    body: dict[str, object] = {
        "run_id": run.run_id,
        "status": status,
        # A failed run has 100 as well: FLORA says to read `status` alone.
        "progress": 100 if ended else _progress(run, now),
        "created_at": _milliseconds(run.created_at),
        "poll_url": api + run.poll_path(),
    }
    if status != "pending":
        body["started_at"] = _milliseconds(run.started_at)
    if ended:
        body["completed_at"] = _milliseconds(run.ends_at)
        if now >= run.ends_at + run.cost_lag_seconds:
            body["charged_cost"] = run.cost
    if status == "failed":
        body |= {"error_code": run.error_code, "error_message": run.error_message}
    if status == "completed":
        body["outputs"] = [
            {"output_id": output.output_id, "type": output.type, "url": _url(run, position, output, origin)}
            for position, output in enumerate(run.outputs)
        ]
    return body


def _progress(run: Run, now: float) -> int:
    if now < run.started_at or run.seconds <= 0:
        return 0
    return min(99, math.floor(100 * (now - run.started_at) / (run.ends_at - run.started_at)))


def _url(run: Run, position: int, output: PlannedOutput, origin: str) -> str:
    if output.type == "text":
        return output.text
    return f"{origin}/media/{run.run_id}/{position}{file_type(output.type)[0]}"


def _milliseconds(seconds: float) -> int:
    return round(seconds * 1000)


def apply_fault(run: Run, fault: Fault) -> Run:
    """Return the run as a fault of the run family changes it."""
    match fault.kind:
        case "fail":
            run = replace(run, error_code=fault.text("error_code"))
        case "run_seconds":
            run = replace(run, seconds=fault.number("seconds"))
        case "read_lag":
            run = replace(run, read_lag_seconds=fault.number("seconds"))
        case "cost_lag":
            run = replace(run, cost_lag_seconds=fault.number("seconds"))
        case "no_outputs":
            run = replace(run, outputs=())
        case "same_output_ids":
            run = replace(run, outputs=tuple(replace(output, output_id="output") for output in run.outputs))
        case "size":
            size = int(fault.number("bytes"))
            run = replace(run, outputs=tuple(replace(output, size=size) for output in run.outputs))
        case _:
            pass
    return run


@dataclass(slots=True)
class RunBook:
    """All runs in the order of their starts. A cursor names a place in that order."""

    clock: Callable[[], float]
    randomness: random.Random
    _runs: dict[str, Run] = field(default_factory=dict)
    _order: list[str] = field(default_factory=list)

    def add(self, run: Run) -> None:
        self._runs[run.run_id] = run
        self._order.append(run.run_id)

    def find(self, run_id: str) -> Run | None:
        return self._runs.get(run_id)

    def get(self, run_id: str) -> Run:
        return self._runs[run_id]

    def apply(self, run_id: str, faults: Iterable[Fault]) -> Run:
        run = self._runs[run_id]
        for fault in faults:
            run = apply_fault(run, fault)
        self._runs[run_id] = run
        return run

    def newest(self, before: int | None) -> Iterator[tuple[int, Run]]:
        """Yield (place, run) from the newest to the oldest.

        Where `before` is given, only places below it.
        """
        start = len(self._order) if before is None else min(before, len(self._order))
        for place in range(start - 1, -1, -1):
            yield place, self._runs[self._order[place]]

    def new_id(self, prefix: str) -> str:
        """Return a new id in FLORA's form, such as `run_9f86d081884c7d65`."""
        return f"{prefix}_{self.randomness.getrandbits(64):016x}"
