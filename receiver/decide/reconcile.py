"""Decides what a report does to a run. Pure; called by the intake's recorder.

A run is a row. A report is one fact about it: a callback arrived (`CallbackReceived`), FLORA's API
was read (`RunRead`, `RunNotFound`, `ReadFailed`), the run was started or tracked (`RunRegistered`),
a read was requested (`ReadRequested`), or the time for its callback has passed (`CallbackExpired`).
`reconcile` looks up the pair of state and kind of report in `TABLE` and applies that one rule. The
table is closed: every pair has a rule, and an illegal pair changes nothing.

The order of reports does not matter: a state only moves towards an end (open → reported → completed
| failed), callbacks are merged as a set (`CallbackStatus`), outputs come from reads alone, and the
verdict is computed from facts in the row, not from the path that led there. So the same reports, in
any order and any number, end in the same row and the same dispatches, as long as the reads agree
with each other.
"""

import dataclasses
from collections.abc import Callable, Mapping
from datetime import datetime, timedelta
from enum import StrEnum
from typing import assert_never

import msgspec
from msgspec.structs import replace

from receiver.decide.deadline import is_overdue, without_unread_time
from receiver.decide.decision import Changed, Decision, Unchanged
from receiver.decide.merge import (
    combine_status,
    read_succeeded,
    with_callback,
    with_registration,
    with_snapshot,
)
from receiver.decide.policy import Policy
from receiver.decide.poll_schedule import failure_pause, next_poll
from receiver.decide.settlement import callback_expires_at
from receiver.model import (
    CallbackExpired,
    CallbackReceived,
    Event,
    LostReason,
    Origin,
    Output,
    ReadFailed,
    ReadOutcome,
    ReadRequested,
    Report,
    Run,
    RunNotFound,
    RunRead,
    RunRegistered,
    RunState,
    Snapshot,
    Verdict,
)

_NOT_FOUND_READS = 5
_NOT_FOUND_SPAN = timedelta(minutes=10)
"""A run is lost after this many 404s in a row, over at least this time."""


class Kind(StrEnum):
    """The kind of a report: a row of the table."""

    REGISTERED = "registered"
    CALLBACK_RECEIVED = "callback_received"
    RUNNING = "running"
    COMPLETED = "completed"
    EMPTY = "empty"
    """A read as completed, but without outputs."""
    FAILED = "failed"
    NOT_FOUND = "not_found"
    READ_FAILED = "read_failed"
    READ_REQUESTED = "read_requested"
    CALLBACK_EXPIRED = "callback_expired"


def kind_of(report: Report) -> Kind:
    match report:
        case RunRegistered():
            return Kind.REGISTERED
        case CallbackReceived():
            return Kind.CALLBACK_RECEIVED
        case RunNotFound():
            return Kind.NOT_FOUND
        case ReadFailed():
            return Kind.READ_FAILED
        case ReadRequested():
            return Kind.READ_REQUESTED
        case CallbackExpired():
            return Kind.CALLBACK_EXPIRED
        case RunRead(snapshot=snapshot):
            # Key on `status` alone: a failed run also shows progress 100 and a completed_at (FLORA
            # contract, section 3).
            if snapshot.status == "completed":
                return Kind.COMPLETED if snapshot.outputs else Kind.EMPTY
            return Kind.FAILED if snapshot.status == "failed" else Kind.RUNNING
    assert_never(report)


def reconcile(
    run: Run | None, report: Report, policy: Policy, *, now: datetime, jitter: float = 0.5
) -> Decision:
    """Return what `report` does to `run`, which is None if the ledger does not have it.

    `jitter` is a random number in [0, 1).
    """
    kind = kind_of(report)
    if run is not None and (kind in _READS or (kind in _CAUSES_OF_READS and run.settled_at is None)):
        run = without_unread_time(run, policy, now=now)
    rule = TABLE[run.state if run else None, kind]
    return _count_failure(run, report, rule(_Case(run, report, policy, now, jitter)))


def _count_failure(run: Run | None, report: Report, decision: Decision) -> Decision:
    """Count a read that has shown nothing about its run apart from those that have."""
    if run is None or not isinstance(report, ReadFailed) or not isinstance(decision, Changed):
        return decision
    has_shown = report.attempt is not None and report.attempt.outcome is not ReadOutcome.FAILED
    if has_shown or decision.run.polls == run.polls:
        return decision
    return replace(decision, run=replace(decision.run, failed_polls=run.failed_polls + 1))


