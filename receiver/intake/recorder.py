"""What a batch of entries does to the ledger: decided by the rules, one entry after the other, written in one transaction.

Called by commits alone. Everything here may run again: PostgreSQL may ask for the same transaction once more.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime

import msgspec
from sqlalchemy import Connection

from receiver.decide import Changed, Decision, Kind, Policy, Unchanged, kind_of, reconcile, settle
from receiver.decide.starts import may_be_of_start, registered, young_since
from receiver.model import (
    Delivery,
    Dispatch,
    Event,
    Origin,
    Output,
    ReadFailed,
    Report,
    Run,
    RunRegistered,
    Subscription,
)
from receiver.store import channel, ledger, starts

_START_SECONDS = 1.0
"""How soon a run is read again that waits for its start to name it."""


@dataclass(slots=True)
class Entry:
    """One thing to commit: a delivery, a report, or a delivery with the report that it makes; `start` names its start."""

    report: Report | None
    delivery: Delivery | None
    start: str | None


class Recorded(msgspec.Struct, frozen=True):
    """What became of one entry."""

    new_delivery: bool
    decision: Decision


@dataclass(slots=True)
class Fold:
    """The runs of a batch while it is decided about: each entry sees what the ones before it did."""

    before: dict[str, Run]
    now_are: dict[str, Run]
    outputs: dict[str, Sequence[Output]] = field(default_factory=dict)
    fresh: dict[str, Sequence[Output]] = field(default_factory=dict)
    dispatches: list[Dispatch] = field(default_factory=list)
    happened: dict[str, list[Event]] = field(default_factory=dict)
    asking: dict[str | None, datetime | None] = field(default_factory=dict)
    """For each workspace that it was asked for: since when a start of it may be about to name one of these runs."""

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


class Recorder:
    """Decides and writes. `record` is a job for the database's writer."""

    def __init__(
        self,
        policy: Policy,
        subscriptions: Sequence[Subscription],
        *,
        clock: Callable[[], datetime],
        jitter: Callable[[], float] = random.random,
    ) -> None:
        self._policy = policy
        self._subscriptions = tuple(subscriptions)
        self._clock = clock
        self._jitter = jitter

    def record(self, tx: Connection, batch: Sequence[Entry]) -> tuple[list[Recorded], Fold]:
        """Do a batch's work in a transaction: two selects, then what changed. Runs on the writer's thread."""
        now = self._clock()
        delivery_ids = {entry.delivery.delivery_id for entry in batch if entry.delivery}
        run_ids = {entry.report.run_id for entry in batch if entry.report}
        seen = set(ledger.known_deliveries(tx, delivery_ids)) if delivery_ids else set()
        known = ledger.runs_by_id(tx, run_ids, for_update=True) if run_ids else {}
        fold = Fold(known, dict(known))
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
                if start is not None and not isinstance(entry.report, RunRegistered):
                    self._decide(tx, fold, registered(start, entry.report.run_id, now), now)
                decision = self._decide(tx, fold, entry.report, now)
            recorded.append(Recorded(is_new, decision))
        ledger.add_deliveries(tx, sorted(fresh, key=lambda delivery: delivery.delivery_id))
        ledger.count_duplicates(tx, again, at=now)
        ledger.add_runs(tx, fold.new())
        ledger.update_runs(tx, fold.changed())
        ledger.add_outputs(tx, fold.outputs)
        ledger.update_output_urls(tx, fold.fresh)
        ledger.add_dispatches(tx, fold.dispatches)
        starts.mark_started(
            tx, {entry.start: entry.report.run_id for entry in batch if entry.report and entry.start in asked}
        )
        channel.add_outcomes(tx, fold.outcomes(), now=now)
        return recorded, fold

    def _decide(self, tx: Connection, fold: Fold, report: Report, now: datetime) -> Decision:
        # A duplicate is decided about like anything else: the rules make it harmless, not the delivery's id. So the
        # same delivery id with another body still makes the run that it names due.
        run_id = report.run_id
        run = fold.now_are.get(run_id)
        if run is not None and self._must_wait(tx, fold, run, report, now):
            report = ReadFailed(run_id, now, retry_after=_START_SECONDS)
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

    def _must_wait(self, tx: Connection, fold: Fold, run: Run, report: Report, now: datetime) -> bool:
        """Return whether settling has to wait: the run may be one that we are starting right now.

        Its callback overtook the answer to its start and carried no token; settled now, its dispatches would be judged
        without the metadata and the technique that the start knows. A start that was made after we heard of the run is not
        meant: where one start follows the other, the runs of others would never be settled.
        """
        if run.origin is not Origin.CALLBACK or run.settled_at is not None:
            return False
        if kind_of(report) not in {Kind.COMPLETED, Kind.FAILED}:
            return False
        if run.workspace_id not in fold.asking:
            fold.asking[run.workspace_id] = starts.oldest_unanswered_at(
                tx, workspace_id=run.workspace_id, since=young_since(now)
            )
        return may_be_of_start(run.first_seen_at, fold.asking[run.workspace_id])
