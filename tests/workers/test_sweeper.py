"""Unregistered runs are found in FLORA's lists, once, from where the last sweep ended."""

from collections.abc import AsyncIterator
from datetime import timedelta

import pytest

from receiver.decide import Listing, Scope
from receiver.emulator.faults import parse_faults
from receiver.model import Operation, Origin, RunState, Start, StartState
from receiver.store import Database, starts, sweeps
from receiver.workers.sweeper import Sweeper, scopes
from tests.support.core import Clock
from tests.support.defaults import a_discovery
from tests.support.stand import MODEL, OTHER, Ledger, Stand, a_ledger, a_stand

PAGES = "GET /technique-runs"
GENERATIONS = "GET /generations"
HOUR = timedelta(hours=1)


@pytest.fixture
async def flora(clock: Clock) -> AsyncIterator[Stand]:
    async with a_stand(clock) as stand:
        yield stand


@pytest.fixture
def ours(database: Database, clock: Clock, flora: Stand) -> Ledger:
    return a_ledger(database, clock, flora)


def a_sweeper(ours: Ledger, **fields: object) -> Sweeper:
    """Return a sweeper as a new process has it."""
    discovery = a_discovery(**{"run_types": ("technique",), **fields})
    core = ours.core
    return Sweeper(core.database, core.intake, ours.readers, discovery=discovery, clock=core.clock)


async def origins(ours: Ledger) -> dict[str, int]:
    rows = await ours.core.rows("SELECT origin || ' ' || state, count(*) FROM runs GROUP BY 1")
    return dict(rows)


async def test_unknown_runs_are_taken_up_as_they_stand(ours: Ledger, flora: Stand, clock: Clock) -> None:
    """Ended ones are settled and handed on, open ones are polled from now on."""
    flora.end(flora.fill(60, prefix="a"))
    flora.fill(60, prefix="b")
    await a_sweeper(ours).tick(clock.now)
    assert await origins(ours) == {"discovered completed": 60, "discovered open": 60}
    assert flora.requests == 2
    run = await ours.core.run("run_b_0")
    assert (run.technique_id, run.workspace_id, run.callback_expected) == ("tech_emu_image", "ws_1", False)
    assert len(await ours.core.dispatches("run_a_0")) == 1


async def test_a_known_run_keeps_its_origin_and_is_reported_as_well(
    ours: Ledger, flora: Stand, clock: Clock
) -> None:
    runs = flora.fill(3)
    flora.end(runs)
    await ours.add(flora.to_rows(runs[:1], next_poll_at=clock.now + HOUR))
    await ours.add(
        flora.to_rows(runs[1:2], state=RunState.COMPLETED, settled_at=clock.now, next_poll_at=None)
    )
    await a_sweeper(ours).tick(clock.now)
    assert await origins(ours) == {"started completed": 2, "discovered completed": 1}
    assert (await ours.core.run("run_run_1")).version == 0


async def test_the_first_sweep_goes_back_a_day(ours: Ledger, flora: Stand, clock: Clock) -> None:
    flora.fill(30, apart_seconds=3600)
    await a_sweeper(ours, first=timedelta(hours=5)).tick(clock.now)
    assert await ours.core.count("runs") == 5


async def test_the_next_sweep_goes_back_to_the_watermark_and_a_little_further(
    ours: Ledger, flora: Stand, clock: Clock
) -> None:
    """A run that showed up late behind the watermark is still found.

    What is older costs no page.
    """
    flora.fill(400, apart_seconds=60)
    sweeper = a_sweeper(ours, overlap=timedelta(minutes=30))
    pause = await sweeper.tick(clock.now)
    assert pause == 900
    first = flora.requests
    clock.forward(899)
    await sweeper.tick(clock.now)
    assert flora.requests == first
    clock.forward(1)
    flora.fill(1, prefix="late", youngest=timedelta(minutes=50))
    flora.fill(1, prefix="new", youngest=timedelta(0))
    await sweeper.tick(clock.now)
    assert flora.requests == first + 1
    assert (await ours.core.run("run_late_0")).origin is Origin.DISCOVERED
    assert (await ours.core.run("run_new_0")).origin is Origin.DISCOVERED


async def test_a_new_process_sweeps_at_once_and_covers_its_downtime(
    ours: Ledger, flora: Stand, clock: Clock
) -> None:
    """However long it was: the watermark is in the ledger."""
    flora.fill(10)
    await a_sweeper(ours).tick(clock.now)
    clock.forward(days=3)
    flora.fill(250, prefix="missed", youngest=timedelta(days=2))
    await a_sweeper(ours).tick(clock.now)
    assert await ours.core.count("runs") == 260