# --- the rules ---


_READS = frozenset(
    {Kind.RUNNING, Kind.COMPLETED, Kind.EMPTY, Kind.FAILED, Kind.NOT_FOUND, Kind.READ_FAILED}
)
_CAUSES_OF_READS = frozenset({Kind.CALLBACK_RECEIVED, Kind.READ_REQUESTED})


class _Case(msgspec.Struct, frozen=True):
    """The arguments of a rule. `known` and `snapshot` are for cells of the table that have them."""

    run: Run | None
    report: Report
    policy: Policy
    now: datetime
    jitter: float

    @property
    def known(self) -> Run:
        assert self.run is not None, "the table calls this rule for known runs only"
        return self.run

    @property
    def snapshot(self) -> Snapshot:
        assert isinstance(self.report, RunRead), "the table calls this rule for reads only"
        return self.report.snapshot

    def after(self, pause: timedelta) -> datetime:
        """Return the time after a pause plus up to 25 %: runs started together are spread out."""
        return self.now + pause * (1 + 0.25 * self.jitter)


_Rule = Callable[[_Case], Decision]


def _ignore(_: _Case) -> Decision:
    return Unchanged()


def _enter(case: _Case) -> Decision:
    """Add a run as open: it was registered, or discovered in a list."""
    match case.report:
        case RunRegistered() as report:
            run = with_registration(
                _new_run(case, report.run_id, report.origin, callback_expected=report.callback_expected),
                report,
            )
            wait = case.policy.first_poll
            if report.estimated_seconds:
                wait = _seconds(report.estimated_seconds, at_most=case.policy.max_gap)
            if not report.callback_expected:
                wait = case.policy.eager_poll
            return Changed(replace(run, next_poll_at=case.after(min(wait, case.policy.max_gap))))
        case RunRead(origin=Origin() as origin):
            run = with_snapshot(
                _new_run(case, case.report.run_id, origin, callback_expected=False), case.snapshot
            )
            return Changed(
                replace(
                    run, polls=1, next_poll_at=next_poll(run, case.policy, now=case.now, jitter=case.jitter)
                )
            )
        case _:
            return Unchanged()  # a read of a run that left the ledger


def _enrich(case: _Case) -> Decision:
    """Fill in what a registration knows and earlier reports did not."""
    if not isinstance(case.report, RunRegistered):
        return Unchanged()
    run = with_registration(case.known, case.report)
    if run == case.known:
        return Unchanged()
    # The registration may also say that a callback was to be expected.
    return Changed(run) if run.settled_at is None else _judge(run, case)


def _accept(case: _Case) -> Decision:
    """Mark the run as reported and due for a read now; a lost run is reopened."""
    report = case.report
    if not isinstance(report, CallbackReceived):
        return Unchanged()
    if case.run is None:
        return Changed(_new_reported_run(case, report))
    run = case.run
    callback_status = combine_status(run.callback_status, report.callback_status)
    if run.state is RunState.REPORTED and callback_status is run.callback_status:
        return Unchanged()
    run = replace(
        with_callback(run, report),
        callback_status=callback_status,
        reported_at=run.reported_at or report.received_at,
        error_code=run.error_code or report.error_code,
        error_message=run.error_message or report.error_message,
    )
    if run.state is RunState.REPORTED:
        return Changed(run)
    reopened = run.state is RunState.LOST
    return Changed(
        replace(
            run,
            state=RunState.REPORTED,
            next_poll_at=case.now,
            unconfirmed_reads=0,
            missing=0,
            missing_since=None,
            lost_reason=None,
            deadline_at=case.now + case.policy.deadline if reopened else run.deadline_at,
        )
    )


def _new_reported_run(case: _Case, report: CallbackReceived) -> Run:
    """Return the row of a run first known by its callback.

    This is the most frequent rule, so the row is made in one piece.
    """
    return Run(
        run_id=report.run_id,
        state=RunState.REPORTED,
        origin=Origin.CALLBACK,
        first_seen_at=case.now,
        deadline_at=case.now + case.policy.deadline,
        run_type=report.run_type,
        workspace_id=report.workspace_id,
        error_code=report.error_code,
        error_message=report.error_message,
        callback_status=report.callback_status,
        reported_at=report.received_at,
        next_poll_at=case.now,
    )


