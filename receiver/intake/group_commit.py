"""Group commit: what arrives while one transaction commits shares the next one. Called by intake alone.

One bad entry spoils nothing but itself, nobody waits for longer than FLORA does, and what came of a batch is told after
its commit: to the loops, to the metrics, to the log.
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
from receiver.intake.recorder import Entry, Fold, Recorded, Recorder
from receiver.model import Delivery, DispatchState, Report
from receiver.store import Database
from receiver.store.changes import Change, Signals
from receiver.telemetry import Metrics

log = structlog.get_logger("receiver.intake")

_BATCH = 256
"""Entries that share one commit, at most."""
_MOST = 10_000
"""Entries that may wait: more than comes within anybody's patience. While a database hangs, memory must not run out."""
_PATIENCE_SECONDS = 8.0
"""FLORA waits 10 s for an answer: better a 503 that it hears than a 200 that it does not."""
_LOOK_SECONDS = 0.25
"""How often it is looked for entries whose time is up: a timer for each would cost more than all of its verifying."""
_SOON = timedelta(seconds=5)
_LOGGED = 5
"""Run ids named in one log line, at most."""


@dataclass(slots=True)
class _Waiting(Entry):
    """An entry whose sender waits until it is durable."""

    done: asyncio.Future[Recorded]
    since: float
    """When it came, on the loop's clock."""


class GroupCommit:
    """The queue before the ledger. `enter` returns once an entry is durable; `close` waits for those that have come."""

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
        self._in_hand: Sequence[_Waiting] = ()
        """The batch that is being committed."""
        self._committing: asyncio.Task[None] | None = None

    async def enter(
        self, report: Report | None, delivery: Delivery | None = None, start: str | None = None
    ) -> Recorded:
        """Commit one entry, with whatever else has come. Raises StoreUnavailableError."""
        if len(self._waiting) >= _MOST:
            raise StoreUnavailableError("too much is waiting to be committed")
        loop = asyncio.get_running_loop()
        entry = _Waiting(report, delivery, start, loop.create_future(), loop.time())
        self._waiting.append(entry)
        if self._committing is None:
            self._committing = asyncio.create_task(self._commit_all(), name="intake.commit")
        return await entry.done  # whoever waits may be cancelled; the entry is committed all the same

    async def close(self) -> None:
        """Wait until everything that has arrived is committed."""
        while self._committing is not None:
            await asyncio.wait({self._committing})

    async def _commit_all(self) -> None:
        watch = asyncio.create_task(self._watch(), name="intake.watch")
        try:
            while self._waiting:
                self._in_hand = [self._waiting.popleft() for _ in range(min(len(self._waiting), _BATCH))]
                await self._commit(self._in_hand)
        finally:
            watch.cancel()
            self._in_hand = ()
            self._committing = None

    async def _watch(self) -> None:
        """Tell those who have waited for too long; what they brought may still be committed."""
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(min(_LOOK_SECONDS, _PATIENCE_SECONDS))
            for entry in (*self._in_hand, *self._waiting):
                if loop.time() - entry.since >= _PATIENCE_SECONDS:
                    _fail(entry, StoreUnavailableError(f"not committed within {_PATIENCE_SECONDS:g} s"))

    async def _commit(self, batch: Sequence[_Waiting], tries: int = 3) -> None:
        """Commit a batch; if one entry spoils it, commit one by one, so that only the bad one fails."""
        try:
            recorded, fold = await self._database.write(lambda tx: self._recorder.record(tx, batch))
        except StoreUnavailableError as error:
            log.error("intake.unavailable", reason=str(error), entries=len(batch))
            for entry in batch:
                _fail(entry, error)
        except Exception as error:
            if len(batch) > 1:
                for entry in batch:
                    await self._commit([entry])
            elif isinstance(error, IntegrityError) and tries > 1:
                # Another door has just committed the same delivery, run or start: decided again, we know of it.
                await self._commit(batch, tries - 1)
            else:
                log.exception("intake.entry_failed")
                _fail(batch[0], StoreUnavailableError(f"this entry cannot be committed: {type(error).__name__}"))
        else:
            for entry, result in zip(batch, recorded, strict=True):
                if not entry.done.done():
                    entry.done.set_result(result)
            self._tell(batch, recorded, fold)

    def _tell(self, batch: Sequence[_Waiting], recorded: Sequence[Recorded], fold: Fold) -> None:
        """After the commit: wake the loops, count, and write one line for the batch and one for each event."""
        now = self._clock()
        soon = now + _SOON  # the poller may be about to sleep for longer than that
        new_runs, changed_runs = fold.new(), fold.changed()
        if any(run.next_poll_at is not None and run.next_poll_at <= soon for run in (*new_runs, *changed_runs)):
            self._signals.poll.set()
        if any(dispatch.state is DispatchState.READY for dispatch in fold.dispatches):
            self._signals.dispatch.set()
        callbacks = [(entry, result) for entry, result in zip(batch, recorded, strict=True) if entry.delivery]
        new = [entry.delivery.run_id for entry, result in callbacks if entry.delivery and result.new_delivery]
        if callbacks:
            log.info(
                "callbacks.committed",
                new=len(new),
                duplicates=len(callbacks) - len(new),
                run_ids=[each for each in new if each][:_LOGGED],
            )
        self._metrics.observe_commit(len(batch))
        if self._signals.changes:
            for run in (*new_runs, *changed_runs):
                detail = " ".join(fold.happened.get(run.run_id, ()))
                self._signals.changes.publish(Change("run", run.run_id, run.state.value, detail))
        for run_id, run in fold.now_are.items():
            if run.verdict is not None:
                before = fold.before.get(run_id)
                self._metrics.count_verdict(before.verdict if before else None, run.verdict)
        for result in recorded:
            if isinstance(result.decision, Changed) and result.decision.events:
                _tell_events(result.decision, self._metrics)


def _tell_events(decision: Changed, metrics: Metrics) -> None:
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
        entry.done.exception()  # its waiter may have left: then nobody else looks
