"""Applies a batch of entries to the ledger in one transaction, as the rules decide.

Called by `group_commit` alone. A batch may be recorded more than once: PostgreSQL may have to
repeat a transaction.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime

import msgspec
from sqlalchemy import Connection

from receiver.decide import (
    Changed,
    Decision,
    Kind,
    Policy,
    Unchanged,
    kind_of,
    reconcile,
    refresh_outputs,
    settle,
)
from receiver.decide.starts import may_be_of_start, to_registration, young_since
from receiver.model import (
    Delivery,
    Dispatch,
    Event,
    Origin,
    Output,
    ReadAttempt,
    ReadFailed,
    Report,
    Run,
    RunNotFound,
    RunRead,
    RunRegistered,
    Start,
    Subscription,
)
from receiver.store import channel, ledger, starts

_START_WAIT_SECONDS = 1.0
"""How soon a run is read again while its start may still name it."""


@dataclass(slots=True)
class Entry:
    """A delivery, a report, or both; `start` is the token of the start that made the run."""

    report: Report | None
    delivery: Delivery | None
    start: str | None


class CommitResult(msgspec.Struct, frozen=True):
    """What became of one entry."""

    new_delivery: bool
    decision: Decision


@dataclass(slots=True)
class BatchState:
    """The state of a batch while it is decided: each entry sees what the entries before it did."""

    before: dict[str, Run]
    current: dict[str, Run]
    outputs: dict[str, Sequence[Output]] = field(default_factory=dict)
    refreshed: dict[str, Sequence[Output]] = field(default_factory=dict)
    dispatches: list[Dispatch] = field(default_factory=list)
    events: dict[str, list[Event]] = field(default_factory=dict)
    oldest_starts: dict[str | None, datetime | None] = field(default_factory=dict)
    """By workspace, as far as looked up: when its oldest unanswered start was made."""
    deliveries: dict[str, Delivery] = field(default_factory=dict)
    """New deliveries by id."""
    reads: dict[tuple[str, int], ReadAttempt] = field(default_factory=dict)
    """Reads by run and number."""
    duplicates: dict[str, int] = field(default_factory=dict)
    """How often each known delivery came again."""

    def new_runs(self) -> list[Run]:
        rows = (run for key, run in self.current.items() if key not in self.before)
        return sorted(rows, key=lambda run: run.run_id)

    def changed_runs(self) -> list[Run]:
        rows = (
            run for key, run in self.current.items() if key in self.before and run is not self.before[key]
        )
        return sorted(rows, key=lambda run: run.run_id)

    def channel_outcomes(self) -> dict[str, int]:
        """Return how many runs got each verdict in this batch, and how many were lost."""
        counts: dict[str, int] = {}
        for key, run in self.current.items():
            before = self.before.get(key)
            if run.verdict is not None and (before is None or before.verdict is not run.verdict):
                counts[run.verdict.value] = counts.get(run.verdict.value, 0) + 1
        lost = sum(Event.LOST in events for events in self.events.values())
        return {**counts, "lost": lost} if lost else counts


class Recorder:
    """Decides about entries and writes the results. `record` is a job for the database's writer."""

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

    def record(self, tx: Connection, batch: Sequence[Entry]) -> tuple[list[CommitResult], BatchState]:
        """Record a batch: select what it refers to, decide entry by entry, write what changed."""
        now = self._clock()
        delivery_ids = {entry.delivery.delivery_id for entry in batch if entry.delivery}
        run_ids = {entry.report.run_id for entry in batch if entry.report}
        tokens = {entry.start for entry in batch if entry.start}
        seen = set(ledger.known_deliveries(tx, delivery_ids)) if delivery_ids else set()
        known = ledger.runs_by_id(tx, run_ids, for_update=True) if run_ids else {}
        known_starts = starts.by_token(tx, tokens) if tokens else {}
        state = BatchState(known, dict(known))
        results = []
        for entry in batch:
            is_new = entry.delivery is not None and _add_delivery(state, entry.delivery, seen)
            decision: Decision = Unchanged()
            if entry.report is not None:
                decision = self._apply(tx, state, entry.report, known_starts.get(entry.start or ""), now)
            results.append(CommitResult(is_new, decision))
        self._write(tx, state, now)
        runs_by_token = {
            entry.start: entry.report.run_id
            for entry in batch
            if entry.report and entry.start in known_starts
        }
        starts.mark_started(tx, runs_by_token)
        channel.add_outcomes(tx, state.channel_outcomes(), now=now)
        return results, state

    def _write(self, tx: Connection, state: BatchState, now: datetime) -> None:
        # In the order of their keys, so that no two transactions wait for each other's rows.
        ledger.add_deliveries(tx, [delivery for _, delivery in sorted(state.deliveries.items())])
        ledger.count_duplicates(tx, state.duplicates, at=now)
        ledger.add_runs(tx, state.new_runs())
        ledger.update_runs(tx, state.changed_runs())
        ledger.add_outputs(tx, state.outputs)
        ledger.update_output_urls(tx, state.refreshed)
        ledger.add_reads(tx, state.reads)
        ledger.add_dispatches(tx, state.dispatches)

    def _apply(
        self, tx: Connection, state: BatchState, report: Report, start: Start | None, now: datetime
    ) -> Decision:
        """Decide about a report, after the registration of its run if a start has made it."""
        if start is not None and not isinstance(report, RunRegistered):
            self._decide(tx, state, to_registration(start, report.run_id, now), now)
        return self._decide(tx, state, report, now)

    def _decide(self, tx: Connection, state: BatchState, report: Report, now: datetime) -> Decision:
        # The report of a duplicate delivery is decided about too: the rules make it harmless, not
        # the delivery's id. If the same delivery id comes with another body, the run that this body
        # names is still read.
        run_id = report.run_id
        run = state.current.get(run_id)
        if run is not None and self._must_wait_for_start(tx, state, run, report, now):
            attempt = report.attempt if isinstance(report, RunRead) else None
            report = ReadFailed(run_id, now, retry_after=_START_WAIT_SECONDS, attempt=attempt)
        decision = reconcile(run, report, self._policy, now=now, jitter=self._jitter())
        if isinstance(decision, Changed):
            _add_read(state, report, decision.run, polls_before=run.polls if run else 0)
            state.current[run_id] = decision.run
            state.events.setdefault(run_id, []).extend(decision.events)
            if decision.outputs:
                state.outputs[run_id] = decision.outputs
            if decision.refreshed:
                state.refreshed[run_id] = refresh_outputs(_outputs(tx, state, run_id), decision.refreshed)
            if decision.events:
                state.dispatches += settle(
                    decision.run,
                    _outputs(tx, state, run_id),
                    decision.events,
                    self._subscriptions,
                    now=now,
                )
        return decision

    def _must_wait_for_start(
        self, tx: Connection, state: BatchState, run: Run, report: Report, now: datetime
    ) -> bool:
        """Return whether settling a run has to wait because one of our own starts may have made it.

        Its callback came before the response to its start, and without a token. If it were settled
        now, its dispatches would be filtered without the metadata and the technique that the start
        knows.
        """
        if run.origin is not Origin.CALLBACK or run.settled_at is not None:
            return False
        if kind_of(report) not in {Kind.COMPLETED, Kind.FAILED}:
            return False
        if run.workspace_id not in state.oldest_starts:
            state.oldest_starts[run.workspace_id] = starts.oldest_unanswered_at(
                tx, workspace_id=run.workspace_id, since=young_since(now)
            )
        return may_be_of_start(run.first_seen_at, state.oldest_starts[run.workspace_id])


def _outputs(tx: Connection, state: BatchState, run_id: str) -> Sequence[Output]:
    """Return the outputs of a run as the batch has left them so far."""
    known = state.refreshed.get(run_id) or state.outputs.get(run_id)
    return known or ledger.outputs_of_runs(tx, [run_id])[run_id]


def _add_read(state: BatchState, report: Report, run: Run, *, polls_before: int) -> None:
    """Add the read behind a report, if it was counted."""
    attempt = report.attempt if isinstance(report, RunRead | RunNotFound | ReadFailed) else None
    if attempt is not None and run.polls > polls_before:
        state.reads[run.run_id, run.polls] = attempt


def _add_delivery(state: BatchState, delivery: Delivery, seen: set[str]) -> bool:
    """Add a delivery to the batch, or count it as a duplicate; return whether it is new."""
    if delivery.delivery_id in seen:
        state.duplicates[delivery.delivery_id] = state.duplicates.get(delivery.delivery_id, 0) + 1
        return False
    seen.add(delivery.delivery_id)
    state.deliveries[delivery.delivery_id] = delivery
    return True