def _note(case: _Case) -> Decision:
    """Merge the callback of a settled run: it changes no state, but the verdict."""
    report = case.report
    if not isinstance(report, CallbackReceived):
        return Unchanged()
    run = with_callback(case.known, report)
    run = replace(
        run,
        callback_status=combine_status(run.callback_status, report.callback_status),
        reported_at=run.reported_at or report.received_at,
    )
    if run.state is RunState.FAILED:
        run = replace(
            run,
            error_code=run.error_code or report.error_code,
            error_message=run.error_message or report.error_message,
        )
    if run == case.known:
        return Unchanged()
    return _judge(run, case)


def _wait(case: _Case) -> Decision:
    """Plan the next read of a run that is not terminal yet."""
    run = read_succeeded(with_snapshot(case.known, case.snapshot))
    return _read_on_unless_overdue(replace(run, unconfirmed_reads=0), case)


def _confirm(case: _Case) -> Decision:
    """Read again soon: the API does not confirm yet what a callback or a read has reported."""
    run, read = case.known, case.report
    empty = case.snapshot.status == "completed"
    if isinstance(read, RunRead) and _is_stale(run, read.requested_at, case):
        return Changed(replace(run, polls=run.polls + 1))
    run = read_succeeded(with_snapshot(run, case.snapshot))
    run = replace(run, unconfirmed_reads=run.unconfirmed_reads + 1)
    past = run.unconfirmed_reads >= len(case.policy.confirmation_delays)
    if past and empty:
        return _lose(run, LostReason.NO_OUTPUTS)
    diverged = past and run.state is RunState.REPORTED and run.verdict is not Verdict.DIVERGED
    if diverged:
        run = replace(run, verdict=Verdict.DIVERGED)
    # During the confirmation delays the API may lag behind: not conclusive, so the deadline waits.
    decision = _read_on_unless_overdue(run, case) if past else _read_on(run, case)
    return replace(decision, events=(Event.DIVERGED, *decision.events)) if diverged else decision


def _miss(case: _Case) -> Decision:
    """Count a 404 on a conclusive route; a technique run may answer 404 on `/runs/{id}`."""
    run, report = case.known, case.report
    if not isinstance(report, RunNotFound) or not report.conclusive:
        return _back_off(case)
    if _is_stale(run, report.requested_at, case):
        return Changed(replace(run, polls=run.polls + 1))
    since = min(run.missing_since or case.now, case.now)
    run = replace(
        run,
        polls=run.polls + 1,
        unconfirmed_reads=run.unconfirmed_reads + 1,
        failures=0,
        missing=run.missing + 1,
        missing_since=since,
    )
    if run.missing >= _NOT_FOUND_READS and case.now - since >= _NOT_FOUND_SPAN:
        return _lose(run, LostReason.NOT_FOUND)
    return _read_on(run, case)


def _back_off(case: _Case) -> Decision:
    """Read again later. A failed read never counts against the run: an outage must not lose it."""
    run, report = case.known, case.report
    if isinstance(report, RunNotFound | ReadFailed) and _is_stale(run, report.requested_at, case):
        return Changed(replace(run, polls=run.polls + 1))
    if isinstance(report, ReadFailed) and report.stays_due:
        return Changed(replace(run, polls=run.polls + 1))
    run = replace(run, polls=run.polls + 1, failures=run.failures + 1)
    pause = failure_pause(run.failures)
    if isinstance(report, ReadFailed) and report.retry_after is not None:
        pause = max(pause, _seconds(report.retry_after, at_most=timedelta(hours=1)))
    return Changed(replace(run, next_poll_at=case.after(pause)))


