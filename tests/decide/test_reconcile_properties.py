"""What holds whatever comes, in whatever order and however often."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta

from hypothesis import example, given
from hypothesis import strategies as st
from msgspec.structs import replace

from receiver.decide import SETTLED_STATES, Changed, next_poll, reconcile, settle
from receiver.model import (
    CallbackExpired,
    CallbackStatus,
    Event,
    Origin,
    Output,
    ReadFailed,
    ReadRequested,
    Report,
    Run,
    RunNotFound,
    RunRegistered,
    RunState,
    Subscription,
    When,
)
from tests.support.core import (
    NOW,
    OUTPUT,
    POLICY,
    a_callback_received,
    a_policy,
    a_read,
    a_registration,
    a_run,
)

SUBSCRIPTIONS = (
    Subscription("all", on=tuple(Event)),
    Subscription(
        "settled", on=(Event.SETTLED,), when=When(status=("completed",), output_type=("imageUrl",))
    ),
    Subscription("cost", on=(Event.COST_FINAL,)),
)


@dataclass
class Ledger:
    """The shell in small: carries decisions out as the database would."""

    run: Run | None = None
    outputs: tuple[Output, ...] = ()
    dispatches: dict[str, tuple[str, str | None]] = field(default_factory=dict)
    events: list[Event] = field(default_factory=list)

    def apply(self, report: Report, now: datetime, jitter: float = 0.0) -> None:
        decision = reconcile(self.run, report, POLICY, now=now, jitter=jitter)
        if not isinstance(decision, Changed):
            return
        self.run = decision.run
        self.outputs = decision.outputs or self.outputs
        self.events += decision.events
        for row in settle(decision.run, self.outputs, decision.events, SUBSCRIPTIONS, now=now):
            self.dispatches.setdefault(row.idempotency_key, (row.state, row.last_error))


def seconds(low: int, high: int) -> st.SearchStrategy[datetime]:
    return st.integers(low, high).map(lambda value: NOW + timedelta(seconds=value))


@st.composite
def histories(draw: st.DrawFn) -> tuple[list[Report], Report]:
    """Return the reports of one run whose reads agree, at least one of which makes it known, and its last read."""
    status = draw(st.sampled_from(["completed", "failed"]))
    end = a_read(status, NOW, completed_at=NOW, charged_cost=0.5, run_type="generation")
    callback_status = draw(
        st.sampled_from([CallbackStatus.COMPLETED, CallbackStatus.FAILED, CallbackStatus.CONFLICTING])
    )
    heard = st.builds(lambda at: a_callback_received(callback_status, at), seconds(-60, 300))
    registered = st.just(a_registration(origin=Origin.STARTED, run_type="generation", metadata={"a": 1}))
    noise = st.one_of(
        st.builds(lambda at: RunNotFound("run_1", at, conclusive=True), seconds(-60, 60)),
        st.builds(lambda at: RunNotFound("run_1", at, conclusive=False), seconds(-60, 60)),
        st.builds(
            lambda at, after: ReadFailed("run_1", at, after),
            seconds(-60, 60),
            st.none() | st.floats(0, 1e9),
        ),
        st.builds(lambda at: ReadRequested("run_1", at), seconds(-60, 60)),
        st.just(CallbackExpired("run_1")),
        st.just(end),
    )
    reports: list[Report] = [draw(heard | registered)]
    reports += draw(st.lists(heard | registered, max_size=3))
    reports += draw(st.lists(noise, max_size=4))
    # Fewer than the ladder has steps: past it, a slow API is an alert, as it should be.
    reports += draw(st.lists(st.builds(a_read, st.just("running"), seconds(-60, 60)), max_size=3))
    return reports, end


def play(reports: Sequence[Report], end: Report) -> Ledger:
    """Tell all reports a second apart, then poll until nothing is due, then let the callback's time run out."""
    ledger = Ledger()
    now = NOW
    for report in reports:
        now += timedelta(seconds=1)
        ledger.apply(report, now)
    for _ in range(20):
        if ledger.run is None or ledger.run.next_poll_at is None:
            break
        now = max(now, ledger.run.next_poll_at)
        ledger.apply(end, now)
    ledger.apply(CallbackExpired("run_1"), now + timedelta(days=1))
    return ledger


@given(histories(), st.data())
def test_any_order_and_any_duplication_end_the_same(
    history: tuple[list[Report], Report], data: st.DataObject
) -> None:
    """Callbacks and reads in any order and number leave the same state, words, verdict, outputs and dispatches."""
    reports, end = history
    again = data.draw(
        st.lists(st.sampled_from([r for r in reports if not _is_running(r)] or [end]), max_size=4)
    )
    shuffled = data.draw(st.permutations([*reports, *again]))
    one, other = play(reports, end), play(shuffled, end)
    assert one.run is not None
    assert other.run is not None
    for name in (
        "state",
        "callback_status",
        "verdict",
        "verdict_due_at",
        "lost_reason",
        "next_poll_at",
        "charged_cost",
        "metadata",
    ):
        assert getattr(one.run, name) == getattr(other.run, name), name
    assert one.outputs == other.outputs
    assert one.dispatches == other.dispatches
    assert one.run.state in SETTLED_STATES
    assert one.events.count(Event.SETTLED) == other.events.count(Event.SETTLED) == 1


