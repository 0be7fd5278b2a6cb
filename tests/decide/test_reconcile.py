"""The state table, cell by cell: what each report does to a run in each state, and what it must never do."""

from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Any, cast

import pytest
from msgspec.structs import replace

from receiver.decide import TABLE, Changed, Decision, Kind, Policy, Unchanged, kind_of, reconcile
from receiver.model import (
    CallbackExpired,
    CallbackStatus,
    Event,
    LostReason,
    Origin,
    Output,
    ReadAttempt,
    ReadFailed,
    ReadOutcome,
    ReadRequested,
    Report,
    Run,
    RunNotFound,
    RunRead,
    RunState,
    Verdict,
)
from tests.support.core import NOW, OUTPUT, POLICY, a_callback_received, a_read, a_registration, a_run

LATER = NOW + timedelta(seconds=30)
STATES: tuple[RunState | None, ...] = (None, *RunState)

REPORTS: dict[Kind, Report] = {
    Kind.REGISTERED: a_registration(technique_id="tech_1", metadata={"market": "DE"}),
    Kind.CALLBACK_RECEIVED: a_callback_received(received_at=LATER),
    Kind.RUNNING: a_read("running", LATER, progress=40),
    Kind.COMPLETED: a_read("completed", LATER, charged_cost=0.5),
    Kind.EMPTY: a_read("completed", LATER, outputs=()),
    Kind.FAILED: a_read("failed", LATER, charged_cost=0.5, error_code="model_timeout"),
    Kind.NOT_FOUND: RunNotFound("run_1", LATER, conclusive=True),
    Kind.READ_FAILED: ReadFailed("run_1", LATER),
    Kind.READ_REQUESTED: ReadRequested("run_1", LATER),
    Kind.CALLBACK_EXPIRED: CallbackExpired("run_1"),
}


def decide(run: Run | None, report: Report, *, now: datetime = LATER, policy: Policy = POLICY) -> Decision:
    return reconcile(run, report, policy, now=now, jitter=0.0)


def decide_change(
    run: Run | None, report: Report, *, now: datetime = LATER, policy: Policy = POLICY
) -> Changed:
    decision = decide(run, report, now=now, policy=policy)
    assert isinstance(decision, Changed), f"{kind_of(report)} left {run and run.state} as it was"
    return decision


def after(run: Run | None, report: Report, *, now: datetime = LATER, policy: Policy = POLICY) -> Run:
    return decide_change(run, report, now=now, policy=policy).run


def in_state(state: RunState | None) -> Run | None:
    """Return a run in `state` for which the table's effect shows: registered while little was known of it."""
    if state is None:
        return None
    return a_run(state, run_type=None, origin=Origin.DISCOVERED, callback_expected=False)


def a_settled_run(state: RunState, **fields: Any) -> Run:
    """Return a settled run whose cost is still asked for."""
    return a_run(state, cost_due_at=NOW + timedelta(minutes=10), next_poll_at=NOW, **fields)


# --- what a cell does --------------------------------------------------------------------------------------------


def changes_nothing(state: RunState | None, kind: Kind) -> None:
    assert decide(in_state(state), REPORTS[kind]) == Unchanged()


def enters(state: RunState | None, kind: Kind) -> None:
    report = REPORTS[kind]
    if kind is not Kind.REGISTERED:
        changes_nothing(state, kind)  # a read of a run that left the ledger
        report = replace(cast("RunRead", report), origin=Origin.DISCOVERED)
    run = after(None, report)
    assert (run.state, run.first_seen_at, run.deadline_at) == (
        RunState.OPEN,
        LATER,
        LATER + POLICY.deadline,
    )
    assert run.next_poll_at is not None
    assert run.next_poll_at > LATER


def enriches(state: RunState | None, kind: Kind) -> None:
    before = in_state(state)
    run = after(before, REPORTS[kind])
    assert run.state is state
    assert (run.technique_id, run.metadata, run.origin) == ("tech_1", {"market": "DE"}, Origin.TRACKED)
    assert decide(run, REPORTS[kind]) == Unchanged()


def is_heard(state: RunState | None, kind: Kind) -> None:
    run = after(in_state(state), REPORTS[kind])
    assert (run.state, run.callback_status) == (RunState.REPORTED, CallbackStatus.COMPLETED)
    assert run.next_poll_at == LATER
    assert run.lost_reason is None
    assert decide_change(in_state(state), REPORTS[kind]).outputs == ()