def _settle(case: _Case) -> Decision:
    """Settle the run with its outputs: the API shows its end."""
    report = case.report
    if not isinstance(report, RunRead):
        return Unchanged()
    run = case.run
    if run is None:
        if report.origin is None:
            return Unchanged()  # a read of a run that left the ledger
        run = _new_run(case, report.run_id, report.origin, callback_expected=False)
    snapshot = report.snapshot
    run = read_succeeded(with_snapshot(run, snapshot))
    state = RunState.COMPLETED if snapshot.status == "completed" else RunState.FAILED
    run = replace(
        run,
        state=state,
        settled_at=case.now,
        unconfirmed_reads=0,
        lost_reason=None,
        next_poll_at=None,
        verdict=None,
        error_code=run.error_code if state is RunState.FAILED else None,
        error_message=run.error_message if state is RunState.FAILED else None,
    )
    events = [Event.SETTLED]
    if run.charged_cost is None:
        run = replace(run, cost_due_at=case.now + case.policy.cost_window)
        run = replace(run, next_poll_at=_next_cost_read(run, case))
    else:
        events.append(Event.COST_FINAL)
    judged = _judge(run, case)
    return Changed(judged.run, snapshot.outputs, (*events, *judged.events))


def _set_cost(case: _Case) -> Decision:
    """Set the cost of a settled run, if the read has it, and refresh the URLs of its outputs."""
    run = case.known
    if run.cost_due_at is None or case.snapshot.charged_cost is None:
        decision = _await_cost(case)
        return (
            replace(decision, refreshed=_outputs_as_read(case.snapshot))
            if isinstance(decision, Changed)
            else decision
        )
    run = replace(
        run,
        charged_cost=case.snapshot.charged_cost,
        cost_due_at=None,
        next_poll_at=None,
        polls=run.polls + 1,
    )
    return Changed(run, events=(Event.COST_FINAL,), refreshed=_outputs_as_read(case.snapshot))


def _outputs_as_read(snapshot: Snapshot) -> tuple[Output, ...]:
    """Return the outputs of a read without the ids that FLORA did not give."""
    return tuple(
        dataclasses.replace(output, output_id="") if output.position in snapshot.unnamed else output
        for output in snapshot.outputs
    )


def _await_cost(case: _Case) -> Decision:
    """Read a settled run again for its missing cost, or declare the cost final once time is up."""
    run = case.known
    if run.cost_due_at is None:
        return _end_reread(case)
    over = case.now >= run.cost_due_at
    run = replace(run, polls=run.polls + 1)
    if over:
        return Changed(replace(run, cost_due_at=None, next_poll_at=None), events=(Event.COST_FINAL,))
    return Changed(replace(run, next_poll_at=_next_cost_read(run, case)))


def _end_reread(case: _Case) -> Decision:
    """End a requested read of a settled run; a failed one is repeated."""
    run = case.known
    if run.next_poll_at is None:
        return Unchanged()  # no read was requested: a list contained it
    if isinstance(case.report, ReadFailed):
        return _back_off(case)
    return Changed(replace(run, polls=run.polls + 1, failures=0, next_poll_at=None))


def _dispute(case: _Case) -> Decision:
    """Mark the run as diverged: the API shows another end than before. The first end stays."""
    decision = _await_cost(case)  # if the cost is missing, the next read must not be due at once
    if case.known.verdict is Verdict.DIVERGED:
        return decision
    run, events = (decision.run, decision.events) if isinstance(decision, Changed) else (case.known, ())
    return Changed(
        replace(run, verdict=Verdict.DIVERGED, verdict_due_at=None), events=(Event.DIVERGED, *events)
    )


def _read_now(case: _Case) -> Decision:
    """Make the run due for a read now."""
    return Changed(replace(case.known, next_poll_at=case.now))


def _reopen(case: _Case) -> Decision:
    """Reopen a lost run for which a read was requested."""
    deadline_at = case.now + case.policy.deadline
    return Changed(
        replace(
            case.known,
            state=RunState.OPEN,
            lost_reason=None,
            next_poll_at=case.now,
            deadline_at=deadline_at,
            unconfirmed_reads=0,
            missing=0,
            missing_since=None,
        )
    )


def _expire(case: _Case) -> Decision:
    """Judge a settled run as recovered: its callback has expired."""
    run = case.known
    if run.verdict_due_at is None or case.now < run.verdict_due_at:
        return Unchanged()
    return Changed(replace(run, verdict=Verdict.RECOVERED, verdict_due_at=None))


