"""Many due runs against a real emulator: how many requests a tick takes, and that it reads all."""

from collections.abc import AsyncIterator
from datetime import timedelta
from functools import partial

import pytest
from msgspec.structs import replace

from receiver.emulator.faults import parse_faults
from receiver.model import CallbackStatus, Origin, RunState
from receiver.store import Database
from tests.support.core import Clock
from tests.support.stand import MODEL, OTHER, Ledger, Stand, a_ledger, a_stand

A_PAGE = "GET /technique-runs"
SINGLE = "GET /techniques/{technique_id}/runs/{run_id}"


@pytest.fixture
async def flora(clock: Clock) -> AsyncIterator[Stand]:
    async with a_stand(clock) as stand:
        yield stand


@pytest.fixture
def ours(database: Database, clock: Clock, flora: Stand) -> Ledger:
    return a_ledger(database, clock, flora)


async def test_a_thousand_open_runs_cost_a_dozen_requests(ours: Ledger, flora: Stand) -> None:
    """What the issue asks for; every run is read, and the ended ones are settled."""
    runs = flora.fill(1000)
    flora.end(runs[::2])
    await ours.add(flora.to_rows(runs))
    await ours.look_once()
    assert flora.requests <= 12
    assert await ours.states() == {"open": 500, "completed": 500}
    assert await ours.count_unread() == 0


async def test_a_page_of_reports_shares_commits(ours: Ledger, flora: Stand) -> None:
    await ours.add(flora.to_rows(flora.fill(300)))
    await ours.look_once()
    assert ours.core.metrics.commits._value.get() <= 6


async def test_runs_of_both_kinds_and_many_techniques_are_looked_at_together(
    ours: Ledger, flora: Stand
) -> None:
    runs = [
        *flora.fill(150),
        *flora.fill(150, prefix="b", subject=OTHER),
        *flora.fill(200, prefix="g", subject=MODEL),
    ]
    await ours.add(flora.to_rows(runs))
    await ours.look_once()
    assert flora.requests <= 6
    assert await ours.count_unread() == 0


async def test_a_technique_is_asked_for_alone_where_only_its_runs_are_due(
    ours: Ledger, flora: Stand
) -> None:
    """Runs of others in the workspace are not paged through."""
    runs = flora.fill(100, youngest=timedelta(hours=2))
    flora.fill(900, prefix="b", subject=OTHER)
    await ours.add(flora.to_rows(runs))
    await ours.look_once()
    assert flora.requests == 1


async def test_one_due_run_is_read_alone(ours: Ledger, flora: Stand) -> None:
    await ours.add(flora.to_rows(flora.fill(1)))
    await ours.look_once()
    assert flora.requests_by_route == {SINGLE: 1}


async def test_a_run_with_a_callback_is_read_alone_beside_a_scan(
    ours: Ledger, flora: Stand, clock: Clock
) -> None:
    """Its reader waits for nothing: the first plan is the single read."""
    runs = flora.fill(200)
    flora.end(runs[:1])
    reported = flora.to_rows(
        runs[:1], state=RunState.REPORTED, callback_status=CallbackStatus.COMPLETED, reported_at=clock.now
    )
    await ours.add([*reported, *flora.to_rows(runs[1:])])
    await ours.poller.tick(clock.now)
    await ours.poller.drain()
    assert flora.requests_by_route[SINGLE] == 1
    assert flora.requests_by_route[A_PAGE] == 2
    assert (await ours.core.run("run_run_0")).state is RunState.COMPLETED


async def test_a_callback_during_a_scan_is_not_made_to_wait_for_it(
    ours: Ledger, flora: Stand, clock: Clock
) -> None:
    """A scan has looked for the run since before its callback came.

    It is read alone all the same.
    """
    runs = flora.fill(200)
    flora.end(runs)
    await ours.add(flora.to_rows(runs))
    tick = await ours.poller.tick(clock.now)
    assert tick > 0
    clock.forward(0.001)
    await ours.core.call("whd_1", "run_run_0")
    await ours.poller.tick(clock.now)
    await ours.poller.drain()
    assert flora.requests_by_route[SINGLE] == 1


async def test_a_burst_of_callbacks_becomes_a_scan(ours: Ledger, flora: Stand, clock: Clock) -> None:
    runs = flora.fill(200)
    flora.end(runs)
    await ours.add(
        flora.to_rows(
            runs, state=RunState.REPORTED, callback_status=CallbackStatus.COMPLETED, reported_at=clock.now
        )
    )
    await ours.look_once()
    assert flora.requests == 2
    assert await ours.states() == {"completed": 200}