async def test_a_sweep_that_is_cut_short_moves_no_watermark(
    ours: Ledger, flora: Stand, clock: Clock
) -> None:
    """What it has found stays found; the next one goes all the way again."""
    flora.fill(250)
    flora.between.append(
        lambda: flora.emulator.faults.add(parse_faults([{"kind": "internal_error", "next": 1}]))
    )
    sweeper = a_sweeper(ours)
    assert await sweeper.tick(clock.now) == 30
    assert await ours.core.count("runs") == 100
    assert await ours.core.count("watermarks") == 0
    clock.forward(31)
    await sweeper.tick(clock.now)
    assert await ours.core.count("runs") == 250
    assert flora.requests == 5


async def test_a_refused_key_is_not_asked_again_and_again(ours: Ledger, flora: Stand, clock: Clock) -> None:
    flora.emulator.faults.add(parse_faults([{"kind": "unauthorized"}]))
    sweeper = a_sweeper(ours, run_types=("technique", "generation"))
    assert await sweeper.tick(clock.now) >= 59
    assert flora.requests == 1


async def test_a_cursor_that_repeats_ends_the_sweep(
    ours: Ledger, flora: Stand, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    flora.fill(250)
    monkeypatch.setattr(
        "receiver.emulator.api._cursor", lambda _: "cGxhY2U6MjUw"
    )  # place:250, where it began
    await a_sweeper(ours).tick(clock.now)
    assert flora.requests == 2


async def test_an_empty_list_is_swept_too(ours: Ledger, clock: Clock) -> None:
    await a_sweeper(ours).tick(clock.now)
    name = "technique-runs|||"
    mark = await ours.core.database.read(lambda tx: sweeps.watermark(tx, name))
    assert mark == clock.now - timedelta(hours=24)


async def test_a_run_that_a_start_may_be_about_to_name_is_left_alone(
    ours: Ledger, flora: Stand, clock: Clock
) -> None:
    """Taken up now, its handlers would miss the metadata that its start knows.

    The overlap shows it again.
    """
    start = Start(
        token="t1",
        workspace_id="",
        operation=Operation.TECHNIQUE_RUN,
        technique_id="tech_emu_image",
        idempotency_key="k1",
        request="{}",
        request_hash="h",
        metadata={},
        callback_expected=True,
        state=StartState.ASKING,
        created_at=clock.now,
        due_at=clock.now,
    )
    await ours.core.database.write(lambda tx: starts.add_start(tx, start))
    flora.fill(1, prefix="old")
    flora.fill(1, prefix="young", youngest=timedelta(0))
    sweeper = a_sweeper(ours)
    await sweeper.tick(clock.now)
    assert await ours.core.find("run_young_0") is None
    assert await ours.core.find("run_old_0") is not None
    clock.forward(minutes=15)
    await sweeper.tick(clock.now)
    assert await ours.core.find("run_young_0") is not None


async def test_both_kinds_are_swept_and_filters_narrow_them(
    ours: Ledger, flora: Stand, clock: Clock
) -> None:
    flora.fill(5)
    flora.fill(5, prefix="b", subject=OTHER)
    flora.fill(5, prefix="g", subject=MODEL)
    await a_sweeper(ours, run_types=("technique", "generation"), technique_ids=(OTHER.id,)).tick(clock.now)
    assert await ours.core.count("runs") == 5
    await a_sweeper(ours, run_types=("technique", "generation"), project_ids=("prj_2",)).tick(clock.now)
    assert await ours.core.count("runs") == 5
    await a_sweeper(ours, run_types=("technique", "generation"), workspace_ids=("ws_1",)).tick(clock.now)
    assert await ours.core.count("runs") == 15
    assert flora.requests_by_route == {PAGES: 3, GENERATIONS: 2}


def test_every_combination_of_the_filters_is_a_list_of_its_own(ours: Ledger) -> None:
    readers = {None: ours.readers[None], "ws_9": ours.readers[None]}
    assert scopes(a_discovery(), readers) == (
        Scope(Listing.TECHNIQUE_RUNS),
        Scope(Listing.GENERATIONS),
        Scope(Listing.TECHNIQUE_RUNS, "ws_9"),
        Scope(Listing.GENERATIONS, "ws_9"),
    )
    narrow = a_discovery(workspace_ids=("ws_1",), project_ids=("p1", "p2"), technique_ids=("t1", "t2"))
    assert scopes(narrow, readers) == tuple(
        Scope(Listing.TECHNIQUE_RUNS, "ws_1", technique, project)
        for project in ("p1", "p2")
        for technique in ("t1", "t2")
    )
