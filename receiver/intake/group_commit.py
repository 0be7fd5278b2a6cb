"""Group commit: entries that arrive during a commit share the next one. Called by `callbacks`.

An entry that cannot be committed fails alone, and no caller waits longer than FLORA does. The
workers are woken, and metrics and logs written, after the commit.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

import structlog
from sqlalchemy.exc import IntegrityError

from receiver.decide import Changed
from receiver.errors import StoreUnavailableError
from receiver.intake.recorder import BatchState, CommitResult, Entry, Recorder
from receiver.model import Delivery, DispatchState, Report
from receiver.store import Database
from receiver.store.changes import Change, Signals
from receiver.telemetry import Metrics

log = structlog.get_logger("receiver.intake")

_MAX_BATCH = 256
"""Entries of one commit."""
_MAX_WAITING = 10_000
"""Entries that may wait for a commit: while the database hangs, memory must not run out."""
_TIMEOUT_SECONDS = 8.0
"""FLORA waits 10 s for a response: a 503 that it receives is better than a 200 that it does not."""
_WATCH_SECONDS = 0.25
"""How often timeouts are looked for. A timer per entry would cost more than verifying its
callback."""
_SOON = timedelta(seconds=5)
"""Reads due within this time wake the poller, which may be about to sleep for longer."""
_MAX_LOGGED = 5
"""Run ids in one log line."""


@dataclass(slots=True)
class _Waiting(Entry):
    """An entry whose caller waits until it is durable."""

    done: asyncio.Future[CommitResult]
    since: float
    """When it arrived, by the event loop's clock."""


class GroupCommit:
    """The queue in front of the ledger. `commit` returns once an entry is durable."""

    def __init__(
        self,
        database: Database,
        recorder: Recorder,
        *,
        signals: Signals,
        metrics: Metrics,
        clock: Callable[[], datetime],
    ) -> None:
        self._database = database
        self._recorder = recorder
        self._signals = signals
        self._metrics = metrics
        self._clock = clock
        self._waiting: deque[_Waiting] = deque()
        self._batch: Sequence[_Waiting] = ()
        """The entries that are being committed."""
        self._committing: asyncio.Task[None] | None = None

    async def commit(
        self, report: Report | None, delivery: Delivery | None = None, start: str | None = None
    ) -> CommitResult:
        """Commit an entry together with those that wait. Raises StoreUnavailableError."""
        if len(self._waiting) >= _MAX_WAITING:
            raise StoreUnavailableError("too many entries are waiting to be committed")
        loop = asyncio.get_running_loop()
        entry = _Waiting(report, delivery, start, loop.create_future(), loop.time())
        self._waiting.append(entry)
        if self._committing is None:
            self._committing = asyncio.create_task(self._commit_all(), name="intake.commit")
        return await entry.done  # if the caller is cancelled, the entry is committed all the same

    async def close(self) -> None:
        """Wait until everything that has arrived is committed."""
        while self._committing is not None:
            await asyncio.wait({self._committing})

    async def _commit_all(self) -> None:
        watch = asyncio.create_task(self._watch(), name="intake.watch")
        try:
            while self._waiting:
                size = min(len(self._waiting), _MAX_BATCH)
                self._batch = [self._waiting.popleft() for _ in range(size)]
                await self._commit_batch(self._batch)
        finally:
            watch.cancel()
            self._batch = ()
            self._committing = None

    async def _watch(self) -> None:
        """Fail entries that have waited for too long; they may still be committed."""
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(min(_WATCH_SECONDS, _TIMEOUT_SECONDS))
            for entry in (*self._batch, *self._waiting):
                if loop.time() - entry.since >= _TIMEOUT_SECONDS:
                    _fail(entry, StoreUnavailableError(f"not committed within {_TIMEOUT_SECONDS:g} s"))

    async def _commit_batch(self, batch: Sequence[_Waiting], tries: int = 3) -> None:
        """Commit a batch; if that fails because of an entry, commit one by one."""
        try:
            results, state = await self._database.write(lambda tx: self._recorder.record(tx, batch))
        except StoreUnavailableError as error:
            log.error("intake.unavailable", reason=str(error), entries=len(batch))
            for entry in batch:
                _fail(entry, error)
        except Exception as error:
            if len(batch) > 1:
                for entry in batch:
                    await self._commit_batch([entry])
            elif isinstance(error, IntegrityError) and tries > 1:
                # Another process has just committed the same delivery, run or start: decide again,
                # knowing of it.
                await self._commit_batch(batch, tries - 1)
            else:
                log.exception("intake.entry_failed")
                reason = f"this entry cannot be committed: {type(error).__name__}"
                _fail(batch[0], StoreUnavailableError(reason))
        else:
            for entry, result in zip(batch, results, strict=True):
                if not entry.done.done():
                    entry.done.set_result(result)
            self._wake_workers(state)
            self._publish_changes(state)
            self._log_callbacks(batch, results)
            self._count(batch, state)
            for result in results:
                if isinstance(result.decision, Changed) and result.decision.events:
                    _log_events(result.decision, self._metrics)

    def _wake_workers(self, state: BatchState) -> None:
        soon = self._clock() + _SOON
        changed = (*state.new_runs(), *state.changed_runs())
        if any(run.next_poll_at is not None and run.next_poll_at <= soon for run in changed):
            self._signals.poll.set()
        if any(dispatch.state is DispatchState.READY for dispatch in state.dispatches):
            self._signals.dispatch.set()

    def _publish_changes(self, state: BatchState) -> None:
        if not self._signals.changes:
            return
        for run in (*state.new_runs(), *state.changed_runs()):
            detail = " ".join(state.events.get(run.run_id, ()))
            self._signals.changes.publish(Change("run", run.run_id, run.state.value, detail))

    def _log_callbacks(self, batch: Sequence[_Waiting], results: Sequence[CommitResult]) -> None:
        """Write one line for all callbacks of a batch."""
        callbacks = [
            (entry.delivery, result.new_delivery)
            for entry, result in zip(batch, results, strict=True)
            if entry.delivery
        ]
        if not callbacks:
            return
        new = [delivery.run_id for delivery, is_new in callbacks if is_new]
        log.info(
            "callbacks.committed",
            new=len(new),
            duplicates=len(callbacks) - len(new),
            run_ids=[run_id for run_id in new if run_id][:_MAX_LOGGED],
        )

    def _count(self, batch: Sequence[_Waiting], state: BatchState) -> None:
        self._metrics.observe_commit(len(batch))
        for run_id, run in state.current.items():
            if run.verdict is not None:
                before = state.before.get(run_id)
                self._metrics.count_verdict(before.verdict if before else None, run.verdict)


def _log_events(decision: Changed, metrics: Metrics) -> None:
    """Write and count one line for each event of a run."""
    run = decision.run
    for event in decision.events:
        write = log.info if event.value in {"settled", "cost_final"} else log.error
        write(
            f"run.{event}",
            run_id=run.run_id,
            state=run.state.value,
            verdict=run.verdict and run.verdict.value,
            outputs=len(decision.outputs),
            error_code=run.error_code,
            lost_reason=run.lost_reason and run.lost_reason.value,
            charged_cost=run.charged_cost,
        )
        metrics.count_event(event, run)


def _fail(entry: _Waiting, error: Exception) -> None:
    if not entry.done.done():
        entry.done.set_exception(error)
        entry.done.exception()  # retrieved: its caller may be gone