async def test_runs_created_between_two_pages_fool_no_scan(ours: Ledger, flora: Stand) -> None:
    """Rows shift under the cursor: all due runs are read, for no more than a page or two more."""
    runs = flora.fill(500)
    await ours.add(flora.to_rows(runs))
    for number in range(5):
        new = partial(flora.fill, 150, prefix=f"new{number}", youngest=timedelta(0), apart_seconds=0.0)
        flora.between.append(new)
    await ours.look_once()
    assert await ours.count_unread() == 0
    assert flora.requests <= 7


async def test_a_cursor_that_repeats_ends_the_scan(
    ours: Ledger, flora: Stand, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The list goes in circles after its first page: what it never shows is read alone."""
    await ours.add(flora.to_rows(flora.fill(120)))
    monkeypatch.setattr(
        "receiver.emulator.api._cursor", lambda _: "cGxhY2U6MTIw"
    )  # place:120, where it began
    await ours.look_once()
    assert flora.requests_by_route[A_PAGE] == 2
    assert flora.requests_by_route[SINGLE] == 20
    assert await ours.count_unread() == 0


async def test_a_run_that_flora_forgets_is_asked_for_by_name(
    ours: Ledger, flora: Stand, clock: Clock
) -> None:
    """Absence from a list counts for nothing: its own route's 404 does."""
    runs = flora.fill(50)
    gone = flora.emulator.runs._order.pop(25)
    flora.emulator.runs._runs.pop(gone)
    await ours.add(flora.to_rows(runs))
    await ours.look_once()
    assert flora.requests_by_route == {A_PAGE: 1, SINGLE: 1}
    forgotten = await ours.core.run(gone)
    assert (forgotten.state, forgotten.missing) == (RunState.OPEN, 1)


async def test_one_old_run_is_not_looked_for_behind_a_thousand_of_others(
    ours: Ledger, flora: Stand
) -> None:
    """A scan that has become dearer than single reads stops, and the next look knows better."""
    old = flora.fill(5, prefix="old", youngest=timedelta(hours=20))
    flora.fill(3000)
    await ours.add(flora.to_rows(old))
    await ours.look_once()
    assert flora.requests <= 6
    await ours.core.database.write(
        lambda tx: tx.exec_driver_sql("UPDATE runs SET next_poll_at = 0, polls = 0")
    )
    await ours.look_once()
    assert flora.requests <= 11
    assert await ours.count_unread() == 0


async def test_a_run_of_an_unknown_technique_is_found_in_the_list(ours: Ledger, flora: Stand) -> None:
    """Its callback names neither technique nor route."""
    runs = flora.fill(250)
    await ours.add(flora.to_rows(runs[:1], technique_id=None, origin=Origin.CALLBACK, created_at=None))
    await ours.look_once()
    assert flora.requests_by_route == {A_PAGE: 3}
    assert (await ours.core.run("run_run_0")).technique_id == "tech_emu_image"


async def test_a_hundred_missing_costs_are_one_request(ours: Ledger, flora: Stand, clock: Clock) -> None:
    runs = flora.fill(100)
    flora.end(runs)
    rows = flora.to_rows(
        runs, state=RunState.COMPLETED, settled_at=clock.now, cost_due_at=clock.now + timedelta(minutes=9)
    )
    await ours.add(rows)
    await ours.look_once()
    assert flora.requests == 1
    costs = await ours.core.rows(
        "SELECT count(*) FROM runs WHERE charged_cost = 0.04 AND next_poll_at IS NULL"
    )
    assert costs[0][0] == 100


async def test_bystanders_are_settled_and_settled_rows_cost_no_commit(
    ours: Ledger, flora: Stand, clock: Clock
) -> None:
    """Only three runs are due; the page shows more."""
    runs = flora.fill(90)
    flora.end(runs[:60])
    later = clock.now + timedelta(hours=1)
    await ours.add(flora.to_rows(runs[:3]))
    await ours.add(flora.to_rows(runs[3:30], next_poll_at=later))
    await ours.add(
        flora.to_rows(runs[30:60], state=RunState.COMPLETED, settled_at=clock.now, next_poll_at=None)
    )
    await ours.look_once()
    assert flora.requests == 1
    assert await ours.states() == {"completed": 60}
    assert await ours.count_unread() == 30


async def test_runs_due_soon_ride_along(ours: Ledger, flora: Stand, clock: Clock) -> None:
    """Jitter spreads a thousand runs over seconds.

    The first that is due brings the others along.
    """
    runs = flora.to_rows(flora.fill(1000))
    rows = [
        replace(run, next_poll_at=clock.now + timedelta(milliseconds=20 * n)) for n, run in enumerate(runs)
    ]
    await ours.add(rows)
    await ours.look_once()
    assert flora.requests <= 12
    assert await ours.count_unread() == 0


async def test_a_held_workspace_starves_no_other(database: Database, clock: Clock, flora: Stand) -> None:
    """FLORA limits one key, whose runs are due for longest and are more than a look takes in."""
    async with a_stand(clock, workspace_id="ws_2") as second:
        ours = a_ledger(database, clock, flora, second)
        held = flora.to_rows(flora.fill(2500), next_poll_at=clock.now - timedelta(hours=1))
        await ours.add(held)
        await ours.add(second.to_rows(second.fill(150, prefix="two")))
        flora.client.rate_limit.slow_down(30)
        await ours.look_once()
        assert flora.requests == 0
        assert second.requests == 2
        assert await ours.count_unread() == 2500
        clock.forward(31)
        await ours.look_once()
        assert await ours.count_unread() == 0
        assert flora.requests <= 26


@pytest.mark.parametrize(
    ("fault", "hold"),
    [
        ({"kind": "rate_limited", "retry_after": 7}, 7),
        ({"kind": "rate_limited"}, 5),
    ],
)
async def test_a_page_that_is_refused_holds_the_key_and_keeps_the_runs_due(
    ours: Ledger, flora: Stand, clock: Clock, fault: dict[str, object], hold: float
) -> None:
    """Nothing is written down about the runs: they are looked at when the hold is over."""
    await ours.add(flora.to_rows(flora.fill(300)))
    flora.emulator.faults.add(parse_faults([{**fault, "next": 1}]))
    await ours.look_once()
    assert flora.requests == 1
    assert ours.core.metrics.commits._value.get() == 0
    clock.forward(hold - 1)
    await ours.look_once()
    assert flora.requests == 1
    clock.forward(2)
    await ours.look_once()
    assert flora.requests == 4
    assert await ours.count_unread() == 0


async def test_a_refused_key_is_written_down_for_each_run_and_keeps_them_due(
    ours: Ledger, flora: Stand, clock: Clock
) -> None:
    """Each run can say why it is not read; they are looked at when the hold is over."""
    await ours.add(flora.to_rows(flora.fill(300)))
    due = await ours.core.rows("SELECT run_id, next_poll_at FROM runs ORDER BY run_id")
    flora.emulator.faults.add(parse_faults([{"kind": "unauthorized", "next": 1}]))
    await ours.look_once()
    assert flora.requests == 1
    assert await ours.core.rows("SELECT run_id, next_poll_at FROM runs ORDER BY run_id") == due
    assert await ours.core.rows("SELECT DISTINCT polls, failed_polls, failures FROM runs") == [(1, 1, 0)]
    found = await ours.core.rows(
        "SELECT source, outcome, http_status, count(*) FROM run_reads GROUP BY 1, 2, 3"
    )
    assert found == [("list", "failed", 401, 300)]
    clock.forward(61)
    await ours.look_once()
    assert await ours.count_unread() == 0


async def test_a_page_that_fails_makes_its_runs_back_off_together(
    ours: Ledger, flora: Stand, clock: Clock
) -> None:
    await ours.add(flora.to_rows(flora.fill(300)))
    flora.emulator.faults.add(parse_faults([{"kind": "internal_error", "next": 1}]))
    await ours.look_once()
    assert flora.requests == 1
    clock.forward(3)
    await ours.look_once()
    assert flora.requests == 4
    assert await ours.states() == {"open": 300}


async def test_costs_that_are_not_known_yet_are_asked_for_later(
    ours: Ledger, flora: Stand, clock: Clock
) -> None:
    """A page per pass, and no pass follows at once on the last."""
    runs = flora.fill(100)
    flora.end(runs, cost_lag_seconds=10**6)
    rows = flora.to_rows(
        runs, state=RunState.COMPLETED, settled_at=clock.now, cost_due_at=clock.now + timedelta(minutes=9)
    )
    await ours.add(rows)
    await ours.look_once()
    assert flora.requests == 1
    clock.forward(10)
    flora.end(runs)
    await ours.look_once()
    assert flora.requests == 2
    assert (await ours.core.rows("SELECT count(*) FROM runs WHERE charged_cost = 0.04"))[0][0] == 100
