"""Calls handlers: leases the dispatches that are due, runs them, stores their results.

Run by the service. A lease is renewed for as long as its attempt runs. Once a handler has returned,
its effect is applied: from then on the attempt is never cancelled, and its result is stored however
long that takes.
"""

import asyncio
import random
import secrets
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any

import structlog

from receiver.decide import Outcome, conclude, fill_order, free_slots, settle
from receiver.errors import StoreUnavailableError
from receiver.handler import Done, Retry
from receiver.model import Dispatch, DispatchState, Event, Lane, ReadRequested, Report, Subscription
from receiver.net.download import Downloader
from receiver.plugins.attempt import (
    AttemptContext,
    Registration,
    call_handler,
    to_dispatch_state,
    to_settled_run,
)
from receiver.plugins.progress import TransferProgress
from receiver.store import Database, ledger, queue
from receiver.store.changes import Change, Signals
from receiver.store.queue import Leased
from receiver.store.rows import from_ms
from receiver.telemetry import Metrics
from receiver.workers.loop import idle_seconds, run_loop

log = structlog.get_logger("receiver.dispatcher")

_RETRY_WRITE_SECONDS = 1.0


@dataclass(slots=True)
class _Attempt:
    """One running attempt."""

    leased: Leased
    registration: Registration
    token: str
    progress: TransferProgress
    task: asyncio.Task[None] | None = None
    has_returned: bool = False
    """The handler's effect is applied: the attempt must not be cancelled any more."""


