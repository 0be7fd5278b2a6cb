"""Carries jobs out: worker threads start a row, wait until its run is settled and handled, and keep the outcome.

Nothing here needs to survive a crash: the service knows every start by its key, so the same jobs again start nothing twice.
"""

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar

from receiver.cli.batch.concurrency import ConcurrencyLimit
from receiver.cli.batch.results import NOT_STARTED, REFUSED, UNFINISHED, UNKNOWN, Outcome, Spool, outcome_of
from receiver.cli.batch.table import RowProblem
from receiver.cli.batch.validation import Job
from receiver.client.messages import RunView, StartView
from receiver.errors import ReceiverApiError

T = TypeVar("T")
Jobs = Iterable[Job | tuple[int, RowProblem]]
"""Rows to start; a row that is wrong only now comes with its position."""

_START_SECONDS = 8.0
"""How long one call waits for FLORA's answer to a start; longer than FLORA's usual 5 s of `retry-after`."""
_WAIT_SECONDS = 30.0
_PAUSES = (0.2, 0.5, 1.0, 2.0)
_HALTING = frozenset({"insufficient_credits", "paid_plan_required", "unauthorized", "flora_unauthorized"})
"""Refusals that every further row would get as well."""
_CREDITS, _LIMITED, _BAD_GATEWAY = 402, 429, 502
_UNKNOWN_OUTCOME = "unknown_outcome"
_CONFLICTS = frozenset({"idempotency_conflict", "idempotency_key_reused"})