def is_heard_again(state: RunState | None, kind: Kind) -> None:
    assert decide(in_state(state), REPORTS[kind]) == Unchanged()
    run = after(in_state(state), a_callback_received(CallbackStatus.FAILED))
    assert (run.state, run.callback_status) == (RunState.REPORTED, CallbackStatus.CONFLICTING)


def is_heard_of(state: RunState | None, kind: Kind) -> None:
    before = in_state(state)
    assert before is not None
    callback_status = CallbackStatus(before.state.value)
    run = after(before, a_callback_received(callback_status, LATER))
    assert run == replace(
        before,
        callback_status=callback_status,
        reported_at=LATER,
        verdict=Verdict.MATCHED,
        run_type=None,
        origin=Origin.CALLBACK,
        callback_expected=True,
    )
    assert decide(run, a_callback_received(callback_status, LATER)) == Unchanged()


def waits(state: RunState | None, kind: Kind) -> None:
    run = after(in_state(state), REPORTS[kind])
    assert (run.state, run.progress, run.polls, run.unconfirmed_reads) == (state, 40, 1, 0)
    assert run.next_poll_at is not None
    assert run.next_poll_at > LATER


def settles(state: RunState | None, kind: Kind) -> None:
    report = REPORTS[kind]
    if state is None:
        changes_nothing(state, kind)
        report = replace(cast("RunRead", report), origin=Origin.DISCOVERED)
    decision = decide_change(in_state(state), report)
    run = decision.run
    assert run.state is RunState(kind.value)
    assert (run.settled_at, run.next_poll_at, run.lost_reason) == (LATER, None, None)
    assert decision.outputs == ((OUTPUT,) if kind is Kind.COMPLETED else ())
    assert decision.events[:2] == (Event.SETTLED, Event.COST_FINAL)
    assert run.error_code == ("model_timeout" if kind is Kind.FAILED else None)


def climbs(state: RunState | None, kind: Kind) -> None:
    decision = decide_change(in_state(state), REPORTS[kind])
    assert (decision.run.state, decision.run.unconfirmed_reads, decision.run.polls) == (state, 1, 1)
    assert decision.run.next_poll_at == LATER + POLICY.confirmation_delays[1]
    assert (decision.outputs, decision.events) == ((), ())


def misses(state: RunState | None, kind: Kind) -> None:
    run = after(in_state(state), REPORTS[kind])
    assert (run.state, run.missing, run.missing_since, run.failures) == (state, 1, LATER, 0)
    wrong_route = after(in_state(state), RunNotFound("run_1", LATER, conclusive=False))
    assert (wrong_route.missing, wrong_route.failures) == (0, 1)


def backs_off(state: RunState | None, kind: Kind) -> None:
    run = after(in_state(state), REPORTS[kind])
    assert (run.state, run.failures, run.unconfirmed_reads, run.missing) == (state, 1, 0, 0)
    assert run.next_poll_at == LATER + timedelta(seconds=1)


def hurries(state: RunState | None, kind: Kind) -> None:
    assert after(in_state(state), REPORTS[kind]) == replace(in_state(state) or a_run(), next_poll_at=LATER)


def reopens(state: RunState | None, kind: Kind) -> None:
    run = after(in_state(state), REPORTS[kind])
    assert (run.state, run.next_poll_at, run.lost_reason) == (RunState.OPEN, LATER, None)
    assert run.deadline_at == LATER + POLICY.deadline


def bills(state: RunState | None, kind: Kind) -> None:
    changes_nothing(state, kind)
    assert state is not None
    decision = decide_change(a_settled_run(state), REPORTS[kind])
    assert (decision.run.charged_cost, decision.run.cost_due_at, decision.run.next_poll_at) == (
        0.5,
        None,
        None,
    )
    assert (decision.events, decision.outputs) == ((Event.COST_FINAL,), ())
    assert decision.run.state is state


