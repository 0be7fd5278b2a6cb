"""How due runs are divided into scans and single reads, and when a scan stops."""

from datetime import timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from receiver.decide import (
    Depth,
    Listing,
    Plan,
    Progress,
    Scan,
    Scope,
    Single,
    is_news,
    is_worth_another_page,
    list_of,
    plan_polls,
)
from receiver.decide.plans import is_passed
from receiver.model import Origin, Run, RunState
from tests.support.core import NOW, POLICY, a_run, a_snapshot

STATES = (RunState.OPEN, RunState.REPORTED, RunState.COMPLETED, RunState.FAILED)
TECHNIQUE_RUNS = Scope(Listing.TECHNIQUE_RUNS, "ws_1")


def technique_run(number: int, *, age: float = 600.0, **fields: object) -> Run:
    """Return a due run, created `age` seconds ago."""
    created_at = NOW - timedelta(seconds=age)
    given: dict[str, object] = {
        "run_id": f"run_{number}",
        "run_type": "technique",
        "technique_id": "tech_1",
        "workspace_id": "ws_1",
        "first_seen_at": created_at,
        "created_at": created_at,
        "next_poll_at": NOW,
    }
    state = fields.pop("state", RunState.OPEN)
    assert isinstance(state, RunState)
    return a_run(state, **(given | fields))


def runs_of(plan: Plan) -> tuple[Run, ...]:
    return plan.due if isinstance(plan, Scan) else (plan.run,)


def scans(plans: tuple[Plan, ...]) -> list[Scan]:
    return [plan for plan in plans if isinstance(plan, Scan)]


def singles(plans: tuple[Plan, ...]) -> list[str]:
    return [plan.run.run_id for plan in plans if isinstance(plan, Single)]


def requests(plans: tuple[Plan, ...]) -> int:
    return sum(plan.requests for plan in plans)


# --- plans -------------------------------------------------------------------------------------------------------


def test_nothing_due_is_nothing_to_do() -> None:
    assert plan_polls([], now=NOW, policy=POLICY) == ()


def test_one_run_is_read_alone_and_two_share_a_page() -> None:
    assert plan_polls([technique_run(1)], now=NOW, policy=POLICY) == (Single(technique_run(1)),)
    (scan,) = plan_polls([technique_run(1), technique_run(2)], now=NOW, policy=POLICY)
    assert isinstance(scan, Scan)
    assert scan.requests == 1


@pytest.mark.parametrize(("count", "pages"), [(10, 1), (100, 1), (101, 2), (1000, 10)])
def test_many_runs_of_one_scope_are_one_scan(count: int, pages: int) -> None:
    plans = plan_polls([technique_run(n, age=600 + n) for n in range(count)], now=NOW, policy=POLICY)
    assert [plan.requests for plan in plans] == [pages]


def test_a_scan_shows_one_technique_alone_where_it_can() -> None:
    """By id only: whether the list can be filtered by a slug, FLORA does not say."""
    for techniques, only in (
        (("tech_1", "tech_1"), "tech_1"),
        (("tech_1", "tech_2"), None),
        (("a", "a"), None),
    ):
        due = [technique_run(n, technique_id=technique) for n, technique in enumerate(techniques)]
        (scan,) = scans(plan_polls(due, now=NOW, policy=POLICY))
        assert scan.scope == Scope(Listing.TECHNIQUE_RUNS, "ws_1", only)
        assert scan.place == TECHNIQUE_RUNS


def test_each_workspace_and_each_kind_has_its_own_scan() -> None:
    due = [
        technique_run(
            n, workspace_id=workspace, run_type=kind, technique_id="tech_1" if kind == "technique" else None
        )
        for n, (workspace, kind) in enumerate(
            [("ws_1", "technique"), ("ws_2", "technique"), ("ws_1", "generation"), (None, "generation")] * 3
        )
    ]
    found = scans(plan_polls(due, now=NOW, policy=POLICY))
    assert {scan.place for scan in found} == {list_of(run) for run in due}
    assert len(found) == 4


def test_actions_are_in_no_list() -> None:
    due = [technique_run(n, run_type="action", technique_id=None) for n in range(20)]
    assert len(singles(plan_polls(due, now=NOW, policy=POLICY))) == 20


def test_a_few_callbacks_are_read_alone_first_and_many_are_a_scan() -> None:
    few = [technique_run(n, state=RunState.REPORTED) for n in range(3)]
    others = [technique_run(n) for n in range(10, 40)]
    plans = plan_polls([*others, *few], now=NOW, policy=POLICY)
    assert singles(plans[:3]) == ["run_0", "run_1", "run_2"]
    assert len(runs_of(plans[3])) == 30
    many = [technique_run(n, state=RunState.REPORTED) for n in range(30)]
    assert requests(plan_polls(many, now=NOW, policy=POLICY)) == 1


