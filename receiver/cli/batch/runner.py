"""The worker threads of a batch: each starts a row, waits for its run and stores the outcome.

No state survives a crash, because the service knows every start by its key: the same jobs again
start nothing twice.
"""

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from http import HTTPStatus
from typing import Any, Protocol, TypeVar

from receiver.cli.batch.concurrency import ConcurrencyLimit
from receiver.cli.batch.results import (
    NOT_STARTED,
    REFUSED,
    UNFINISHED,
    UNKNOWN,
    Outcome,
    Spool,
    to_outcome,
)  # fmt: skip
from receiver.cli.batch.retries import is_transient, pause_seconds
from receiver.cli.batch.table import RowProblem
from receiver.cli.batch.validation import Job
from receiver.client.messages import RunView, StartView
from receiver.errors import ReceiverApiError

T = TypeVar("T")
Jobs = Iterable[Job | tuple[int, RowProblem]]
"""Rows to start; a row that has an error only now comes with its position."""

_START_SECONDS = 8.0
"""How long a call waits for FLORA's response to a start; its `retry-after` is usually 5 s."""
_WAIT_SECONDS = 30.0
_HALTING = frozenset({"insufficient_credits", "paid_plan_required", "unauthorized", "flora_unauthorized"})
"""Refusals that every further row would get as well."""
_UNKNOWN_OUTCOME = "unknown_outcome"
_USED_BEFORE = "key_used_before"
_FAILURES_TO_EXPLAIN = 3
"""Failures of a call in a row before its reason is printed: a restart is usually over by then."""
_CONFLICTS = frozenset({"idempotency_conflict", "idempotency_key_reused"})


class Receiver(Protocol):
    """The methods of `ReceiverClient` that a batch calls."""

    def start(
        self,
        technique_id: str,
        inputs: Sequence[Mapping[str, Any]],
        *,
        idempotency_key: str | None = None,
        metadata: Mapping[str, Any] | None = None,
        workspace_id: str | None = None,
        wait_seconds: float = 30.0,
    ) -> StartView: ...

    def wait(self, run_id: str, *, timeout_seconds: float | None = None) -> RunView: ...

    def run(self, run_id: str) -> RunView: ...


@dataclass(frozen=True, slots=True)
class Halt:
    """Why the batch ended early; `code` is FLORA's, `unreachable`, `interrupted` or `broken`."""

    code: str
    message: str


@dataclass(frozen=True, slots=True)
class Progress:
    """The rows of a batch by what became of them; `limit` is how many may be active at once."""

    done: int
    succeeded: int
    failed: int
    active: int
    limit: int
    cost: float