def asks_for_the_bill(state: RunState | None, kind: Kind) -> None:
    """Nothing but the next read of the cost; that one is never due at once, or we would ask without pause."""
    changes_nothing(state, kind)
    assert state is not None
    before = a_settled_run(state)
    decision = decide_change(before, REPORTS[kind])
    assert decision.run.next_poll_at is not None
    assert decision.run.next_poll_at >= LATER + timedelta(seconds=5)
    failed = int(kind is Kind.READ_FAILED)
    assert decision == Changed(
        replace(before, polls=1, failed_polls=failed, next_poll_at=decision.run.next_poll_at)
    )
    over = decide_change(before, REPORTS[kind], now=NOW + timedelta(minutes=10))
    assert (over.run.cost_due_at, over.run.next_poll_at, over.events) == (None, None, (Event.COST_FINAL,))


def disputes(state: RunState | None, kind: Kind) -> None:
    assert state is not None
    decision = decide_change(in_state(state), REPORTS[kind])
    assert decision == Changed(
        replace(in_state(state) or a_run(), verdict=Verdict.DIVERGED), events=(Event.DIVERGED,)
    )
    assert decide(decision.run, REPORTS[kind]) == Unchanged()
    asking = decide_change(a_settled_run(state, verdict_due_at=NOW + timedelta(minutes=7)), REPORTS[kind])
    assert asking.run.next_poll_at is not None
    assert asking.run.next_poll_at >= LATER + timedelta(seconds=5)
    assert (asking.run.verdict, asking.run.verdict_due_at) == (Verdict.DIVERGED, None)
    again = decide_change(asking.run, REPORTS[kind])
    assert again.events == ()
    assert again.run.next_poll_at is not None
    assert again.run.next_poll_at > LATER


def writes_off(state: RunState | None, kind: Kind) -> None:
    changes_nothing(state, kind)
    assert state is not None
    due = a_run(state, verdict_due_at=LATER)
    assert decide(due, REPORTS[kind], now=LATER - timedelta(milliseconds=1)) == Unchanged()
    assert after(due, REPORTS[kind]) == replace(due, verdict=Verdict.RECOVERED, verdict_due_at=None)


Effect = Callable[[RunState | None, Kind], None]
# fmt: off
GRID: dict[RunState | None, tuple[Effect, ...]] = {
    #                    REGISTERED HEARD           RUNNING            COMPLETED EMPTY              FAILED
    None:               (enters,   is_heard,       enters,            settles,  enters,            settles,
    #                    MISSING             UNANSWERED         ASKED    SILENT
                         changes_nothing,            changes_nothing,           changes_nothing, changes_nothing),
    RunState.OPEN:      (enriches, is_heard,       waits,             settles,  climbs,            settles,
                         misses,             backs_off,         hurries, changes_nothing),
    RunState.REPORTED:  (enriches, is_heard_again, climbs,            settles,  climbs,            settles,
                         misses,             backs_off,         hurries, changes_nothing),
    RunState.COMPLETED: (enriches, is_heard_of,    asks_for_the_bill, bills,    asks_for_the_bill, disputes,
                         asks_for_the_bill,  asks_for_the_bill, hurries, writes_off),
    RunState.FAILED:    (enriches, is_heard_of,    asks_for_the_bill, disputes, asks_for_the_bill, bills,
                         asks_for_the_bill,  asks_for_the_bill, changes_nothing, writes_off),
    RunState.LOST:      (enriches, is_heard,       changes_nothing,           settles,  changes_nothing,           settles,
                         changes_nothing,            changes_nothing,           reopens, changes_nothing),
}
# fmt: on
CELLS = [
    (state, kind, effect) for state, row in GRID.items() for kind, effect in zip(Kind, row, strict=True)
]


@pytest.mark.parametrize(
    ("state", "kind", "effect"),
    CELLS,
    ids=[
        f"{state.value if state else 'unknown'}-{kind.value}-{effect.__name__}"
        for state, kind, effect in CELLS
    ],
)
def test_every_cell_of_the_table(state: RunState | None, kind: Kind, effect: Effect) -> None:
    """Each pair of state and report has the effect that the table names."""
    assert kind_of(REPORTS[kind]) is kind
    effect(state, kind)


def test_the_table_is_closed() -> None:
    """Every pair has a cell, so that no report ever raises; and this test knows every cell."""
    assert (
        set(TABLE) == {(state, kind) for state in STATES for kind in Kind} == {(s, k) for s, k, _ in CELLS}
    )