# fmt: off
_STATES = (None, *RunState)
_RULES: Mapping[Kind, tuple[_Rule, ...]] = {
    #                        unknown   OPEN       REPORTED   COMPLETED    FAILED       LOST
    Kind.REGISTERED:        (_enter,   _enrich,   _enrich,   _enrich,     _enrich,     _enrich),
    Kind.CALLBACK_RECEIVED: (_accept,  _accept,   _accept,   _note,       _note,       _accept),
    Kind.RUNNING:           (_enter,   _wait,     _confirm,  _await_cost, _await_cost, _ignore),
    Kind.COMPLETED:         (_settle,  _settle,   _settle,   _set_cost,   _dispute,    _settle),
    Kind.EMPTY:             (_enter,   _confirm,  _confirm,  _await_cost, _await_cost, _ignore),
    Kind.FAILED:            (_settle,  _settle,   _settle,   _dispute,    _set_cost,   _settle),
    Kind.NOT_FOUND:         (_ignore,  _miss,     _miss,     _await_cost, _await_cost, _ignore),
    Kind.READ_FAILED:       (_ignore,  _back_off, _back_off, _await_cost, _await_cost, _ignore),
    Kind.READ_REQUESTED:    (_ignore,  _read_now, _read_now, _read_now,   _ignore,     _reopen),
    Kind.CALLBACK_EXPIRED:  (_ignore,  _ignore,   _ignore,   _expire,     _expire,     _ignore),
}
# fmt: on

TABLE: Mapping[tuple[RunState | None, Kind], _Rule] = {
    (state, kind): rule
    for kind, rules in _RULES.items()
    for state, rule in zip(_STATES, rules, strict=True)
}


# --- steps that rules share ---


def _new_run(case: _Case, run_id: str, origin: Origin, *, callback_expected: bool) -> Run:
    return Run(
        run_id=run_id,
        state=RunState.OPEN,
        origin=origin,
        first_seen_at=case.now,
        deadline_at=case.now + case.policy.deadline,
        callback_expected=callback_expected,
    )


def _is_stale(run: Run, requested_at: datetime, case: _Case) -> bool:
    """Return whether a read was requested before the callback arrived, and so could not know of it.

    A time of arrival in the future is ignored: the clock has been set back since.
    """
    return run.reported_at is not None and requested_at < run.reported_at <= case.now


def _seconds(number: float, *, at_most: timedelta) -> timedelta:
    """Return a pause that FLORA named, limited."""
    return timedelta(seconds=min(number, at_most.total_seconds()))


def _read_on(run: Run, case: _Case) -> Changed:
    return Changed(replace(run, next_poll_at=next_poll(run, case.policy, now=case.now, jitter=case.jitter)))


def _read_on_unless_overdue(run: Run, case: _Case) -> Changed:
    """Plan the next read, or give the run up if this conclusive read is past its deadline."""
    overdue = is_overdue(run, case.policy, now=case.now)
    return _lose(run, LostReason.DEADLINE) if overdue else _read_on(run, case)


def _lose(run: Run, reason: LostReason) -> Changed:
    lost = replace(run, state=RunState.LOST, lost_reason=reason, next_poll_at=None, losses=run.losses + 1)
    return Changed(lost, events=(Event.LOST,))


def _next_cost_read(run: Run, case: _Case) -> datetime:
    """Return when to read a missing cost: after 5 s, then with growing pauses.

    FLORA takes up to a minute to bill a run (FLORA contract, section 3).
    """
    since = case.now - (run.settled_at or case.now)
    return case.after(min(max(timedelta(seconds=5), since * 0.5), timedelta(minutes=2)))


def _judge(run: Run, case: _Case) -> Changed:
    """Give a settled run its verdict, or the time at which its callback expires."""
    verdict = run.verdict
    if run.callback_status is not None and verdict is not Verdict.DIVERGED:
        if run.callback_status.value != run.state.value:
            verdict = Verdict.DIVERGED
        elif run.reported_at is not None and run.reported_at <= callback_expires_at(run, case.policy):
            verdict = Verdict.MATCHED
        else:
            verdict = Verdict.LATE
    events = (
        (Event.DIVERGED,) if verdict is Verdict.DIVERGED and run.verdict is not Verdict.DIVERGED else ()
    )
    pending = verdict is None and run.callback_expected
    due_at = callback_expires_at(run, case.policy) if pending else None
    return Changed(replace(run, verdict=verdict, verdict_due_at=due_at), events=events)