def test_missing_costs_come_last() -> None:
    """However long they have been due."""
    costs = [
        technique_run(
            n, state=RunState.COMPLETED, workspace_id="ws_2", next_poll_at=NOW - timedelta(hours=1)
        )
        for n in range(5)
    ]
    plans = plan_polls([*costs, technique_run(9, workspace_id="ws_3")], now=NOW, policy=POLICY)
    assert singles(plans[:1]) == ["run_9"]
    assert scans(plans[1:])[0].due[0].state is RunState.COMPLETED


def test_while_a_scope_is_scanned_only_callbacks_are_planned() -> None:
    due = [technique_run(1), technique_run(2), technique_run(3, state=RunState.REPORTED)]
    assert singles(plan_polls(due, now=NOW, policy=POLICY, busy=[TECHNIQUE_RUNS])) == ["run_3"]


def test_what_a_scan_has_missed_is_read_alone() -> None:
    due = [technique_run(n) for n in range(10)]
    plans = plan_polls(due, now=NOW, policy=POLICY, alone={"run_4"})
    assert singles(plans) == ["run_4"]


def test_a_run_of_an_unknown_technique_needs_a_scan_even_alone() -> None:
    (plan,) = plan_polls([technique_run(1, technique_id=None)], now=NOW, policy=POLICY, alone={"run_1"})
    assert isinstance(plan, Scan)


def test_what_the_last_scan_met_decides_how_far_the_next_one_goes() -> None:
    """The near ones are scanned for; three behind 5,000 foreign rows are read alone. After a while we look again."""
    near = [technique_run(n, age=60) for n in range(10)]
    far = [technique_run(n, age=36_000) for n in range(10, 13)]
    scope = Scope(Listing.TECHNIQUE_RUNS, "ws_1", "tech_1")
    depths = {scope: Depth(rows=5000, boundary=NOW - timedelta(hours=10), at=NOW)}
    plans = plan_polls([*near, *far], now=NOW, policy=POLICY, depths=depths)
    assert len(scans(plans)[0].due) == 10
    assert sorted(singles(plans)) == ["run_10", "run_11", "run_12"]
    later = NOW + timedelta(minutes=11)
    assert singles(plan_polls([*near, *far], now=later, policy=POLICY, depths=depths)) == []


def test_runs_due_soon_make_a_scan_worth_while_and_ride_along() -> None:
    """They alone are no reason to ask, and those that are far from due do not count."""
    due = [technique_run(0)]
    close = [technique_run(n, next_poll_at=NOW + timedelta(seconds=20)) for n in range(1, 5)]
    far = [technique_run(n, next_poll_at=NOW + timedelta(seconds=200)) for n in range(5, 9)]
    assert plan_polls([], soon=close, now=NOW, policy=POLICY) == ()
    (scan,) = scans(plan_polls(due, soon=[*close, *far], now=NOW, policy=POLICY))
    assert {run.run_id for run in scan.soon} == {"run_1", "run_2", "run_3", "run_4"}
    assert singles(plan_polls(due, soon=far, now=NOW, policy=POLICY)) == ["run_0"]


due_runs = st.lists(
    st.builds(
        technique_run,
        st.integers(0, 10**9),
        age=st.floats(1, 10**5),
        state=st.sampled_from(STATES),
        technique_id=st.sampled_from(["tech_1", "tech_2", "slug"]),
        run_type=st.sampled_from(["technique", "generation", "action", None]),
        workspace_id=st.sampled_from(["ws_1", "ws_2", None]),
        failures=st.integers(0, 2),
        next_poll_at=st.sampled_from([NOW, NOW - timedelta(hours=1)]),
    ),
    max_size=150,
    unique_by=lambda run: run.run_id,
)
depth = st.builds(
    Depth,
    st.integers(1, 10**5),
    st.floats(1, 10**5).map(lambda age: NOW - timedelta(seconds=age)),
    st.just(NOW),
)
scopes = st.sampled_from(
    [
        Scope(Listing.TECHNIQUE_RUNS, "ws_1"),
        Scope(Listing.TECHNIQUE_RUNS, None, "tech_1"),
        Scope(Listing.GENERATIONS),
    ]
)