@pytest.mark.parametrize("state", [RunState.COMPLETED, RunState.FAILED])
@pytest.mark.parametrize("kind", list(Kind))
def test_a_settled_run_is_never_left(state: RunState, kind: Kind) -> None:
    """Whatever comes: the state, the time of settling and the outputs stay; nothing is dispatched as settled again."""
    for run in (
        a_run(state),
        a_settled_run(state),
        a_run(state, verdict_due_at=NOW),
        a_run(state, verdict=Verdict.DIVERGED),
    ):
        decision = decide(run, REPORTS[kind])
        if isinstance(decision, Changed):
            assert (decision.run.state, decision.run.settled_at) == (state, NOW)
            assert decision.outputs == ()
            assert Event.SETTLED not in decision.events


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("kind", list(Kind))
def test_no_read_leaves_a_run_due_at_once(state: RunState | None, kind: Kind) -> None:
    """After an answered or unanswered read, the next one is later, or we would ask FLORA without pause."""
    if (
        kind in {Kind.REGISTERED, Kind.CALLBACK_RECEIVED, Kind.READ_REQUESTED, Kind.CALLBACK_EXPIRED}
        or state is None
    ):
        return
    for run in (
        in_state(state),
        a_settled_run(state) if state in {RunState.COMPLETED, RunState.FAILED} else None,
    ):
        if run is None or run.next_poll_at is None:
            continue
        decision = decide(run, REPORTS[kind])
        assert isinstance(decision, Changed), "a due read that changes nothing is due again at once"
        assert decision.run.next_poll_at is None or decision.run.next_poll_at > LATER


def test_a_settled_run_that_somebody_asks_for_is_read_once_more() -> None:
    """For the newest URLs of its outputs. Only an answer ends the asking; what was settled stays."""
    asked = after(a_run(RunState.COMPLETED), ReadRequested("run_1", LATER))
    assert asked.next_poll_at == LATER
    refreshed = (
        Output(OUTPUT.position, OUTPUT.output_id, OUTPUT.type, "https://media.flora.example/again.png"),
    )
    decision = decide_change(asked, a_read("completed", LATER, outputs=refreshed))
    assert decision == Changed(replace(asked, polls=1, next_poll_at=None), refreshed=refreshed)
    for unhelpful in (Kind.RUNNING, Kind.EMPTY, Kind.NOT_FOUND):
        assert after(asked, REPORTS[unhelpful]).next_poll_at is None
    unanswered = decide_change(asked, REPORTS[Kind.READ_FAILED])
    assert unanswered.run.next_poll_at is not None
    assert unanswered.run.next_poll_at > LATER


def test_reads_for_the_bill_bring_new_urls_too() -> None:
    """A run whose cost is awaited is read anyway."""
    decision = decide_change(a_settled_run(RunState.COMPLETED), a_read("completed", LATER))
    assert decision.refreshed == (OUTPUT,)


# --- lost --------------------------------------------------------------------------------------------------------


def after_404(run: Run, at: timedelta) -> Run:
    return after(run, RunNotFound("run_1", NOW + at, conclusive=True), now=NOW + at)


def test_five_404s_over_ten_minutes_lose_a_run() -> None:
    """Not four, not five within a shorter time; the fifth after ten minutes does, and says why."""
    run = a_run()
    for minute in (0, 2, 4, 6):
        run = after_404(run, timedelta(minutes=minute))
    assert after_404(run, timedelta(minutes=10) - timedelta(seconds=1)).state is RunState.OPEN
    four = replace(run, missing=3)
    assert after_404(four, timedelta(minutes=60)).state is RunState.OPEN
    decision = decide_change(
        run,
        RunNotFound("run_1", NOW + timedelta(minutes=10), conclusive=True),
        now=NOW + timedelta(minutes=10),
    )
    assert (decision.run.state, decision.run.lost_reason) == (RunState.LOST, LostReason.NOT_FOUND)
    assert (decision.run.next_poll_at, decision.run.losses, decision.events) == (None, 1, (Event.LOST,))


def test_any_answer_between_404s_starts_the_count_again() -> None:
    """In a row means in a row."""
    run = a_run()
    for minute in (0, 2, 4, 6):
        run = after_404(run, timedelta(minutes=minute))
    run = after(run, a_read("running", NOW + timedelta(minutes=7)), now=NOW + timedelta(minutes=7))
    assert (run.missing, run.missing_since) == (0, None)
    assert after_404(run, timedelta(minutes=20)).state is RunState.OPEN