class Receiver(Protocol):
    """What a batch needs of `ReceiverClient`."""

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
    """Why no further row is started; `code` is FLORA's, `unreachable` or `interrupted`."""

    code: str
    message: str


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a batch stands: rows by what became of them, rows in hand, and how many may be."""

    done: int
    succeeded: int
    failed: int
    in_hand: int
    allowed: int
    cost: float


def passes(error: ReceiverApiError) -> bool:
    """Return whether the same call may work later: the service restarts, its database is busy, FLORA is not there."""
    if error.status == _BAD_GATEWAY:  # what FLORA refuses in a way that no caller of ours can help, or a proxy's own
        return error.code == "not_a_receiver"
    return error.status is None or error.status == _LIMITED or error.status >= 500


def patiently(ask: Callable[[], T], *, seconds: float) -> T:
    """Ask until there is an answer, for as long as patience lasts; then raise the last ReceiverApiError."""
    until, failed = time.monotonic() + seconds, 0
    while True:
        try:
            return ask()
        except ReceiverApiError as error:
            if not passes(error) or time.monotonic() >= until:
                raise
        time.sleep(_PAUSES[min(failed, len(_PAUSES) - 1)])
        failed += 1


class Runner:
    """One batch under way. `connect` opens a client for one thread."""

    def __init__(
        self,
        connect: Callable[[], AbstractContextManager[Receiver]],
        outcomes: Spool,
        *,
        technique_id: str,
        workspace_id: str | None = None,
        parallel: int = 8,
        patience_seconds: float = 120.0,
    ) -> None:
        self._connect = connect
        self._outcomes = outcomes
        self._technique_id = technique_id
        self._workspace_id = workspace_id
        self._parallel = parallel
        self._patience_seconds = patience_seconds
        self._room = ConcurrencyLimit(parallel)
        self._jobs: Iterator[Job | tuple[int, RowProblem]] = iter(())
        self._feeding = threading.Lock()
        self._lock = threading.Lock()
        self._hand: dict[int, Outcome] = {}
        self._progress = Progress(0, 0, 0, 0, parallel, 0.0)
        self._stopping = threading.Event()
        self._broken: BaseException | None = None
        self.halt: Halt | None = None

    @property
    def progress(self) -> Progress:
        with self._lock:
            return replace(self._progress, in_hand=len(self._hand), allowed=self._room.allowed)

    def run(self, jobs: Jobs, watch: Callable[[Progress], None]) -> None:
        """Carry every job out, telling `watch` ten times a second how it stands. `halt` says if rows were left out.

        KeyboardInterrupt is passed on at once, after every row without an outcome got one: runs go on without us.
        """
        self._jobs = iter(jobs)
        # Daemons, since a thread in the middle of a long wait must not keep an interrupted command from ending.
        threads = [
            threading.Thread(target=self._work, name=f"batch-{number}", daemon=True) for number in range(self._parallel)
        ]
        try:
            for thread in threads:
                thread.start()
            for thread in threads:
                while thread.is_alive():
                    thread.join(0.1)
                    watch(self.progress)
        except BaseException:
            self._leave()
            raise
        if self._broken is not None:
            raise self._broken
        watch(self.progress)

    def settle_costs(self, receiver: Receiver, *, seconds: float, watch: Callable[[int], None]) -> None:
        """Read runs again whose cost was not final, until it is or the time is over; `watch` hears how many are left."""
        until = time.monotonic() + seconds
        waiting = [place for place, each in self._outcomes.items() if each.run_id is not None and not each.cost_final]
        while waiting and time.monotonic() < until:
            watch(len(waiting))
            waiting = [place for place in waiting if not self._read_cost(receiver, place)]
            if waiting:
                time.sleep(min(1.0, max(0.0, until - time.monotonic())))

    def _read_cost(self, receiver: Receiver, position: int) -> bool:
        outcome = self._outcomes.get(position)
        try:
            run = receiver.run(outcome.run_id or "")
        except ReceiverApiError:
            return False
        self._outcomes.put(
            position,
            replace(outcome, cost=run.charged_cost, cost_final=run.cost_final, verdict=run.verdict or outcome.verdict),
        )
        return run.cost_final

    def _work(self) -> None:
        try:
            with self._connect() as receiver:
                while True:
                    self._room.enter()
                    try:
                        job = self._next()
                        if job is None:
                            return
                        self._record(job.position, self._carry(receiver, job))
                    finally:
                        self._room.leave()
        except BaseException as error:
            self._broken = self._broken or error
            self._stop(Halt("broken", f"{type(error).__name__}: {error}"))

    def _next(self) -> Job | None:
        """Take the next job; once halted, note that each of the others was not started."""
        with self._feeding:
            for job in self._jobs:
                if not isinstance(job, Job):
                    position, problem = job
                    changed = f"the file has changed since it was checked: {problem}"
                    self._record(
                        position,
                        Outcome(problem.row or 0, "", REFUSED, error_code="bad_row", error_message=changed),
                    )
                elif self.halt is not None:
                    self._record(job.position, Outcome(job.row, job.key, NOT_STARTED))
                else:
                    with self._lock:
                        self._hand[job.position] = Outcome(job.row, job.key, UNFINISHED)
                    return job
        return None

    def _carry(self, receiver: Receiver, job: Job) -> Outcome:
        """See one row through, whatever becomes of it."""
        started = self._patiently(job, lambda: self._start(receiver, job))
        if isinstance(started, Outcome):
            return started
        with self._lock:
            self._hand[job.position] = Outcome(job.row, job.key, UNFINISHED, run_id=started)
        run = self._patiently(job, lambda: self._wait(receiver, started))
        if isinstance(run, Outcome):
            return replace(run, run_id=started)
        return outcome_of(run, row=job.row, key=job.key)

    def _start(self, receiver: Receiver, job: Job) -> str | None:
        """Ask for a row's run once; None while FLORA has not answered."""
        start = receiver.start(
            self._technique_id,
            job.inputs,
            idempotency_key=job.idempotency_key,
            metadata=job.metadata,
            workspace_id=self._workspace_id,
            wait_seconds=_START_SECONDS,
        )
        if start.run_id is not None:
            self._room.went_well()
        elif start.error is not None and start.error.status == _LIMITED:
            self._room.limited()
        return start.run_id

    def _wait(self, receiver: Receiver, run_id: str) -> RunView | None:
        run = receiver.wait(run_id, timeout_seconds=min(_WAIT_SECONDS, max(1.0, self._patience_seconds)))
        return run if run.finished else None

    def _patiently(self, job: Job, ask: Callable[[], T | None]) -> T | Outcome:
        """Ask until there is an answer, through restarts of the service as far as patience goes."""
        answered_at, failed = time.monotonic(), 0
        while True:
            try:
                found = ask()
            except ReceiverApiError as error:
                if error.status == _LIMITED:
                    self._room.limited()
                # An unknown outcome is often settled by the run's own callback, a run's length later.
                over = time.monotonic() - answered_at >= self._patience_seconds
                if not passes(error) and (over or error.code != _UNKNOWN_OUTCOME):
                    return self._refused(job, error)
                if over:
                    self._stop(Halt("unreachable", error.message))
                    return Outcome(job.row, job.key, UNFINISHED, error_code=error.code, error_message=error.message)
                self._stopping.wait(_PAUSES[min(failed, len(_PAUSES) - 1)])
                failed += 1
                continue
            if found is not None:
                return found
            answered_at, failed = time.monotonic(), 0

    def _refused(self, job: Job, error: ReceiverApiError) -> Outcome:
        if error.status == _CREDITS or error.code in _HALTING:
            self._stop(Halt(error.code, error.message))
        state = UNKNOWN if error.code == _UNKNOWN_OUTCOME else REFUSED
        message = "; ".join([error.message, *(f"{field}: {reason}" for field, reason in error.fields)])
        if error.code in _CONFLICTS:
            message += "; the row was started before with other inputs: give it another key, or the batch another name"
        if error.request_id:
            message += f" ({error.request_id})"
        return Outcome(job.row, job.key, state, error_code=error.code, error_message=message)

    def _record(self, position: int, outcome: Outcome) -> None:
        with self._lock:
            self._hand.pop(position, None)
            if self._stopping.is_set():
                return  # interrupted: the row has its outcome already, and the spool may be closed
            self._outcomes.put(position, outcome)
            now = self._progress
            self._progress = replace(
                now,
                done=now.done + 1,
                succeeded=now.succeeded + outcome.ok,
                failed=now.failed + (not outcome.ok),
                cost=now.cost + (outcome.cost or 0.0),
            )

    def _stop(self, halt: Halt) -> None:
        with self._lock:
            self.halt = self.halt or halt

    def _leave(self) -> None:
        """Interrupted: give every row an outcome as it stands, and let the workers be."""
        self._stop(Halt("interrupted", "interrupted"))
        with self._lock:
            in_hand = dict(self._hand)
        self._next()
        with self._lock:
            self._stopping.set()
            for position, outcome in in_hand.items():
                if position in self._hand:
                    self._outcomes.put(position, outcome)
