"""The one door of the ledger: callbacks come in by `accept`, everything else that tells of a run by `learn`.

Both become entries of a batch; a batch is decided about by the same pure function and committed once. While it commits,
the next one gathers. Called by web, poller, janitor, starter.
"""

import asyncio
import hashlib
import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import TypeVar

import structlog
from sqlalchemy import Connection
from sqlalchemy.exc import IntegrityError

from receiver.changes import Change, Changes
from receiver.decide import Changed, Decision, Kind, Policy, Unchanged, kind_of, reconcile, settle
from receiver.errors import PayloadError, SignatureError, SignatureProblem, StoreUnavailableError
from receiver.flora.messages import Callback, parse_callback
from receiver.flora.signature import Verified, canary_key, verify
from receiver.model import (
    Asked,
    Delivery,
    Dispatch,
    DispatchState,
    Event,
    Heard,
    Origin,
    Output,
    Registered,
    Rejection,
    Report,
    Run,
    Start,
    Subscription,
    Unanswered,
)
from receiver.store import Database, channel, ledger, starts
from receiver.telemetry import Metrics

log = structlog.get_logger("receiver.intake")
T = TypeVar("T")

_BATCH = 256
"""Entries that share one commit, at most."""
_PATIENCE_SECONDS = 8.0
"""FLORA waits 10 s for an answer: better a 503 that it hears than a 200 that it does not."""
_LOOK_SECONDS = 0.25
"""How often it is looked for entries whose time is up: a timer for each would cost more than all of its verifying."""
_CANARY_SECONDS = 60
_START_SECONDS = 1.0
_START_PATIENCE = timedelta(minutes=2)
"""How long settling a run of unknown origin waits for a start that may name it."""
_SOON = timedelta(seconds=5)
_LOGGED = 5
"""Run ids named in one log line, at most."""


@dataclass(frozen=True, slots=True)
class Accepted:
    """The callback is committed, and new."""


@dataclass(frozen=True, slots=True)
class Duplicate:
    """This delivery was committed before."""


@dataclass(frozen=True, slots=True)
class Ignored:
    """Verified and committed, but of an event type that we do not know: nothing is done."""


@dataclass(frozen=True, slots=True)
class Canary:
    """Not a callback but a probe of our own that came all the way, unaltered; the ledger takes writes, and has none of it."""


@dataclass(frozen=True, slots=True)
class Refused:
    """Not a callback that we take: `code` and `message` tell the sender why."""

    code: str
    message: str


Answer = Accepted | Duplicate | Ignored | Canary | Refused


@dataclass(frozen=True, slots=True)
class Secret:
    """A webhook secret and the workspace it belongs to, where the settings say so."""

    value: str = field(repr=False)
    workspace_id: str | None = None


@dataclass(frozen=True, slots=True)
class Signals:
    """How the door wakes the loops: something is due now."""

    poll: asyncio.Event = field(default_factory=asyncio.Event)
    dispatch: asyncio.Event = field(default_factory=asyncio.Event)
    changes: Changes = field(default_factory=Changes)


@dataclass(slots=True)
class _Entry:
    """One thing to commit: a delivery, a report, or a delivery with the report that it makes; `start` names its start."""

    report: Report | None
    delivery: Delivery | None
    start: str | None
    done: asyncio.Future["_Recorded"]
    since: float
    """When it came, on the loop's clock."""


@dataclass(frozen=True, slots=True)
class _Recorded:
    """What became of one entry."""

    new_delivery: bool
    decision: Decision