@given(due_runs, st.dictionaries(scopes, depth), st.sets(st.integers(0, 150)))
def test_every_due_run_is_in_one_plan_and_no_plan_costs_more_than_single_reads(
    due: list[Run], depths: dict[Scope, Depth], missed: set[int]
) -> None:
    alone = {run.run_id for place, run in enumerate(due) if place in missed}
    plans = plan_polls(due, now=NOW, policy=POLICY, depths=depths, alone=alone)
    assert sorted(run.run_id for plan in plans for run in runs_of(plan)) == sorted(
        run.run_id for run in due
    )
    assert requests(plans) <= len(due)
    assert all(list_of(run) == scan.place for scan in scans(plans) for run in scan.due)


# --- pages -------------------------------------------------------------------------------------------------------


def a_scan(*due: Run) -> Scan:
    newest_first = tuple(sorted(due, key=lambda run: run.first_seen_at, reverse=True))
    return Scan(TECHNIQUE_RUNS, TECHNIQUE_RUNS, newest_first, (), 1)


def at(seconds: float, *, pages: int = 1, useful: int = 100) -> Progress:
    """Return the progress of a scan that has come down to what was created `seconds` ago."""
    return Progress(pages, 100 * pages, useful, NOW - timedelta(seconds=seconds))


def goes_on(scan: Scan, progress: Progress, *, seen: int = 0, more: bool = True) -> bool:
    left = {run.run_id for run in scan.due[seen:]}
    return is_worth_another_page(scan, left, progress, now=NOW, more=more)


FIFTY = a_scan(*(technique_run(n, age=100 + n) for n in range(50)))


def test_a_scan_goes_on_while_due_runs_lie_ahead() -> None:
    assert goes_on(FIFTY, at(90))
    assert goes_on(FIFTY, at(120), seen=20)


@pytest.mark.parametrize(
    ("progress", "seen", "more"),
    [(at(90), 0, False), (at(90), 50, True), (at(151), 10, True), (at(90, pages=7, useful=0), 0, True)],
    ids=["the list ends", "all seen", "the oldest is passed", "pages without use"],
)
def test_a_scan_stops(progress: Progress, seen: int, more: bool) -> None:
    assert not goes_on(FIFTY, progress, seen=seen, more=more)


def test_a_scan_stops_where_the_rest_is_cheaper_alone() -> None:
    """A page a minute, and the one run that is left was created ten hours ago."""
    scan = a_scan(technique_run(1, age=10), technique_run(2, age=36_000))
    assert not goes_on(scan, at(60, useful=1), seen=1)


def test_a_run_created_at_the_very_boundary_is_not_passed() -> None:
    """Its twin of the same millisecond may have ended the page."""
    run = technique_run(1, age=60)
    assert not is_passed(run, NOW - timedelta(seconds=60))
    assert is_passed(run, NOW - timedelta(seconds=60.001))


@pytest.mark.parametrize(
    ("origin", "minutes"), [(Origin.STARTED, 5), (Origin.TRACKED, 60), (Origin.CALLBACK, 60)]
)
def test_a_run_never_read_may_be_older_than_our_word_of_it(origin: Origin, minutes: int) -> None:
    run = technique_run(1, age=0, created_at=None, origin=origin)
    assert not is_passed(run, NOW - timedelta(minutes=minutes))
    assert is_passed(run, NOW - timedelta(minutes=minutes, seconds=1))


def test_a_page_without_times_passes_nothing() -> None:
    progress = Progress().add_page([a_snapshot()], useful=1)
    assert progress == Progress(1, 1, 1, None)
    assert progress.depth(NOW) is None
    assert not is_passed(technique_run(1), progress.boundary)


def test_the_boundary_never_moves_up() -> None:
    """New runs that shift rows onto the next page do not hide how far the scan has come."""
    old, new = a_snapshot(created_at=NOW - timedelta(hours=1)), a_snapshot(created_at=NOW)
    assert Progress().add_page([new, old], useful=0).add_page([new], useful=0).boundary == old.created_at


@pytest.mark.parametrize(
    ("run", "status", "cost", "told"),
    [
        (technique_run(1), "running", None, True),
        (technique_run(1, state=RunState.REPORTED), "running", None, True),
        (technique_run(1, state=RunState.COMPLETED), "completed", 0.1, False),
        (technique_run(1, state=RunState.COMPLETED, cost_due_at=NOW), "completed", 0.1, True),
        (technique_run(1, state=RunState.COMPLETED, cost_due_at=NOW), "completed", None, False),
        (a_run(RunState.LOST), "running", None, False),
        (a_run(RunState.LOST), "failed", None, True),
    ],
)
def test_a_listed_row_is_told_only_if_it_says_something_new(
    run: Run, status: str, cost: float | None, told: bool
) -> None:
    assert is_news(run, a_snapshot(status, charged_cost=cost)) is told
