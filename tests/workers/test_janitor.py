"""The janitor: callbacks that never came, rows that are too old, clocks that were wrong."""

from datetime import timedelta

import pytest

from receiver.errors import StoreUnavailableError
from receiver.model import Delivery, RunState, Verdict
from receiver.store import ledger
from receiver.workers.janitor import Janitor
from tests.support.core import NOW, Clock, Core, a_read, a_run, writable
from tests.support.defaults import a_retention

WINDOW = 420


@pytest.fixture
def janitor(core: Core, clock: Clock) -> Janitor:
    return Janitor(core.database, core.intake, retention=a_retention(rejections=3), clock=clock)


async def test_a_callback_that_never_came_is_written_off(core: Core, janitor: Janitor) -> None:
    """Not a second before FLORA has given up; then the run counts as recovered, once."""
    await core.register()
    await core.settle(completed_at=NOW, charged_cost=0.1)
    await janitor.tick(core.clock.forward(WINDOW - 1))
    assert (await core.run()).verdict is None
    await janitor.tick(core.clock.forward(1))
    run = await core.run()
    assert (run.verdict, run.verdict_due_at, run.state) == (Verdict.RECOVERED, None, RunState.COMPLETED)
    await janitor.tick(core.clock.forward(1))
    assert await core.run() == run
    assert core.metrics.verdicts.labels("recovered")._value.get() == 1


async def test_a_callback_that_came_in_time_is_not_written_off(core: Core, janitor: Janitor) -> None:
    await core.register()
    await core.settle(completed_at=NOW, charged_cost=0.1)
    await core.call()
    await janitor.tick(core.clock.forward(WINDOW + 1))
    assert (await core.run()).verdict is Verdict.MATCHED


async def test_many_are_written_off_piece_by_piece(core: Core, janitor: Janitor) -> None:
    """At most a hundred at a time, and the tick says that there is more."""
    runs = [a_run(RunState.COMPLETED, run_id=f"run_{n}", verdict_due_at=NOW) for n in range(130)]
    await core.database.write(lambda tx: ledger.add_runs(tx, runs))
    assert await janitor.tick(NOW) >= 100
    assert await janitor.tick(NOW) == 30
    assert await janitor.tick(NOW) == 0
    assert await core.rows("SELECT count(*) FROM runs WHERE verdict = 'recovered'") == [(130,)]


async def test_rejections_become_a_bounded_ring(core: Core, janitor: Janitor) -> None:
    """The newest of them can be looked at; a flood fills no disk."""
    for number in range(10):
        core.intake.refuse(f"code_{number}", "no", remote="192.0.2.1", size=number)
    await janitor.tick(NOW)
    assert not core.intake.rejections
    rows = await core.rows("SELECT code, remote, size FROM rejections ORDER BY seq")
    assert [tuple(row) for row in rows] == [(f"code_{n}", "192.0.2.1", n) for n in (7, 8, 9)]


async def life_goes_on(core: Core) -> None:
    """Let the ledger hear of something new, so that its clock is believed."""
    await core.register(f"run_at_{core.clock.now:%Y%m%d%H%M%S}")


async def test_retention(core: Core, janitor: Janitor) -> None:
    """Bodies go after 30 days, the ledger after 400; what is not over never goes."""
    await core.call()
    await core.settle(charged_cost=0.1)
    await core.database.write(lambda tx: tx.exec_driver_sql("UPDATE dispatches SET state = 'done'"))
    await core.call("whd_2", "run_2")
    core.clock.forward(days=30)
    await life_goes_on(core)
    await janitor.tick(core.clock.now)
    assert await core.count("delivery_bodies") == 2
    await janitor.tick(core.clock.forward(1))
    assert await core.count("delivery_bodies") == 0
    core.clock.forward(days=369)
    await life_goes_on(core)
    await janitor.tick(core.clock.now)
    assert await core.count("deliveries") == 2
    await janitor.tick(core.clock.forward(days=1))
    rows = await core.rows("SELECT run_id FROM runs WHERE run_id NOT LIKE 'run_at_%'")
    assert [row[0] for row in rows] == ["run_2"]
    assert [row[0] for row in await core.rows("SELECT delivery_id FROM deliveries")] == ["whd_2"]
    assert await core.count("dispatches") == await core.count("outputs") == 0


async def test_a_clock_that_jumped_a_year_ahead_and_came_back(core: Core, janitor: Janitor) -> None:
    """Nothing that it put off stays put off.

    Runs are read, and dispatches are due, within a tick.
    """
    core.clock.forward(days=365)
    await core.register()
    await core.call("whd_2", "run_2")
    await core.call("whd_3", "run_3")
    await core.settle("run_3", charged_cost=0.1)
    core.clock.now = NOW
    await janitor.tick(NOW)
    due = await core.database.read(lambda tx: ledger.due_runs(tx, now=NOW, limit=10))
    assert {run.run_id for run in due} == {"run_1", "run_2"}
    assert {row.due_at for row in await core.dispatches("run_3")} == {NOW}
    for run_id in ("run_1", "run_2"):
        await core.intake.apply(a_read("running", NOW, run_id))
        run = await core.run(run_id)
        assert run.next_poll_at is not None
        assert NOW < run.next_poll_at < NOW + timedelta(hours=1)


async def test_a_clock_in_order_is_left_alone(core: Core, janitor: Janitor) -> None:
    before = await core.register()
    await janitor.tick(NOW)
    assert await core.run() == before


async def test_a_ledger_that_cannot_be_written_stops_a_tick_and_not_the_janitor(
    core: Core, janitor: Janitor
) -> None:
    """The loop goes on: the next tick does what this one could not."""
    await core.register()
    await core.settle(completed_at=NOW, charged_cost=0.1)
    core.clock.forward(WINDOW)
    await writable(core.database, False)
    with pytest.raises(StoreUnavailableError):
        await janitor.tick(core.clock.now)
    await writable(core.database, True)
    await janitor.tick(core.clock.now)
    assert (await core.run()).verdict is Verdict.RECOVERED


async def test_unreadable_deliveries_are_kept_as_long_as_any(core: Core, janitor: Janitor) -> None:
    """They name no run, so nothing else holds them: 400 days, like the rest."""
    row = Delivery("sha256:1", b"x", "t=1", NOW, 0, 0, readable=False)
    await core.database.write(lambda tx: ledger.add_deliveries(tx, [row]))
    core.clock.forward(days=400)
    await life_goes_on(core)
    await janitor.tick(core.clock.now)
    assert await core.count("deliveries") == 1
    await janitor.tick(core.clock.forward(1))
    assert await core.count("deliveries") == 0


async def test_a_clock_years_ahead_deletes_nothing(core: Core, janitor: Janitor) -> None:
    """What is old is old beside the newest row of the ledger, not beside a clock that is wrong."""
    await core.call()
    await core.settle(charged_cost=0.1)
    await core.database.write(lambda tx: tx.exec_driver_sql("UPDATE dispatches SET state = 'done'"))
    await janitor.tick(core.clock.forward(days=3650))
    assert await core.count("delivery_bodies") == await core.count("runs") == 1