class Dispatcher:
    """Runs the dispatches of all handlers, each within its own limits.

    A handler that hangs delays no other.

    With `takeover`, dispatches whose lease has expired are leased again; without it (SQLite) a
    lease lasts until the process ends, whatever the clock does.
    """

    def __init__(
        self,
        database: Database,
        registrations: Sequence[Registration],
        subscriptions: Sequence[Subscription],
        *,
        downloader: Downloader,
        signals: Signals,
        metrics: Metrics,
        apply: Callable[[Report], Awaitable[object]],
        lease: timedelta,
        takeover: bool = False,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
        jitter: Callable[[], float] = random.random,
    ) -> None:
        self._database = database
        self._registrations = {registration.name: registration for registration in registrations}
        self._subscriptions = tuple(subscriptions)
        self._downloader = downloader
        self._signals = signals
        self._metrics = metrics
        self._apply = apply
        self._lease = lease
        self._takeover = takeover
        self._idle_seconds = idle_seconds(shared=database.shared)
        self._clock = clock
        self._jitter = jitter
        self._running: dict[int, _Attempt] = {}

    async def run(self, stopping: asyncio.Event) -> None:
        """Tick until `stopping` is set; then stop the running attempts and release their leases."""
        renewing = asyncio.create_task(self._renew_forever(), name="dispatch.renew")
        try:
            await run_loop(
                "dispatcher",
                lambda: self.tick(self._clock()),
                stopping,
                wake=self._signals.dispatch,
                retry_seconds=self._idle_seconds,
            )
        finally:
            renewing.cancel()
        await self.release()

    async def tick(self, now: datetime) -> float:
        """Start due dispatches where a slot is free; return the seconds until the next tick."""
        names = tuple(self._registrations)
        busy = {name: Counter[Lane]() for name in names}
        for attempt in self._running.values():
            busy[attempt.registration.name][attempt.progress.lane] += 1
        free = [each for each in self._registrations.values() if busy[each.name].total() < each.concurrency]

        def read_due(tx: Any) -> tuple[dict[str, frozenset[Lane]], int | None]:
            expired_by = self._expired_by(tx, now)
            due = {
                each.name: queue.due_lanes(tx, each.name, now=now, expired_by=expired_by) for each in free
            }
            return due, queue.next_dispatch_due_ms(tx, names, after=now)

        # One read for all handlers: it is repeated after each attempt of any of them.
        due, next_ms = await self._database.read(read_due)
        for registration in free:
            await self._claim(registration, busy[registration.name], due[registration.name], now)
        until = (
            self._idle_seconds if next_ms is None else (from_ms(next_ms) - self._clock()).total_seconds()
        )
        return min(self._idle_seconds, max(until, 0.0))

    async def drain(self) -> None:
        """Wait until no attempt is running."""
        while self._running:
            await asyncio.wait({attempt.task for attempt in self._running.values() if attempt.task})
            await asyncio.sleep(0)

    async def release(self) -> None:
        """Cancel every attempt and release its lease, without counting the attempt.

        Results that are being stored are waited for: released while another thread commits it, a
        dispatch would be done again.
        """
        attempts = list(self._running.values())
        for attempt in attempts:
            if attempt.task and not attempt.has_returned:
                attempt.task.cancel()
        try:
            await self.drain()
        finally:  # the wait itself may be cancelled
            for attempt in self._running.values():
                if attempt.task:
                    attempt.task.cancel()
        for token in {attempt.token for attempt in attempts}:
            seqs = [attempt.leased.seq for attempt in attempts if attempt.token == token]
            try:
                await self._database.write(partial(queue.release, seqs=seqs, token=token))
            except StoreUnavailableError as error:
                log.warning("dispatch.not_released", reason=str(error))

    async def renew(self) -> None:
        """Extend the leases of all running attempts; cancel those that were taken over."""

        def job(tx: Any, seqs: Sequence[int], token: str) -> frozenset[int]:
            until = self._database.now(tx, self._clock()) + self._lease
            return queue.renew(tx, seqs, token=token, until=until)

        for token in {attempt.token for attempt in self._running.values()}:
            seqs = [seq for seq, attempt in self._running.items() if attempt.token == token]
            held = await self._database.write(partial(job, seqs=seqs, token=token))
            for seq in set(seqs) - held:
                attempt = self._running.get(seq)
                # It may have ended by now, or even started again: then the lost lease is not its
                # own.
                if attempt and attempt.task and attempt.token == token and not attempt.has_returned:
                    log.warning("dispatch.taken_over", dispatch=attempt.leased.dispatch.idempotency_key)
                    attempt.task.cancel()

    async def _renew_forever(self) -> None:
        while True:
            await asyncio.sleep(self._lease.total_seconds() / 3)
            try:
                await self.renew()
            except StoreUnavailableError as error:
                log.error("dispatch.not_renewed", reason=str(error))

    def _expired_by(self, tx: Any, now: datetime) -> datetime | None:
        """Return when a lease must have expired to be taken over; None if none may be."""
        return self._database.now(tx, now) if self._takeover else None

    async def _claim(
        self, registration: Registration, running: Counter[Lane], due: frozenset[Lane], now: datetime
    ) -> None:
        """Lease dispatches of one handler for its free slots, and start an attempt of each."""
        name, limit = registration.name, registration.concurrency
        turns = [turn for turn in fill_order(limit) if not due.isdisjoint(turn.lanes)]
        if not any(free_slots(turn, running, limit) for turn in turns):
            return  # the common case costs no write
        token = secrets.token_hex(16)

        def job(tx: Any) -> tuple[list[Leased], tuple[Dispatch, ...]]:
            expired_by = self._expired_by(tx, now)
            exhausted = queue.mark_exhausted(
                tx, name, max_attempts=registration.max_attempts, now=now, expired_by=expired_by
            )
            for dispatch in exhausted:
                self._alert(tx, dispatch.run_id, dispatch.event, now)
            claimed: list[Leased] = []
            for turn in turns:
                busy = running + Counter(leased.dispatch.lane for leased in claimed)
                if (slots := free_slots(turn, busy, limit)) == 0:
                    continue
                claimed += queue.claim(
                    tx,
                    name,
                    lanes=turn.lanes,
                    limit=slots,
                    max_attempts=registration.max_attempts,
                    token=token,
                    now=now,
                    until=(expired_by or now) + self._lease,
                    expired_by=expired_by,
                )
            return claimed, exhausted

        claimed, exhausted = await self._database.write(job)
        if exhausted:
            self._report_exhausted(name, exhausted)
        for leased in claimed:
            self._start_attempt(leased, registration, token)

    def _report_exhausted(self, name: str, exhausted: Sequence[Dispatch]) -> None:
        log.error("dispatch.dead", handler=name, reason="each worker that tried it was killed")
        for dispatch in exhausted:
            self._signals.changes.publish(Change("dispatch", dispatch.run_id, dispatch.state.value, name))
        self._signals.dispatch.set()

    def _start_attempt(self, leased: Leased, registration: Registration, token: str) -> None:
        progress = TransferProgress(leased.dispatch.event, leased.outputs, leased.artifacts)
        attempt = _Attempt(leased, registration, token, progress)
        self._running[leased.seq] = attempt
        name = f"dispatch {leased.dispatch.idempotency_key}"
        attempt.task = asyncio.create_task(self._attempt(attempt), name=name)
        attempt.task.add_done_callback(partial(self._finish, leased.seq))

    def _finish(self, seq: int, _: asyncio.Task[None]) -> None:
        self._running.pop(seq, None)
        self._signals.dispatch.set()

    async def _attempt(self, attempt: _Attempt) -> None:
        """Call the handler once and store its result."""
        leased, registration = attempt.leased, attempt.registration
        started_at = self._clock()
        deadline_at = started_at + timedelta(seconds=registration.timeout_seconds)
        context = AttemptContext(
            self._database,
            self._downloader,
            leased,
            registration,
            deadline_at,
            self._clock,
            attempt.progress,
        )
        run = to_settled_run(leased.run, leased.outputs)
        result = await call_handler(registration.handler, run, context, registration.timeout_seconds)
        attempt.has_returned = True
        now = self._clock()
        outcome = conclude(
            to_dispatch_state(result),
            leased.dispatch.attempts,
            registration.max_attempts,
            backoff=registration.backoff,
            after_seconds=result.after_seconds if isinstance(result, Retry) else None,
            now=now,
            jitter=self._jitter(),
        )
        reason = None if isinstance(result, Done) else result.reason

        def job(tx: Any) -> bool:
            written = queue.finish(
                tx,
                leased,
                token=attempt.token,
                state=outcome.state,
                due_at=outcome.due_at,
                error=reason,
                result=result.result if isinstance(result, Done) else None,
                lane=None if isinstance(result, Done) else attempt.progress.lane,
                now=now,
            )
            if written and outcome.state is DispatchState.DEAD:
                self._alert(tx, leased.run.run_id, leased.dispatch.event, now)
            # Not written now: an earlier try may have been committed, and only its response lost.
            return written or queue.is_attempt_recorded(tx, leased)

        written = await self._store(leased, job)
        self._report(leased, outcome, reason, written=written, seconds=(now - started_at).total_seconds())
        if isinstance(result, Retry) and result.reread:
            await self._reread(leased.run.run_id, now)

    async def _reread(self, run_id: str, now: datetime) -> None:
        """Have a run read again, for the URLs that its outputs have now."""
        try:
            await self._apply(ReadRequested(run_id, now))
        except StoreUnavailableError as error:
            # The next attempt requests it again.
            log.warning("dispatch.not_reread", run_id=run_id, reason=str(error))

    async def _store(self, leased: Leased, job: Callable[[Any], bool]) -> bool:
        """Store a result as soon as the database accepts it.

        The effect is applied, and the lease is still held.
        """
        while True:
            try:
                return await self._database.write(job)
            except StoreUnavailableError as error:
                log.error(
                    "dispatch.not_written", dispatch=leased.dispatch.idempotency_key, reason=str(error)
                )
                await asyncio.sleep(_RETRY_WRITE_SECONDS)

    def _alert(self, tx: Any, run_id: str, event: Event, now: datetime) -> None:
        """Add dispatches for the handlers of `dead`; a dead one of these adds no more."""
        if event is Event.DEAD or not any(Event.DEAD in row.on for row in self._subscriptions):
            return
        # Locked, or two dead dispatches at the same time would get the same round, and one alert
        # would be lost.
        run = ledger.runs_by_id(tx, [run_id], for_update=True)[run_id]
        outputs = ledger.outputs_of_runs(tx, [run_id])[run_id]
        round_ = queue.next_round(tx, run_id, Event.DEAD)
        rows = settle(run, outputs, [Event.DEAD], self._subscriptions, now=now, round_=round_)
        ledger.add_dispatches(tx, rows)

    def _report(
        self, leased: Leased, outcome: Outcome, reason: str | None, *, written: bool, seconds: float
    ) -> None:
        name = leased.dispatch.handler
        state = outcome.state if written else None
        if state is not None:
            self._signals.changes.publish(Change("dispatch", leased.run.run_id, state.value, name))
        self._metrics.observe_dispatch(name, state.value if state else "stale", seconds)
        line = log.bind(
            run_id=leased.run.run_id, handler=name, event_name=leased.dispatch.event.value,
            attempt=leased.dispatch.last_attempt, seconds=round(seconds, 3),
        )  # fmt: skip
        if state is None:
            line.warning("dispatch.stale")
        elif state is DispatchState.DONE:
            line.info("dispatch.done")
        elif state is DispatchState.DEAD:
            line.error("dispatch.dead", reason=reason)
        else:
            line.warning(
                "dispatch.retry", reason=reason, due_at=outcome.due_at and outcome.due_at.isoformat()
            )
