"""A clock that is wrong: what it does to callbacks is plain, and every run settles all the same."""

from datetime import timedelta
from functools import partial

import pytest

from tests.support.stage import FINISHED, Clock, Stage, eventually

HOUR, DAY, YEAR = timedelta(hours=1), timedelta(days=1), timedelta(days=365)


@pytest.fixture
def stage(stage: Stage, ledger_url: str | None) -> Stage:
    """Every test of this file runs on both databases."""
    stage.postgres = ledger_url
    return stage


@pytest.mark.parametrize(
    "jump", [HOUR, YEAR, -HOUR, -YEAR], ids=["hour ahead", "year ahead", "hour back", "year back"]
)
async def test_a_clock_that_jumps(stage: Stage, jump: timedelta) -> None:
    """While it is wrong, FLORA's callbacks are 401, and yet the runs that they name are read at once and stored.

    Back at the right time, what was put off by the wrong clock goes on, and callbacks match again.
    """
    clock = Clock()
    async with stage.service(clock=clock) as service, stage.client() as client:
        before = await stage.track(service)
        await stage.over(before)
        assert stage.run(before)["verdict"] == "matched"

        waiting = stage.start("emu-image", {"kind": "run_seconds", "seconds": 0}, callback=False)
        await stage.register(service, waiting)
        clock.wrong_by = jump
        refused = await stage.send(client, stage.body(waiting))
        assert (refused.status_code, refused.json()["error"]["code"]) == (401, "timestamp_out_of_tolerance")
        await stage.at(waiting, state="completed")
        # What is put off while the clock is ahead waits until the time comes (the janitor mends two days and more).
        await eventually(partial(_is_handled, stage, waiting))

        unknown = stage.start("emu-text", callback=False)
        assert (await stage.send(client, stage.body(unknown))).status_code == 401
        assert stage.run(unknown) == {}  # only runs that we know of are worth a look

        clock.wrong_by = timedelta(0)
        assert (await stage.send(client, stage.body(unknown))).json() == {"status": "accepted"}
        after = await stage.track(service, "emu-audio")
        await stage.over(unknown, after)
        assert stage.run(after)["verdict"] == "matched"
        stage.check_files(before)
        stage.check_files(unknown)
        stage.check_files(after)

        async with stage.client() as late:
            assert (await stage.send(late, stage.body(waiting))).status_code == 200
        await stage.over(waiting, before)
    stage.check_files(waiting)
    # The callback came while the run was settled and not written off, or after that: nothing else it can be.
    assert stage.run(waiting)["verdict"] in {"matched", "late", "recovered"}
    assert [row["state"] for row in stage.dispatches(waiting, "log")][:1] == ["done"]


async def _is_handled(stage: Stage, run_id: str) -> bool:
    states = [row["state"] for row in stage.dispatches(run_id)]
    return bool(states) and all(state in FINISHED for state in states)


@pytest.mark.parametrize(
    ("at_first", "later"),
    [(-3 * DAY, timedelta(0)), (timedelta(0), YEAR), (-YEAR, YEAR)],
    ids=["behind, then right", "right, then ahead", "behind, then ahead"],
)
async def test_a_run_is_not_given_up_by_a_jump(stage: Stage, at_first: timedelta, later: timedelta) -> None:
    """A run that still runs is past its deadline by the new time, though it is seconds old: it is read on."""
    clock = Clock()
    clock.wrong_by = at_first
    async with stage.service(clock=clock) as service:
        run_id = stage.start("emu-image", {"kind": "run_seconds", "seconds": 2}, callback=False)
        await stage.register(service, run_id)
        before = stage.run(run_id)["polls"]
        clock.wrong_by = later
        await eventually(partial(_is_read_again, stage, run_id, before))
        await stage.at(run_id, state="completed")
    assert stage.run(run_id)["losses"] == 0


async def _is_read_again(stage: Stage, run_id: str, before: int) -> bool:
    return int(stage.run(run_id)["polls"]) > before


async def test_a_clock_that_is_slightly_wrong(stage: Stage) -> None:
    """Within the tolerance (15 minutes behind FLORA's signature, 5 ahead of it) nobody notices."""
    for wrong_by in (timedelta(minutes=14), timedelta(minutes=-4)):
        clock = Clock()
        clock.wrong_by = wrong_by
        async with stage.service(clock=clock) as service:
            run_id = await stage.track(service)
            await stage.over(run_id)
        stage.check_files(run_id)
        assert len(stage.deliveries(run_id)) == 1