class Runner:
    """A batch in progress. `connect` opens a client for one thread."""

    def __init__(
        self,
        connect: Callable[[], AbstractContextManager[Receiver]],
        outcomes: Spool,
        *,
        technique_id: str,
        workspace_id: str | None = None,
        parallel: int = 8,
        patience_seconds: float = 120.0,
        notify: Callable[[str], None] = lambda _: None,
    ) -> None:
        """`notify` gets each reason for which a row waits, once."""
        self._connect = connect
        self._outcomes = outcomes
        self._technique_id = technique_id
        self._workspace_id = workspace_id
        self._parallel = parallel
        self._patience_seconds = patience_seconds
        self._notify = notify
        self._notified: set[str] = set()
        self._concurrency = ConcurrencyLimit(parallel)
        self._jobs: Iterator[Job | tuple[int, RowProblem]] = iter(())
        self._jobs_lock = threading.Lock()
        self._lock = threading.Lock()
        self._active: dict[int, Outcome] = {}
        """By position, the outcome that a row has if the batch is interrupted now."""
        self._progress = Progress(0, 0, 0, 0, parallel, 0.0)
        self._stopping = threading.Event()
        self._broken: BaseException | None = None
        self.halt: Halt | None = None

    @property
    def progress(self) -> Progress:
        with self._lock:
            limit = self._concurrency.limit
            return replace(self._progress, active=len(self._active), limit=limit)

    def run(self, jobs: Jobs, watch: Callable[[Progress], None]) -> None:
        """Run every job, calling `watch` ten times a second; `halt` says if rows were left out.

        KeyboardInterrupt propagates at once, when every row has an outcome; runs continue at FLORA.
        """
        self._jobs = iter(jobs)
        # Daemons, because a thread in a long wait must not keep an interrupted command from ending.
        threads = [
            threading.Thread(target=self._work, name=f"batch-{number}", daemon=True)
            for number in range(self._parallel)
        ]
        try:
            for thread in threads:
                thread.start()
            for thread in threads:
                while thread.is_alive():
                    thread.join(0.1)
                    watch(self.progress)
        except BaseException:
            self._abandon()
            raise
        if self._broken is not None:
            raise self._broken
        watch(self.progress)

    def read_final_costs(self, receiver: Receiver, *, seconds: float, watch: Callable[[int], None]) -> None:
        """Read runs without a final cost again for `seconds`; `watch` gets how many are left."""
        until = time.monotonic() + seconds
        waiting = [
            position
            for position, outcome in self._outcomes.items()
            if outcome.run_id is not None and not outcome.cost_final
        ]
        while waiting and time.monotonic() < until:
            watch(len(waiting))
            waiting = [position for position in waiting if not self._read_cost(receiver, position)]
            if waiting:
                time.sleep(min(1.0, max(0.0, until - time.monotonic())))

    def _read_cost(self, receiver: Receiver, position: int) -> bool:
        """Read a run's cost and return whether it is final."""
        outcome = self._outcomes.get(position)
        try:
            run = receiver.run(outcome.run_id or "")
        except ReceiverApiError:
            return False
        verdict = run.verdict or outcome.verdict
        self._outcomes.store(
            position,
            replace(outcome, cost=run.charged_cost, cost_final=run.cost_final, verdict=verdict),
        )
        return run.cost_final

    def _work(self) -> None:
        """Process jobs until there are none left: the loop of one thread."""
        try:
            with self._connect() as receiver:
                while True:
                    self._concurrency.acquire()
                    try:
                        job = self._next_job()
                        if job is None:
                            return
                        self._record(job.position, self._process(receiver, job))
                    finally:
                        self._concurrency.release()
        except BaseException as error:
            self._broken = self._broken or error
            self._stop(Halt("broken", f"{type(error).__name__}: {error}"))

    def _next_job(self) -> Job | None:
        """Return the next job; after a halt, record each remaining one as not started."""
        with self._jobs_lock:
            for job in self._jobs:
                if not isinstance(job, Job):
                    position, problem = job
                    message = f"the file has changed since it was checked: {problem}"
                    outcome = Outcome(
                        problem.row or 0, "", REFUSED, error_code="bad_row", error_message=message
                    )
                    self._record(position, outcome)
                elif self.halt is not None:
                    self._record(job.position, Outcome(job.row, job.key, NOT_STARTED))
                else:
                    with self._lock:
                        self._active[job.position] = Outcome(job.row, job.key, UNFINISHED)
                    return job
        return None

    def _process(self, receiver: Receiver, job: Job) -> Outcome:
        """Start one row and wait for its run."""
        started = self._call(job, partial(self._start, receiver, job))
        if isinstance(started, Outcome):
            return started
        with self._lock:
            self._active[job.position] = Outcome(job.row, job.key, UNFINISHED, run_id=started)
        run = self._call(job, partial(self._wait, receiver, job, started))
        if isinstance(run, Outcome):
            return replace(run, run_id=started)
        return to_outcome(run, row=job.row, key=job.key)

    def _start(self, receiver: Receiver, job: Job) -> str | None:
        """Return the id of a row's run, None while FLORA has not responded."""
        start = receiver.start(
            self._technique_id,
            job.inputs,
            idempotency_key=job.idempotency_key,
            metadata=job.metadata,
            workspace_id=self._workspace_id,
            wait_seconds=_START_SECONDS,
        )
        if start.run_id is not None:
            self._concurrency.record_success()
        elif start.error is not None:
            if start.error.status == HTTPStatus.TOO_MANY_REQUESTS:
                self._concurrency.halve()
            self._explain_wait(job, start.error.code, start.error.message)
        return start.run_id

    def _wait(self, receiver: Receiver, job: Job, run_id: str) -> RunView | None:
        """Return the run once it is finished, None if it is not yet."""
        timeout_seconds = min(_WAIT_SECONDS, max(1.0, self._patience_seconds))
        run = receiver.wait(run_id, timeout_seconds=timeout_seconds)
        if not run.finished and run.reads_held is not None:
            self._explain_wait(job, "not_read", run.reads_held.reason)
        return run if run.finished else None

    def _call(self, job: Job, call: Callable[[], T | None]) -> T | Outcome:
        """Repeat `call` until it returns a result, retrying errors as long as patience lasts."""
        responded_at, failures = time.monotonic(), 0
        while True:
            try:
                found = call()
            except ReceiverApiError as error:
                if error.status == HTTPStatus.TOO_MANY_REQUESTS:
                    self._concurrency.halve()
                is_over = time.monotonic() - responded_at >= self._patience_seconds
                if not is_transient(error) and (is_over or not _may_be_resolved(error)):
                    return self._refuse(job, error)
                if is_over:
                    self._stop(Halt("unreachable", error.message))
                    return Outcome(
                        job.row, job.key, UNFINISHED, error_code=error.code, error_message=error.message
                    )
                if failures >= _FAILURES_TO_EXPLAIN:
                    self._explain_wait(job, error.code, error.message)
                self._stopping.wait(pause_seconds(failures))
                failures += 1
                continue
            if found is not None:
                return found
            responded_at, failures = time.monotonic(), 0

    def _explain_wait(self, job: Job, code: str, message: str) -> None:
        with self._lock:
            if code in self._notified:
                return
            self._notified.add(code)
        self._notify(f"Row {job.row} waits, and others may: {message} ({code}).")

    def _refuse(self, job: Job, error: ReceiverApiError) -> Outcome:
        """Return the outcome of a refused row; halt the batch if every row would be refused."""
        if error.status == HTTPStatus.PAYMENT_REQUIRED or error.code in _HALTING:
            self._stop(Halt(error.code, error.message))
        state = UNKNOWN if error.code == _UNKNOWN_OUTCOME else REFUSED
        fields = (f"{field}: {reason}" for field, reason in error.fields)
        message = "; ".join([error.message, *fields])
        if error.code in _CONFLICTS:
            advice = "give it another key, or the batch another name"
            message += f"; the row was started before with other inputs: {advice}"
        if error.request_id:
            message += f" ({error.request_id})"
        return Outcome(job.row, job.key, state, error_code=error.code, error_message=message)

    def _record(self, position: int, outcome: Outcome) -> None:
        with self._lock:
            self._active.pop(position, None)
            if self._stopping.is_set():
                return  # interrupted: the row has an outcome already, and the spool may be closed
            self._outcomes.store(position, outcome)
            now = self._progress
            self._progress = replace(
                now,
                done=now.done + 1,
                succeeded=now.succeeded + outcome.succeeded,
                failed=now.failed + (not outcome.succeeded),
                cost=now.cost + (outcome.cost or 0.0),
            )

    def _stop(self, halt: Halt) -> None:
        with self._lock:
            self.halt = self.halt or halt

    def _abandon(self) -> None:
        """Give every row an outcome after an interruption, and leave the threads behind."""
        self._stop(Halt("interrupted", "interrupted"))
        with self._lock:
            active = dict(self._active)
        self._next_job()
        with self._lock:
            self._stopping.set()
            for position, outcome in active.items():
                if position in self._active:
                    self._outcomes.store(position, outcome)


def _may_be_resolved(error: ReceiverApiError) -> bool:
    """Return whether an unknown outcome may soon be known.

    The run's own callback often resolves it, when the run has ended. It cannot if the key was used
    by a start that the ledger does not have.
    """
    reason = (error.start or {}).get("error") or {}
    return error.code == _UNKNOWN_OUTCOME and reason.get("code") != _USED_BEFORE