def test_outages_never_lose_a_run() -> None:
    """No number of unanswered reads, and no 404 on a wrong route, loses a run, however far past its deadline."""
    run, now = a_run(deadline_at=NOW), NOW
    for day in range(200):
        now = NOW + timedelta(days=day)
        run = after(run, ReadFailed("run_1", now), now=now)
        run = after(run, RunNotFound("run_1", now, conclusive=False), now=now)
    assert run.state is RunState.OPEN
    assert run.next_poll_at is not None
    assert run.next_poll_at - now <= timedelta(seconds=300)


def test_a_404_streak_survives_a_clock_that_was_set_back() -> None:
    """A streak that began in a future that did not come begins now."""
    run = a_run(missing=4, missing_since=NOW + timedelta(days=365))
    assert after_404(run, timedelta(0)).missing_since == NOW


def test_the_deadline_needs_a_read() -> None:
    """Past the deadline, a read that is not terminal loses the run; before it, or without a read, nothing does."""
    run = a_run(deadline_at=LATER)
    assert (
        after(run, a_read("running", LATER), now=LATER - timedelta(milliseconds=1)).state is RunState.OPEN
    )
    decision = decide_change(run, a_read("running", LATER))
    assert (decision.run.state, decision.run.lost_reason) == (RunState.LOST, LostReason.DEADLINE)
    assert decision.events == (Event.LOST,)


def test_a_terminal_read_past_the_deadline_settles() -> None:
    """Late is not lost."""
    assert after(a_run(deadline_at=NOW), a_read("completed", LATER)).state is RunState.COMPLETED


@pytest.mark.parametrize("read", [a_read("running", LATER), a_read("completed", LATER, outputs=())])
def test_a_callback_after_the_deadline_gets_its_ladder(read: Report) -> None:
    """The API may lag behind a callback: a run must not be lost on the first read that does not show its end yet."""
    run = after(
        a_run(deadline_at=NOW), a_callback_received(received_at=LATER - timedelta(seconds=1)), now=LATER
    )
    run = after(run, read)
    assert (run.state, run.unconfirmed_reads) == (RunState.REPORTED, 1)


def climb(run: Run, status: str, times: int, **fields: Any) -> list[Changed]:
    """Read the run `times` times, each when it is due."""
    decisions = []
    for _ in range(times):
        assert run.next_poll_at is not None
        decisions.append(
            decide_change(run, a_read(status, run.next_poll_at, **fields), now=run.next_poll_at)
        )
        run = decisions[-1].run
    return decisions


@pytest.mark.parametrize("state", [RunState.OPEN, RunState.REPORTED])
def test_completed_without_outputs_is_never_an_empty_success(state: RunState) -> None:
    """It climbs the ladder, and past its end it is lost, loudly, with its reason."""
    steps = len(POLICY.confirmation_delays)
    decisions = climb(a_run(state), "completed", steps, outputs=())
    assert {decision.run.state for decision in decisions[:-1]} == {state}
    assert all(decision.events == () for decision in decisions[:-1])
    last = decisions[-1]
    assert (last.run.state, last.run.lost_reason) == (RunState.LOST, LostReason.NO_OUTPUTS)
    assert last.events == (Event.LOST,)


def test_outputs_that_appear_on_the_ladder_settle_the_run() -> None:
    decisions = climb(
        a_run(RunState.REPORTED), "completed", len(POLICY.confirmation_delays) - 1, outputs=()
    )
    decision = decide_change(decisions[-1].run, a_read("completed", LATER))
    assert (decision.run.state, decision.outputs) == (RunState.COMPLETED, (OUTPUT,))


def test_a_callback_that_the_api_never_confirms_diverges_once() -> None:
    """Past the ladder it is an alert and a verdict, no state: the run is read on, and the alert is not repeated."""
    decisions = climb(a_run(RunState.REPORTED), "running", len(POLICY.confirmation_delays) + 5)
    events = [decision.events for decision in decisions]
    place = len(POLICY.confirmation_delays) - 1
    assert events[:place] == [()] * place
    assert events[place] == (Event.DIVERGED,)
    assert events[place + 1 :] == [()] * 5
    assert (decisions[-1].run.state, decisions[-1].run.verdict) == (RunState.REPORTED, Verdict.DIVERGED)
    assert decisions[-1].run.next_poll_at is not None