@dataclass(slots=True)
class _Fold:
    """The runs of a batch while it is decided about: each entry sees what the ones before it did."""

    before: dict[str, Run]
    now_are: dict[str, Run]
    outputs: dict[str, Sequence[Output]] = field(default_factory=dict)
    fresh: dict[str, Sequence[Output]] = field(default_factory=dict)
    dispatches: list[Dispatch] = field(default_factory=list)
    happened: dict[str, list[Event]] = field(default_factory=dict)

    def new(self) -> list[Run]:
        return sorted((run for key, run in self.now_are.items() if key not in self.before), key=lambda run: run.run_id)

    def changed(self) -> list[Run]:
        rows = (run for key, run in self.now_are.items() if key in self.before and run is not self.before[key])
        return sorted(rows, key=lambda run: run.run_id)

    def outcomes(self) -> dict[str, int]:
        """Return what this batch tells about the callback channel: verdicts given, runs lost."""
        counts: dict[str, int] = {}
        for key, run in self.now_are.items():
            before = self.before.get(key)
            if run.verdict is not None and (before is None or before.verdict is not run.verdict):
                counts[run.verdict.value] = counts.get(run.verdict.value, 0) + 1
        lost = sum(Event.LOST in events for events in self.happened.values())
        return {**counts, "lost": lost} if lost else counts