def _is_running(report: Report) -> bool:
    return getattr(getattr(report, "snapshot", None), "status", None) == "running"


@st.composite
def any_report(draw: st.DrawFn) -> Report:
    """Return any report at all: reads that contradict each other, clocks that jump."""
    at = draw(seconds(-400_000, 400_000))
    report: Report = draw(
        st.one_of(
            st.builds(
                a_read,
                st.sampled_from(["completed", "failed", "running", "pending", "exploded"]),
                st.just(at),
                outputs=st.sampled_from([(), (OUTPUT,)]),
                charged_cost=st.none() | st.just(0.5),
                completed_at=st.none() | seconds(-400_000, 400_000),
                run_type=st.sampled_from([None, "technique", "generation"]),
            ),
            st.builds(a_callback_received, st.sampled_from(CallbackStatus), st.just(at)),
            st.builds(
                a_registration,
                origin=st.sampled_from(Origin),
                registered_at=st.just(at),
                callback_expected=st.booleans(),
                estimated_seconds=st.none() | st.floats(0),
            ),
            st.builds(RunNotFound, st.just("run_1"), st.just(at), st.booleans()),
            st.builds(ReadFailed, st.just("run_1"), st.just(at), st.none() | st.floats(0)),
            st.builds(ReadRequested, st.just("run_1"), st.just(at)),
            st.just(CallbackExpired("run_1")),
        )
    )
    return report


@given(
    st.lists(
        st.tuples(any_report(), st.integers(-100_000, 100_000), st.floats(0, 1, exclude_max=True)),
        max_size=30,
    )
)
@example(
    [(a_callback_received(), 0, 0.0), (a_read("completed", outputs=(), charged_cost=None), 0, 0.0)] * 9
)
def test_whatever_comes_the_row_is_sound(steps: list[tuple[Report, int, float]]) -> None:
    """What the database CHECKs holds after every step; a run settles once; each loss is told; no read spins."""
    ledger = Ledger()
    now = NOW
    for report, step, jitter in steps:
        now += timedelta(seconds=step)
        before = ledger.run
        ledger.apply(report, now, jitter)
        run = ledger.run
        if run is None:
            continue
        assert (run.state in SETTLED_STATES) is (run.settled_at is not None)
        assert (run.state is RunState.LOST) is (run.lost_reason is not None)
        assert run.state is not RunState.REPORTED or run.reported_at is not None
        assert run.state not in {RunState.OPEN, RunState.REPORTED} or run.next_poll_at is not None
        assert run.state is not RunState.LOST or run.next_poll_at is None
        assert run.cost_due_at is None or run.state in SETTLED_STATES
        assert run.verdict is None or run.verdict_due_at is None
        assert run.losses == ledger.events.count(Event.LOST)
        assert ledger.events.count(Event.SETTLED) == (run.state in SETTLED_STATES)
        assert ledger.events.count(Event.COST_FINAL) <= 1
        assert before is None or before.state not in SETTLED_STATES or before.state is run.state
        if run.next_poll_at is not None and (before is None or run.next_poll_at != before.next_poll_at):
            # An hour is the longest that FLORA can ask for; a start's own pause carries jitter, too.
            registered_at = report.registered_at if isinstance(report, RunRegistered) else now
            assert (
                min(now, registered_at)
                <= run.next_poll_at
                <= max(now, registered_at) + timedelta(hours=1) * 1.25
            )


@given(
    age=st.integers(-(10**8), 10**8),
    unconfirmed_reads=st.integers(0, 10**6),
    callback_expected=st.booleans(),
    reported=st.booleans(),
    max_gap=st.integers(1, 10**6),
    jitter=st.floats(0, 1, exclude_max=True),
)
def test_the_next_poll_is_never_in_the_past_and_never_too_far(
    *,
    age: int,
    unconfirmed_reads: int,
    callback_expected: bool,
    reported: bool,
    max_gap: int,
    jitter: float,
) -> None:
    """Between now and 1.25 times the longest gap, whatever the run's age: clocks jump."""
    policy = a_policy(max_gap=timedelta(seconds=max_gap))
    run = replace(
        a_run(
            first_seen_at=NOW - timedelta(seconds=age),
            unconfirmed_reads=unconfirmed_reads,
            callback_expected=callback_expected,
        ),
        reported_at=NOW - timedelta(seconds=age) if reported else None,
    )
    assert NOW <= next_poll(run, policy, now=NOW, jitter=jitter) <= NOW + policy.max_gap * 1.25


@given(
    st.permutations([a_callback_received(), a_registration(), a_read("completed", charged_cost=0.5)]),
    st.integers(1, 3),
)
def test_effects_are_dispatched_once(reports: Sequence[Report], times: int) -> None:
    """One row per handler and event, however often and in whatever order a run is told of."""
    ledger = play(
        [report for report in reports for _ in range(times)], a_read("completed", charged_cost=0.5)
    )
    assert sorted(ledger.dispatches) == [
        "run_1:all:cost_final:0",
        "run_1:all:settled:0",
        "run_1:cost:cost_final:0",
        "run_1:settled:settled:0",
    ]