def test_a_diverged_run_still_settles_and_is_judged_by_its_facts() -> None:
    """The API was slow after all: what counts is that callback and end agree."""
    run = climb(a_run(RunState.REPORTED), "running", len(POLICY.confirmation_delays))[-1].run
    assert after(run, a_read("completed", LATER)).verdict is Verdict.MATCHED
    assert after(run, a_read("failed", LATER)).verdict is Verdict.DIVERGED


def test_a_diverged_run_is_lost_at_its_deadline() -> None:
    run = climb(a_run(RunState.REPORTED), "running", len(POLICY.confirmation_delays))[-1].run
    run = replace(run, next_poll_at=run.deadline_at)
    decision = decide_change(run, a_read("running", run.deadline_at), now=run.deadline_at)
    assert (decision.run.state, decision.events) == (RunState.LOST, (Event.LOST,))


@pytest.mark.parametrize("state", [RunState.OPEN, RunState.REPORTED])
@pytest.mark.parametrize("kind", [Kind.RUNNING, Kind.EMPTY, Kind.NOT_FOUND, Kind.READ_FAILED])
def test_a_read_asked_before_the_callback_changes_nothing_but_polls(state: RunState, kind: Kind) -> None:
    """It could not know; the read that the callback asked for stays due."""
    if state is RunState.OPEN and kind is Kind.RUNNING:
        return  # reopened by hand: there is no callback to be behind of
    run = a_run(
        state, callback_status=CallbackStatus.COMPLETED, reported_at=LATER, next_poll_at=LATER, failures=8
    )
    stale = replace(cast("RunRead", REPORTS[kind]), requested_at=LATER - timedelta(milliseconds=1))
    assert decide(run, stale) == Changed(replace(run, polls=1, failed_polls=int(kind is Kind.READ_FAILED)))
    refreshed = replace(cast("RunRead", REPORTS[kind]), requested_at=LATER)
    assert after(run, refreshed).next_poll_at != LATER


@pytest.mark.parametrize("kind", [Kind.RUNNING, Kind.EMPTY, Kind.NOT_FOUND, Kind.READ_FAILED])
def test_a_callback_from_a_future_that_did_not_come_does_not_make_us_spin(kind: Kind) -> None:
    """The clock was set back: if every read counted as too old, the run would be due at once for ever."""
    run = a_run(RunState.REPORTED, reported_at=NOW + timedelta(days=365))
    decision = decide_change(run, REPORTS[kind])
    assert decision.run.next_poll_at is not None
    assert decision.run.next_poll_at > LATER


def test_a_terminal_read_is_never_too_old() -> None:
    """A run that is over stays over: asked before the callback or not, its end settles it."""
    run = a_run(RunState.REPORTED, reported_at=LATER)
    assert after(run, a_read("completed", NOW)).state is RunState.COMPLETED


@pytest.mark.parametrize("reason", list(LostReason))
def test_a_lost_run_comes_back(reason: LostReason) -> None:
    """By a callback, by a terminal read on its way, or by hand; lost again, it is a new loss."""
    lost = a_run(
        RunState.LOST,
        lost_reason=reason,
        unconfirmed_reads=9,
        missing=5,
        missing_since=NOW,
        deadline_at=NOW,
    )
    heard = after(lost, a_callback_received(received_at=LATER))
    asked = after(lost, ReadRequested("run_1", LATER))
    assert (heard.state, asked.state) == (RunState.REPORTED, RunState.OPEN)
    for run in (heard, asked):
        assert (run.unconfirmed_reads, run.missing, run.missing_since) == (0, 0, None)
        assert (run.deadline_at, run.next_poll_at, run.losses) == (LATER + POLICY.deadline, LATER, 1)
        # Reads go on as for a new run: nothing of the old count loses it at once.
        assert after(run, a_read("running", LATER)).state is run.state
        assert after(run, RunNotFound("run_1", LATER, conclusive=True)).state is run.state
    assert after(lost, a_read("completed", LATER)).state is RunState.COMPLETED
    due = replace(asked, next_poll_at=asked.deadline_at)
    again = decide_change(due, a_read("running", due.deadline_at), now=due.deadline_at)
    assert (again.run.losses, again.events) == (2, (Event.LOST,))