class Intake:
    """The door. `start` it inside the loop that uses it; `close` commits what has arrived."""

    def __init__(
        self,
        database: Database,
        *,
        secrets: Sequence[Secret],
        subscriptions: Sequence[Subscription],
        policy: Policy,
        signals: Signals,
        metrics: Metrics,
        tolerance_past: int | None = 900,
        tolerance_future: int | None = 300,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
        jitter: Callable[[], float] = random.random,
    ) -> None:
        self._database = database
        self._secrets = tuple(secrets)
        self._keys = tuple(secret.value for secret in secrets)
        self._canaries = tuple(canary_key(secret.value) for secret in secrets)
        self._subscriptions = tuple(subscriptions)
        self._policy = policy
        self._signals = signals
        self._metrics = metrics
        self._tolerance_past = tolerance_past
        self._tolerance_future = tolerance_future
        self._clock = clock
        self._jitter = jitter
        self._waiting: deque[_Entry] = deque()
        self._in_hand: Sequence[_Entry] = ()
        """The batch that is being committed."""
        self._committing: asyncio.Task[None] | None = None
        self.rejections: deque[Rejection] = deque(maxlen=1000)
        """Refused requests not written down yet; the janitor empties it."""

    async def accept(
        self, body: bytes, signature: str | None, *, remote: str | None = None, start: str | None = None
    ) -> Answer:
        """Verify, parse and commit one callback. Raises StoreUnavailableError if it could not be committed.

        `start` is the token that the callback's URL carried, if any: it links the run to our intent to start it.
        """
        now = self._clock()
        try:
            verified = verify(
                body,
                signature,
                self._keys,
                now=int(now.timestamp()),
                tolerance_past=self._tolerance_past,
                tolerance_future=self._tolerance_future,
            )
        except SignatureError as error:
            if error.problem is SignatureProblem.TIMESTAMP_OUT_OF_TOLERANCE:
                await self._look_anyway(body, now)
            elif error.problem is SignatureProblem.SIGNATURE_MISMATCH and self._is_canary(body, signature, now):
                await self._database.write(lambda _: None)
                return Canary()
            return self.refuse(error.problem.value, str(error), remote=remote, size=len(body))
        try:
            callback = parse_callback(body)
        except PayloadError as error:
            # Authentic, so worth keeping: FLORA may have changed its format.
            await self._enter(None, _unreadable(body, signature, verified, now), None)
            log.error("callback.unreadable", reason=str(error), size=len(body))
            return self.refuse("invalid_payload", str(error), remote=remote, size=len(body))
        owner = self._secrets[verified.secret].workspace_id
        if owner is not None and callback.workspace_id is not None and owner != callback.workspace_id:
            message = f"signed with the secret of {owner}, but about a run of another workspace"
            return self.refuse("workspace_mismatch", message, remote=remote, size=len(body))
        delivery = Delivery(
            delivery_id=callback.delivery_id,
            body=body,
            signature=signature or "",
            received_at=now,
            age=verified.age,
            secret=verified.secret,
            event=callback.event,
            api_version=callback.api_version,
            run_id=callback.run_id,
        )
        recorded = await self._enter(_heard(callback, now), delivery, start)
        if not recorded.new_delivery:
            return Duplicate()
        return Accepted() if callback.told is not None else Ignored()

    async def learn(self, report: Report, *, start: str | None = None) -> Decision:
        """Commit what a report does to its run, and return it. Raises StoreUnavailableError.

        With `start`, the report's run is that start's: both are committed together.
        """
        return (await self._enter(report, None, start)).decision

    def refuse(self, code: str, message: str, *, remote: str | None, size: int) -> Refused:
        """Note a refusal, for operators; nothing of the body is kept."""
        self.rejections.append(Rejection(self._clock(), code, remote, size))
        log.warning("callback.refused", code=code, remote=remote, size=size)
        return Refused(code, message)

    async def close(self) -> None:
        """Wait until everything that has arrived is committed."""
        while self._committing is not None:
            await asyncio.wait({self._committing})

    def _is_canary(self, body: bytes, signature: str | None, now: datetime) -> bool:
        try:
            verify(body, signature, self._canaries, now=int(now.timestamp()), tolerance_past=_CANARY_SECONDS)
        except SignatureError:
            return False
        return True

    async def _look_anyway(self, body: bytes, now: datetime) -> None:
        """An authentic callback at a wrong time is refused; yet a run that we wait for is worth a look."""
        try:
            callback = parse_callback(body)
            known = await self._database.read(lambda tx: ledger.runs_by_id(tx, [callback.run_id]))
            if known and known[callback.run_id].settled_at is None:
                await self.learn(Asked(callback.run_id, now))
        except (PayloadError, StoreUnavailableError):
            pass  # it stays refused; polling will find the run

    async def _enter(self, report: Report | None, delivery: Delivery | None, start: str | None) -> _Recorded:
        loop = asyncio.get_running_loop()
        entry = _Entry(report, delivery, start, loop.create_future(), loop.time())
        self._waiting.append(entry)
        if self._committing is None:
            self._committing = asyncio.create_task(self._commit_all(), name="intake.commit")
        return await entry.done  # whoever waits may be cancelled; the entry is committed all the same

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

    async def _commit(self, batch: Sequence[_Entry], tries: int = 3) -> None:
        """Commit a batch; if one entry spoils it, commit one by one, so that only the bad one fails."""
        try:
            recorded, fold = await self._database.write(lambda tx: self._record(tx, batch))
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

    def _record(self, tx: Connection, batch: Sequence[_Entry]) -> tuple[list[_Recorded], _Fold]:
        """Do a batch's work in a transaction: two selects, then what changed. Runs on the writer's thread."""
        now = self._clock()
        delivery_ids = {entry.delivery.delivery_id for entry in batch if entry.delivery}
        run_ids = {entry.report.run_id for entry in batch if entry.report}
        seen = set(ledger.known_deliveries(tx, delivery_ids)) if delivery_ids else set()
        known = ledger.runs_by_id(tx, run_ids, for_update=True) if run_ids else {}
        fold = _Fold(known, dict(known))
        asked = starts.by_token(tx, tokens) if (tokens := {entry.start for entry in batch if entry.start}) else {}
        fresh: list[Delivery] = []
        again: dict[str, int] = {}
        recorded = []
        for entry in batch:
            is_new = False
            if entry.delivery is not None:
                is_new = entry.delivery.delivery_id not in seen
                if is_new:
                    seen.add(entry.delivery.delivery_id)
                    fresh.append(entry.delivery)
                else:
                    again[entry.delivery.delivery_id] = again.get(entry.delivery.delivery_id, 0) + 1
            decision: Decision = Unchanged()
            if entry.report is not None:
                start = asked.get(entry.start or "")
                if start is not None and not isinstance(entry.report, Registered):
                    self._decide(tx, fold, registered(start, entry.report.run_id, now), now)
                decision = self._decide(tx, fold, entry.report, now)
            recorded.append(_Recorded(is_new, decision))
        ledger.add_deliveries(tx, sorted(fresh, key=lambda delivery: delivery.delivery_id))
        ledger.count_duplicates(tx, again, at=now)
        ledger.add_runs(tx, fold.new())
        ledger.change_runs(tx, fold.changed())
        ledger.add_outputs(tx, fold.outputs)
        ledger.freshen_outputs(tx, fold.fresh)
        ledger.add_dispatches(tx, fold.dispatches)
        starts.mark_started(
            tx, {entry.start: entry.report.run_id for entry in batch if entry.report and entry.start in asked}
        )
        channel.count(tx, fold.outcomes(), now=now)
        return recorded, fold

    def _decide(self, tx: Connection, fold: _Fold, report: Report, now: datetime) -> Decision:
        # A duplicate is decided about like anything else: the rules make it harmless, not the delivery's id. So the
        # same delivery id with another body still makes the run that it names due.
        run_id = report.run_id
        run = fold.now_are.get(run_id)
        if run is not None and self._must_wait(tx, run, report, now):
            report = Unanswered(run_id, now, retry_after=_START_SECONDS)
        decision = reconcile(run, report, self._policy, now=now, jitter=self._jitter())
        if isinstance(decision, Changed):
            fold.now_are[run_id] = decision.run
            fold.happened.setdefault(run_id, []).extend(decision.events)
            if decision.outputs:
                fold.outputs[run_id] = decision.outputs
            if decision.fresh:
                fold.fresh[run_id] = decision.fresh
            if decision.events:
                outputs = fold.outputs.get(run_id) or ledger.outputs_of_runs(tx, [run_id])[run_id]
                fold.dispatches += settle(decision.run, outputs, decision.events, self._subscriptions, now=now)
        return decision

    def _must_wait(self, tx: Connection, run: Run, report: Report, now: datetime) -> bool:
        """Return whether settling has to wait: the run may be one that we are starting right now.

        Its callback overtook the answer to its start and carried no token; settled now, its dispatches would be judged
        without the metadata and the technique that the start knows.
        """
        if run.origin is not Origin.CALLBACK or run.settled_at is not None:
            return False
        if kind_of(report) not in {Kind.COMPLETED, Kind.FAILED}:
            return False
        return starts.any_asking(tx, workspace_id=run.workspace_id, since=now - _START_PATIENCE)

    def _tell(self, batch: Sequence[_Entry], recorded: Sequence[_Recorded], fold: _Fold) -> None:
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
        self._metrics.committed(len(batch))
        if self._signals.changes:
            for run in (*new_runs, *changed_runs):
                detail = " ".join(fold.happened.get(run.run_id, ()))
                self._signals.changes.publish(Change("run", run.run_id, run.state.value, detail))
        for run_id, run in fold.now_are.items():
            if run.verdict is not None:
                before = fold.before.get(run_id)
                self._metrics.judged(before.verdict if before else None, run.verdict)
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
        metrics.happened(event, run)


