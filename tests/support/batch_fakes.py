"""A receiver in memory, with the methods of `ReceiverClient` and the errors that a test sets."""

import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from receiver.cli.batch.validation import Job
from receiver.client.messages import ArtifactView, DispatchView, ErrorView, RunView, StartView
from receiver.errors import ReceiverApiError

StartError = ReceiverApiError | ErrorView


def a_dispatch(
    state: str, attempts: int, last_error: str | None = None, *, event: str = "settled"
) -> DispatchView:
    """The storage handler's work on a run."""
    return DispatchView(
        handler="storage", event=event, round=0, state=state, attempts=attempts, last_error=last_error
    )


def a_run(run_id: str, **given: Any) -> RunView:
    """Return a completed run with one stored file and its manifest."""
    stored = [
        ArtifactView(
            handler="storage",
            position=position,
            output_id=name,
            location=f"file:///out/{run_id}/{name}",
            size=3,
            sha256="abc",
            content_type=None,
            stored_at=datetime(2026, 11, 24, tzinfo=UTC),
        )
        for position, name in ((-1, "run.json"), (0, "image.png"))
    ]
    return RunView(
        **{
            "run_id": run_id,
            "state": "completed",
            "settled": True,
            "finished": True,
            "verdict": "matched",
            "run_type": "technique",
            "technique_id": "tech_poster",
            "workspace_id": None,
            "charged_cost": 0.04,
            "quoted_cost": 0.04,
            "cost_final": True,
            "error_code": None,
            "error_message": None,
            "lost_reason": None,
            "metadata": {},
            "first_seen_at": None,
            "settled_at": None,
            "artifacts": tuple(stored),
            "dispatches": (a_dispatch("done", 1),),
            **given,
        }
    )


def some_jobs(count: int) -> list[Job]:
    """Return jobs with the keys `row-0`, `row-1`, and so on; their runs are `run_row-0`, …."""
    return [
        Job(
            number,
            number + 2,
            f"row-{number}",
            f"batch:b:row-{number}",
            ({"id": "prompt", "value": "x"},),
            {},
        )
        for number in range(count)
    ]


@dataclass
class FakeReceiver:
    """A start takes the next of the row's `errors`; a run is that of `runs`, or completed."""

    errors: dict[str, list[StartError]] = field(default_factory=dict)
    runs: dict[str, dict[str, Any]] = field(default_factory=dict)
    on_wait: Callable[[str], None] = lambda _: None
    calls: list[str] = field(default_factory=list)
    started: list[str] = field(default_factory=list)
    active: int = 0
    most_active: int = 0
    reads: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def connect(self) -> AbstractContextManager["FakeReceiver"]:
        return nullcontext(self)

    def start(
        self,
        technique_id: str,
        inputs: Sequence[Mapping[str, Any]],
        *,
        idempotency_key: str | None = None,
        metadata: Mapping[str, Any] | None = None,
        workspace_id: str | None = None,
        wait_seconds: float = 30.0,
    ) -> StartView:
        key = str(idempotency_key)
        row = key.rpartition(":")[2]
        with self.lock:
            self.calls.append(row)
            error = self.errors[row].pop(0) if self.errors.get(row) else None
            if isinstance(error, ReceiverApiError):
                raise error
            if error is not None:
                return StartView(
                    state="asking", run_id=None, idempotency_key=key, token="token", error=error
                )
            repeated = row in self.started
            if not repeated:
                self.started.append(row)
            self.active += 1
            self.most_active = max(self.most_active, self.active)
        return StartView(
            state="started", run_id=f"run_{row}", idempotency_key=key, token="token", repeated=repeated
        )

    def wait(self, run_id: str, *, timeout_seconds: float | None = None) -> RunView:
        self.on_wait(run_id)
        with self.lock:
            self.active -= 1
        return a_run(run_id, **self.runs.get(run_id.removeprefix("run_"), {}))

    def run(self, run_id: str) -> RunView:
        self.reads += 1
        return a_run(run_id)