# --- verdicts ----------------------------------------------------------------------------------------------------


def by_poll(status: str = "completed") -> Run:
    """Return a run that a poll settled at NOW, ended at NOW, its callback expected."""
    return after(a_run(), a_read(status, NOW, completed_at=NOW, charged_cost=0.1), now=NOW)


def test_a_callback_before_the_read_matches() -> None:
    run = after(a_run(), a_callback_received(received_at=NOW))
    settled_run = after(run, a_read("completed", LATER, completed_at=NOW))
    assert (settled_run.verdict, settled_run.verdict_due_at) == (Verdict.MATCHED, None)


def test_a_poll_settles_without_a_verdict_at_first() -> None:
    """A page that shows a run seconds before its callback comes is no broken channel."""
    run = by_poll()
    assert (run.verdict, run.verdict_due_at) == (None, NOW + POLICY.callback_window)
    assert (
        after(run, a_callback_received(received_at=NOW + POLICY.callback_window)).verdict is Verdict.MATCHED
    )


def test_a_callback_that_never_comes_is_written_off() -> None:
    gone = NOW + POLICY.callback_window
    run = after(by_poll(), CallbackExpired("run_1"), now=gone)
    assert (run.verdict, run.verdict_due_at) == (Verdict.RECOVERED, None)
    late = after(
        run, a_callback_received(received_at=gone + timedelta(seconds=1)), now=gone + timedelta(seconds=1)
    )
    assert late.verdict is Verdict.LATE


def test_a_callback_in_time_matches_although_it_was_written_off_meanwhile() -> None:
    """The verdict follows from when it arrived, not from when we got round to it."""
    gone = NOW + POLICY.callback_window
    run = after(by_poll(), CallbackExpired("run_1"), now=gone)
    assert (
        after(run, a_callback_received(received_at=gone), now=gone + timedelta(minutes=1)).verdict
        is Verdict.MATCHED
    )


def test_nobody_is_blamed_for_a_callback_that_was_not_expected() -> None:
    run = after(a_run(callback_expected=False), a_read("completed", LATER))
    assert (run.verdict, run.verdict_due_at) == (None, None)


def test_a_start_that_comes_last_still_expects_its_callback() -> None:
    """Tracked without a callback, settled by a poll, then known as started with one: its silence must count."""
    run = after(a_run(callback_expected=False), a_read("completed", NOW), now=NOW)
    run = after(run, a_registration(origin=Origin.STARTED, callback_expected=True))
    assert run.verdict_due_at == NOW + POLICY.callback_window


@pytest.mark.parametrize(
    ("callback_status", "status"),
    [
        (CallbackStatus.FAILED, "completed"),
        (CallbackStatus.COMPLETED, "failed"),
        (CallbackStatus.CONFLICTING, "completed"),
    ],
)
def test_a_contradiction_diverges_in_either_order(callback_status: CallbackStatus, status: str) -> None:
    """The API decides about the state; that the callback said otherwise is an alert, raised once."""
    early = decide_change(after(a_run(), a_callback_received(callback_status)), a_read(status, LATER))
    late = decide_change(by_poll(status), a_callback_received(callback_status))
    for decision in (early, late):
        assert (decision.run.state.value, decision.run.verdict) == (status, Verdict.DIVERGED)
        assert decision.events.count(Event.DIVERGED) == 1
        assert decision.run.verdict_due_at is None
        assert decide(decision.run, CallbackExpired("run_1"), now=LATER + timedelta(days=1)) == Unchanged()


def test_an_alert_of_divergence_is_never_written_off() -> None:
    """A run that the API contradicted itself about stays diverged when its callback does not come."""
    run = after(by_poll(), a_read("failed", LATER))
    assert run.verdict is Verdict.DIVERGED
    assert decide(run, CallbackExpired("run_1"), now=NOW + timedelta(days=1)) == Unchanged()


# --- costs -------------------------------------------------------------------------------------------------------