def registered(start: Start, run_id: str, now: datetime) -> Registered:
    """Return what a start knows about the run that it made."""
    return Registered(
        run_id=run_id,
        origin=Origin.STARTED,
        registered_at=now,
        callback_expected=start.callback_expected,
        run_type="technique" if start.technique_id else "generation",
        technique_id=start.technique_id or None,
        workspace_id=start.workspace_id or None,
        metadata=start.metadata,
    )


def _heard(callback: Callback, now: datetime) -> Heard | None:
    if callback.told is None:
        return None
    return Heard(
        run_id=callback.run_id,
        told=callback.told,
        received_at=now,
        run_type=callback.run_type,
        workspace_id=callback.workspace_id,
        error_code=callback.error_code,
        error_message=callback.error_message,
    )


def _unreadable(body: bytes, signature: str | None, verified: Verified, now: datetime) -> Delivery:
    return Delivery(
        delivery_id=f"sha256:{hashlib.sha256(body).hexdigest()}",
        body=body,
        signature=signature or "",
        received_at=now,
        age=verified.age,
        secret=verified.secret,
        readable=False,
    )


def _fail(entry: _Entry, error: Exception) -> None:
    if not entry.done.done():
        entry.done.set_exception(error)
        entry.done.exception()  # its waiter may have left: then nobody else looks
