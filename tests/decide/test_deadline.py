"""A deadline by a clock that was wrong, or while nobody looked, gives no run up."""

from collections.abc import Callable
from datetime import UTC, datetime, timedelta

import pytest

from receiver.decide import Changed, reconcile
from receiver.decide.deadline import is_overdue
from receiver.model import (
    Event,
    LostReason,
    ReadFailed,
    ReadRequested,
    Report,
    Run,
    RunNotFound,
    RunState,
)
from tests.support.core import NOW, POLICY, a_callback_received, a_read, a_registration, a_run

BEHIND = timedelta(days=3)
DAY, MINUTE = timedelta(days=1), timedelta(minutes=1)


def apply(run: Run | None, report: Report, now: datetime) -> Run:
    decision = reconcile(run, report, POLICY, now=now, jitter=0.0)
    assert isinstance(decision, Changed)
    return decision.run


def entered(at: datetime) -> Run:
    """Return a run as the ledger has it when it has just been registered."""
    return apply(None, a_registration(registered_at=at), at)


def read_while_due(run: Run, make: Callable[[datetime], Report], *, until: datetime) -> Run:
    """Read a run each time it is due, until it is given up or a time has come."""
    while run.next_poll_at is not None and run.next_poll_at <= until:
        run = apply(run, make(run.next_poll_at), run.next_poll_at)
    return run


def running(at: datetime) -> Report:
    return a_read("running", at)


def missing(at: datetime) -> Report:
    return RunNotFound("run_1", at, conclusive=True)


@pytest.mark.parametrize("created_at", [NOW, None], ids=["created_at", "no created_at"])
@pytest.mark.parametrize(
    "first",
    [None, a_callback_received(received_at=NOW), ReadRequested("run_1", NOW), ReadFailed("run_1", NOW)],
)
def test_a_clock_that_was_behind_and_is_put_right(
    created_at: datetime | None, first: Report | None
) -> None:
    """A run that is seconds old is read on, whatever is reported first at the right time."""
    run = entered(NOW - BEHIND)
    now = NOW + timedelta(seconds=5)
    if first is not None:
        run = apply(run, first, now)
    for _ in range(20):
        run = apply(run, a_read("running", now, created_at=created_at), now)
        assert run.state in {RunState.OPEN, RunState.REPORTED}
        assert run.next_poll_at is not None
        now = run.next_poll_at
    over = a_read("completed", now, created_at=created_at, charged_cost=1.0)
    assert apply(run, over, now).state is RunState.COMPLETED


@pytest.mark.parametrize("created_at", [NOW, None], ids=["created_at", "no created_at"])
def test_a_run_that_never_ends_is_given_up_all_the_same(created_at: datetime | None) -> None:
    """A day after it was seen by the right clock; and one that was always right needs no longer."""
    behind = apply(entered(NOW - BEHIND), a_read("running", NOW, created_at=created_at), NOW)
    always = apply(entered(NOW), a_read("running", NOW + MINUTE, created_at=created_at), NOW + MINUTE)
    for run in (behind, always):
        assert read_while_due(run, running, until=NOW + DAY - MINUTE).state is RunState.OPEN
        lost = read_while_due(run, running, until=NOW + DAY + timedelta(minutes=30))
        assert (lost.state, lost.lost_reason, lost.losses) == (RunState.LOST, LostReason.DEADLINE, 1)


def test_a_clock_that_jumps_ahead() -> None:
    """The jump is no time in which the run was seen not to end."""
    run = apply(entered(NOW), running(NOW + MINUTE), NOW + MINUTE)
    ahead = NOW + timedelta(days=365)
    assert (
        read_while_due(apply(run, running(ahead), ahead), running, until=ahead + DAY / 2).state
        is RunState.OPEN
    )


def test_an_outage_counts_once() -> None:
    """While nothing can be read, no deadline runs; it goes on where it was, not from the beginning."""
    run = read_while_due(entered(NOW), running, until=NOW + DAY / 2)
    back = NOW + DAY / 2 + BEHIND
    run = apply(run, running(back), back)
    assert read_while_due(run, running, until=back + DAY / 2 - MINUTE).state is RunState.OPEN
    assert read_while_due(run, running, until=back + DAY / 2 + timedelta(minutes=30)).state is RunState.LOST


def test_young_by_floras_clock_is_young() -> None:
    """Also if its created_at lies ahead of our clock, or is the last time there is."""
    run = a_run(deadline_at=NOW)
    for created_at, overdue in (
        (None, True),
        (NOW - DAY, True),
        (NOW - DAY + MINUTE, False),
        (NOW + BEHIND, False),
        (datetime.max.replace(tzinfo=UTC), False),
        (datetime.min.replace(tzinfo=UTC), True),
    ):
        read = a_read("running", NOW, created_at=created_at)
        assert (apply(run, read, NOW).state is RunState.LOST) is overdue
        assert not is_overdue(apply(run, read, NOW - MINUTE), POLICY, now=NOW - MINUTE)


def test_a_jump_is_no_span_of_404s() -> None:
    """Five 404s count over ten minutes: of reading, not of a clock that was put right between two of them."""
    run = entered(NOW - BEHIND)
    run = apply(run, missing(NOW - BEHIND + MINUTE), NOW - BEHIND + MINUTE)
    run = apply(run, missing(NOW), NOW)
    assert read_while_due(run, missing, until=NOW + timedelta(minutes=8)).state is RunState.OPEN
    lost = read_while_due(run, missing, until=NOW + timedelta(hours=1))
    assert (lost.state, lost.lost_reason) == (RunState.LOST, LostReason.NOT_FOUND)


def test_a_jump_is_no_wait_for_the_cost() -> None:
    """The cost is read on for as long as it would have been."""
    run = apply(entered(NOW - BEHIND), a_read("completed", NOW - BEHIND), NOW - BEHIND)
    assert run.cost_due_at is not None
    decision = reconcile(run, a_read("completed", NOW), POLICY, now=NOW, jitter=0.0)
    assert isinstance(decision, Changed)
    assert Event.COST_FINAL not in decision.events
    billed = apply(decision.run, a_read("completed", NOW + MINUTE, charged_cost=0.5), NOW + MINUTE)
    assert billed.charged_cost == 0.5
    unbilled = read_while_due(
        decision.run, lambda at: a_read("completed", at), until=NOW + POLICY.cost_window * 1.5
    )
    assert unbilled.cost_due_at is None