def test_a_missing_cost_is_asked_for_ever_more_slowly_and_then_no_more() -> None:
    """At first after 5 s, at most 2 min apart, and after ten minutes it stays unknown: said so once."""
    run = after(a_run(), a_read("completed", NOW), now=NOW)
    assert run.next_poll_at == NOW + timedelta(seconds=5)
    gaps: list[timedelta] = []
    events: list[Event] = []
    while run.next_poll_at is not None:
        now = run.next_poll_at
        decision = decide_change(run, a_read("completed", now), now=now)
        run = decision.run
        events += decision.events
        if run.next_poll_at is not None:
            gaps.append(run.next_poll_at - now)
    assert gaps == sorted(gaps)
    assert gaps[-1] <= timedelta(minutes=2)
    assert len(gaps) < 20
    assert events == [Event.COST_FINAL]
    assert (run.charged_cost, run.cost_due_at) == (None, None)


def test_a_free_run_has_a_cost() -> None:
    """0 is a cost: it must not be asked for again."""
    decision = decide_change(a_run(), a_read("completed", LATER, charged_cost=0.0))
    assert (decision.run.cost_due_at, decision.events) == (None, (Event.SETTLED, Event.COST_FINAL))


# --- numbers from outside ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("seconds", [1e300, float("inf"), 1e9])
def test_no_pause_that_flora_names_is_too_long_for_us(seconds: float) -> None:
    """A number from outside must neither break the transaction nor put a run off for days."""
    run = after(a_run(), ReadFailed("run_1", LATER, retry_after=seconds))
    assert run.next_poll_at == LATER + timedelta(hours=1)
    entered = after(None, a_registration(estimated_seconds=seconds))
    assert entered.next_poll_at == LATER + POLICY.max_gap


def test_flora_s_own_words_about_pauses_are_heeded() -> None:
    """Never sooner than `retry-after`, and never sooner than our own back-off."""
    assert after(a_run(), ReadFailed("run_1", LATER, retry_after=20)).next_poll_at == LATER + timedelta(
        seconds=20
    )
    tired = a_run(failures=8)
    assert after(tired, ReadFailed("run_1", LATER, retry_after=1)).next_poll_at == LATER + timedelta(
        seconds=256
    )
    assert after(None, a_registration(estimated_seconds=25)).next_poll_at == LATER + timedelta(seconds=25)


def test_what_a_start_knows_is_kept_and_what_a_track_guesses_is_not() -> None:
    """The first to name a fact wins; who started a run knows best whether a callback comes."""
    run = after(None, a_registration(origin=Origin.TRACKED, callback_expected=False, metadata={"a": 1}))
    run = after(
        run,
        a_registration(
            origin=Origin.STARTED, callback_expected=True, metadata={"a": 2, "b": 3}, quoted_cost=0.2
        ),
    )
    assert (run.origin, run.callback_expected, run.quoted_cost) == (Origin.STARTED, True, 0.2)
    assert run.metadata == {"a": 1, "b": 3}
    assert decide(run, a_registration(origin=Origin.TRACKED, callback_expected=False)) == Unchanged()


def test_learning_the_technique_makes_a_reported_run_due() -> None:
    """Its callback came, and only now do we know the route on which it can be read."""
    run = a_run(RunState.REPORTED, run_type="technique", next_poll_at=NOW + timedelta(minutes=5))
    registration = a_registration(technique_id="tech_1", run_type="technique", registered_at=LATER)
    assert after(run, registration).next_poll_at == LATER


@pytest.mark.parametrize("state", [RunState.OPEN, RunState.REPORTED])
def test_a_read_that_failed_is_not_counted_as_a_read(state: RunState) -> None:
    """Nor is one whose key was refused; an answer that has to wait for something else is."""
    run = a_run(state)
    for report, failed in (
        (ReadFailed("run_1", LATER), 1),
        (ReadFailed("run_1", LATER, attempt=ReadAttempt(LATER, "run", ReadOutcome.FAILED)), 1),
        (ReadFailed("run_1", LATER, attempt=ReadAttempt(LATER, "run", ReadOutcome.RETURNED)), 0),
        (RunNotFound("run_1", LATER, conclusive=True), 0),
        (a_read("running", LATER), 0),
    ):
        read = after(run, report)
        assert (read.polls, read.failed_polls) == (1, failed)
    due = after(run, ReadFailed("run_1", LATER, stays_due=True))
    assert due == replace(run, polls=1, failed_polls=1)
