"""The queue of dispatches: who may work on what, and that a worker which lost its lease changes nothing."""

import asyncio
from datetime import datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import event, exc

from receiver.errors import LocationTakenError
from receiver.model import Dispatch, DispatchState, Event, Lane, RunState
from receiver.store import Database, ledger, queue, redispatch
from receiver.store.queue import Leased
from receiver.store.rows import to_ms
from tests.support.core import NOW, OUTPUT, Core, a_run

TOKEN = "t1"
UNTIL = NOW + timedelta(seconds=60)
LATER = NOW + timedelta(seconds=61)


@pytest.fixture
async def runs(database: Database) -> None:
    """Two settled runs; the first has an output."""

    def job(tx: Any) -> None:
        ledger.add_runs(tx, [a_run(RunState.COMPLETED), a_run(RunState.COMPLETED, run_id="run_2")])
        ledger.add_outputs(tx, {"run_1": [OUTPUT]})

    await database.write(job)


pytestmark = pytest.mark.usefixtures("runs")


async def add(
    database: Database, *rows: tuple[str, Event, DispatchState, int] | tuple[str, Event], h: str = "h"
) -> None:
    """Add dispatches: run, event, and where they differ from ready and now, state and due in seconds."""
    made = []
    for row in rows:
        run_id, event, state, due = (*row, DispatchState.READY, 0)[:4] if len(row) == 2 else row
        made.append(Dispatch(run_id, h, event, 0, state, NOW + timedelta(seconds=due)))
    await database.write(lambda tx: ledger.add_dispatches(tx, made))


async def claim(
    database: Database, token: str = TOKEN, *, now: datetime = NOW, limit: int = 10, **options: Any
) -> tuple[Leased, ...]:
    given = {"max_attempts": 3, "until": now + timedelta(seconds=60), **options}
    handler = given.pop("handler", "h")
    return await database.write(
        lambda tx: queue.claim(tx, handler, limit=limit, token=token, now=now, **given)
    )


async def finish(
    database: Database,
    leased: Leased,
    state: DispatchState = DispatchState.DONE,
    token: str = TOKEN,
    **options: Any,
) -> bool:
    return await database.write(
        lambda tx: queue.finish(tx, leased, token=token, state=state, now=NOW, **options)
    )


async def states(core: Core, run_id: str = "run_1") -> dict[Event, tuple[str, int]]:
    return {row.event: (row.state.value, row.attempts) for row in await core.dispatches(run_id)}


async def test_a_claim_brings_all_that_the_work_needs(database: Database) -> None:
    """Run, outputs and earlier artifacts come along; the attempt counts from the claim on."""
    await add(database, ("run_1", Event.SETTLED))
    await database.write(lambda tx: queue.reserve_location(tx, "run_1", "h", 0, "output_1", "/a"))
    (leased,) = await claim(database)
    assert (leased.run.run_id, leased.outputs) == ("run_1", (OUTPUT,))
    assert [artifact.location for artifact in leased.artifacts] == ["/a"]
    dispatch = leased.dispatch
    assert (dispatch.state, dispatch.attempts, dispatch.lease_token) == (DispatchState.LEASED, 1, "t1")
    assert dispatch.lease_until == UNTIL


async def test_what_is_claimed_is_not_claimed_again(database: Database) -> None:
    await add(database, ("run_1", Event.SETTLED))
    assert len(await claim(database)) == 1
    assert await claim(database, "t2") == ()
    assert await claim(database, "t2", now=LATER) == ()


async def test_only_due_and_ready_is_claimed_longest_due_first(database: Database) -> None:
    """Not what is due later, not what is over or skipped, not another handler's; no more than asked for."""
    await add(
        database,
        ("run_1", Event.SETTLED, DispatchState.READY, -1),
        ("run_2", Event.SETTLED, DispatchState.READY, -2),
    )
    await add(
        database,
        ("run_2", Event.LOST, DispatchState.SKIPPED, -9),
        ("run_2", Event.DEAD, DispatchState.DONE, -9),
    )
    await add(database, ("run_1", Event.LOST, DispatchState.DEAD, -9))
    await add(database, ("run_1", Event.SETTLED), h="other")
    assert [leased.run.run_id for leased in await claim(database, limit=1)] == ["run_2"]
    assert [leased.run.run_id for leased in await claim(database, "t2")] == ["run_1"]
    assert await claim(database, "t3") == ()
    await add(database, ("run_1", Event.DIVERGED, DispatchState.READY, 1))
    assert await database.read(lambda tx: queue.due_lanes(tx, "h", now=NOW)) == frozenset()
    assert await database.read(lambda tx: queue.due_lanes(tx, "other", now=NOW)) == {Lane.LIGHT}


async def test_lanes_are_claimed_apart_each_by_age(database: Database) -> None:
    """What is older in the other lane does not get in the way; without a choice, age decides over both."""
    made = [
        Dispatch(
            "run_1", "h", Event.SETTLED, 0, DispatchState.READY, NOW - timedelta(seconds=2), lane=Lane.HEAVY
        ),
        Dispatch("run_2", "h", Event.SETTLED, 0, DispatchState.READY, NOW - timedelta(seconds=1)),
    ]
    await database.write(lambda tx: ledger.add_dispatches(tx, made))
    assert await database.read(lambda tx: queue.due_lanes(tx, "h", now=NOW)) == {Lane.LIGHT, Lane.HEAVY}
    (light,) = await claim(database, limit=1, lanes=(Lane.LIGHT,))
    assert (light.run.run_id, light.dispatch.lane) == ("run_2", Lane.LIGHT)
    assert await database.read(lambda tx: queue.due_lanes(tx, "h", now=NOW)) == {Lane.HEAVY}
    await database.write(lambda tx: queue.release(tx, [light.seq], token=TOKEN))
    (oldest,) = await claim(database, limit=1)
    assert (oldest.run.run_id, oldest.dispatch.lane) == ("run_1", Lane.HEAVY)


async def test_the_next_attempt_goes_where_the_last_one_found_that_it_belongs(database: Database) -> None:
    """Said by the attempt that ended; where it says nothing, the lane stays."""
    await add(database, ("run_1", Event.SETTLED))
    for said, kept in ((Lane.HEAVY, Lane.HEAVY), (None, Lane.HEAVY), (Lane.LIGHT, Lane.LIGHT)):
        (leased,) = await claim(database)
        await finish(database, leased, DispatchState.READY, lane=said)
        assert await database.read(lambda tx: queue.due_lanes(tx, "h", now=NOW)) == {kept}


async def test_looking_at_the_queue_costs_nothing_for_what_is_over(database: Database) -> None:
    """Each look and each claim goes by the index of unfinished dispatches, in its order, however many there were."""
    asked: list[tuple[str, Any]] = []

    def plans(tx: Any) -> list[str]:
        def note(_c: Any, _cursor: Any, statement: str, parameters: Any, *_: Any) -> None:
            asked.append((statement, parameters))

        event.listen(tx, "before_cursor_execute", note)
        queue.claim(
            tx,
            "h",
            lanes=(Lane.LIGHT,),
            limit=1,
            max_attempts=3,
            token=TOKEN,
            now=NOW,
            until=UNTIL,
            expired_by=NOW,
        )
        queue.due_lanes(tx, "h", now=NOW, expired_by=NOW)
        queue.next_dispatch_due_ms(tx, ["h"], after=NOW)
        event.remove(tx, "before_cursor_execute", note)
        explain = "EXPLAIN " if database.shared else "EXPLAIN QUERY PLAN "
        if database.shared:  # in a small table PostgreSQL reads everything, which is right
            tx.exec_driver_sql("SET LOCAL enable_seqscan = off; SET LOCAL enable_bitmapscan = off").close()
        return [
            "\n".join(row[-1] for row in tx.exec_driver_sql(explain + statement, parameters))
            for statement, parameters in asked
        ]

    found = await database.write(plans)
    assert len(found) == 3
    for plan in found:
        assert "ix_dispatches_due" in plan, plan
        assert "SCAN dispatches" not in plan, plan
    assert "ORDER BY" not in found[0], found[0]
    assert "Sort" not in found[0], found[0]


async def test_one_at_a_time_and_in_order_for_each_run_and_handler(database: Database) -> None:
    """Two events of one run never run side by side in one handler; other runs and other handlers do not wait."""
    await add(
        database,
        ("run_1", Event.SETTLED, DispatchState.READY, 0),
        ("run_1", Event.COST_FINAL, DispatchState.READY, -9),
    )
    await add(database, ("run_2", Event.COST_FINAL))
    await add(database, ("run_1", Event.COST_FINAL), h="other")
    first = await claim(database)
    assert [(leased.run.run_id, leased.dispatch.event) for leased in first] == [
        ("run_1", Event.SETTLED),
        ("run_2", Event.COST_FINAL),
    ]
    assert len(await claim(database, handler="other")) == 1
    # A retry that waits for its time still goes before what came after it.
    await finish(database, first[0], DispatchState.READY, due_at=NOW + timedelta(seconds=30))
    assert await claim(database, "t2") == ()
    (again,) = await claim(database, "t3", now=NOW + timedelta(seconds=30))
    assert again.dispatch.event is Event.SETTLED
    await finish(database, again, DispatchState.DEAD, token="t3")
    (last,) = await claim(database, "t4")
    assert last.dispatch.event is Event.COST_FINAL


@pytest.mark.parametrize("state", [DispatchState.DONE, DispatchState.DEAD])
async def test_an_end_is_written_down(core: Core, state: DispatchState) -> None:
    """With its result, its error, and a line for the timeline; the lease is gone."""
    await add(core.database, ("run_1", Event.SETTLED))
    (leased,) = await claim(core.database)
    assert await finish(core.database, leased, state, error="why", result={"a": "\ud800\x00ü", "at": NOW})
    (row,) = await core.rows("SELECT state, lease_token, last_error, result, finished_at FROM dispatches")
    assert tuple(row) == (
        state.value,
        None,
        "why",
        rf'{{"a": "\ud800\u0000\u00fc", "at": "{NOW}"}}',
        to_ms(NOW),
    )
    (attempt,) = await core.rows("SELECT attempt, outcome, error, ended_at FROM dispatch_attempts")
    assert tuple(attempt) == (1, state.value, "why", to_ms(NOW))
    assert await claim(core.database, "t2", now=LATER) == ()


async def test_a_stale_worker_changes_nothing(core: Core) -> None:
    """Neither one with another token, nor one whose lease was taken over, nor one that answers twice."""
    await add(core.database, ("run_1", Event.SETTLED))
    (old,) = await claim(core.database)
    assert not await finish(core.database, old, token="t9")
    (new,) = await claim(core.database, "t2", now=LATER, expired_by=LATER)
    assert new.dispatch.attempts == 2
    assert not await finish(core.database, old)
    assert (
        await core.database.write(lambda tx: queue.renew(tx, [old.seq], token="t1", until=LATER))
        == frozenset()
    )
    assert await core.database.write(lambda tx: queue.release(tx, [old.seq], token="t1")) == 0
    assert await states(core) == {Event.SETTLED: ("leased", 2)}
    assert await finish(core.database, new, token="t2")
    assert not await finish(core.database, new, DispatchState.READY, token="t2")
    assert await states(core) == {Event.SETTLED: ("done", 2)}


async def test_leases_are_taken_over_only_where_allowed_and_run_out(database: Database) -> None:
    """On SQLite the process is the only one: whatever the clock does, a lease holds until it ends."""
    await add(database, ("run_1", Event.SETTLED))
    await claim(database)
    far = NOW + timedelta(days=365)
    assert await claim(database, "t2", now=far) == ()
    assert (
        await claim(
            database,
            "t2",
            now=UNTIL - timedelta(milliseconds=1),
            expired_by=UNTIL - timedelta(milliseconds=1),
        )
        == ()
    )
    assert len(await claim(database, "t2", now=UNTIL, expired_by=UNTIL)) == 1


async def test_renewing_keeps_a_lease(database: Database) -> None:
    await add(database, ("run_1", Event.SETTLED), ("run_2", Event.SETTLED))
    seqs = [leased.seq for leased in await claim(database)]
    held = await database.write(lambda tx: queue.renew(tx, [*seqs, 999], token="t1", until=LATER))
    assert held == frozenset(seqs)
    assert await claim(database, "t2", now=UNTIL, expired_by=UNTIL) == ()


async def test_what_is_given_back_was_never_tried(core: Core) -> None:
    """The attempt is uncounted and leaves no line: the process stopped, the handler is not to blame."""
    await add(core.database, ("run_1", Event.SETTLED), ("run_2", Event.SETTLED))
    one, two = await claim(core.database)
    assert await core.database.write(lambda tx: queue.release(tx, [one.seq], token="t1")) == 1
    assert await core.database.write(lambda tx: queue.release(tx, [], token="t1")) == 0
    assert await states(core) == {Event.SETTLED: ("ready", 0)}
    assert await states(core, "run_2") == {Event.SETTLED: ("leased", 1)}
    assert await core.rows("SELECT dispatch_seq FROM dispatch_attempts") == [(two.seq,)]
    (again,) = await claim(core.database, "t2")
    assert again.dispatch.attempts == 1


async def test_void_leases_count(core: Core) -> None:
    """A process that died did try: its attempts stay counted, or a handler that kills it would do so for ever."""
    await add(core.database, ("run_1", Event.SETTLED), ("run_2", Event.SETTLED, DispatchState.DONE, 0))
    await claim(core.database)
    assert await core.database.write(queue.release_all) == 1
    assert await states(core) == {Event.SETTLED: ("ready", 1)}
    assert await states(core, "run_2") == {Event.SETTLED: ("done", 0)}


async def test_used_up_attempts_are_buried(core: Core) -> None:
    """What took its last attempt down with the process is not handed out again, and dies with a reason."""
    await add(core.database, ("run_1", Event.SETTLED))
    for _ in range(3):
        assert len(await claim(core.database)) == 1
        await core.database.write(queue.release_all)
    assert await claim(core.database) == ()
    assert (
        await core.database.write(lambda tx: queue.mark_exhausted(tx, "h", max_attempts=4, now=NOW)) == ()
    )
    (dead,) = await core.database.write(lambda tx: queue.mark_exhausted(tx, "h", max_attempts=3, now=NOW))
    assert (dead.state, dead.attempts) == (DispatchState.DEAD, 3)
    assert dead.last_error == "every worker that tried it stopped before it answered"
    assert (
        await core.database.write(lambda tx: queue.mark_exhausted(tx, "h", max_attempts=3, now=NOW)) == ()
    )


async def test_burying_leaves_the_living_alone(core: Core) -> None:
    """Not what somebody works on, not what is due later; the last real error is kept."""
    await add(core.database, ("run_1", Event.SETTLED))
    (leased,) = await claim(core.database, max_attempts=1)
    assert (
        await core.database.write(lambda tx: queue.mark_exhausted(tx, "h", max_attempts=1, now=LATER)) == ()
    )
    await finish(core.database, leased, DispatchState.READY, due_at=LATER, error="disk full")
    assert (
        await core.database.write(lambda tx: queue.mark_exhausted(tx, "h", max_attempts=1, now=NOW)) == ()
    )
    (dead,) = await core.database.write(lambda tx: queue.mark_exhausted(tx, "h", max_attempts=1, now=LATER))
    assert dead.last_error == "disk full"


async def test_a_dispatch_is_made_once(core: Core) -> None:
    """The same run, handler, event and round again changes nothing, whatever became of the first."""
    await add(core.database, ("run_1", Event.SETTLED))
    (leased,) = await claim(core.database)
    await finish(core.database, leased)
    await add(core.database, ("run_1", Event.SETTLED))
    assert await states(core) == {Event.SETTLED: ("done", 1)}


async def test_rounds_count_on(database: Database) -> None:
    assert await database.read(lambda tx: queue.next_round(tx, "run_1", Event.DEAD)) == 0
    await add(database, ("run_1", Event.DEAD), ("run_1", Event.SETTLED))
    assert await database.read(lambda tx: queue.next_round(tx, "run_1", Event.DEAD)) == 1
    assert await database.read(lambda tx: queue.next_round(tx, "run_2", Event.DEAD)) == 0


@pytest.mark.parametrize(
    "change",
    [
        "state = 'odd'",
        "event = 'odd'",
        "state = 'leased'",
        "lease_token = 't'",
        f"lease_until = {to_ms(NOW)}",
        "state = 'leased', lease_token = 't'",
        "run_id = 'run_nowhere'",
    ],
)
async def test_impossible_dispatches_are_refused(database: Database, change: str) -> None:
    """A lease has a holder and an end, or there is none."""
    await add(database, ("run_1", Event.SETTLED))
    with pytest.raises(exc.IntegrityError):
        await database.write(lambda tx: tx.exec_driver_sql(f"UPDATE dispatches SET {change}"))  # noqa: S608  # a column's name of ours


# --- artifacts ---------------------------------------------------------------------------------------------------


async def reserve(
    database: Database,
    location: str,
    run_id: str = "run_1",
    position: int = 0,
    handler: str = "h",
    *,
    vacant: bool = False,
) -> None:
    await database.write(
        lambda tx: queue.reserve_location(
            tx, run_id, handler, position, "output_1", location, vacant=vacant
        )
    )


async def store(database: Database, position: int = 0) -> None:
    await database.write(
        lambda tx: queue.store_artifact(
            tx, "run_1", "h", position, size=3, sha256="ab", content_type="image/png", now=NOW
        )
    )


async def places(database: Database, run_id: str = "run_1") -> list[tuple[int, str, bool]]:
    found = await database.read(lambda tx: queue.artifacts_of_run(tx, run_id))
    return [(artifact.position, artifact.location, artifact.stored_at is not None) for artifact in found]


async def test_a_place_belongs_to_one_output(database: Database) -> None:
    """Across runs and within one; another handler has places of its own. Who comes second takes nothing away."""
    await reserve(database, "/a")
    await store(database)
    with pytest.raises(LocationTakenError):
        await reserve(database, "/a", run_id="run_2")
    with pytest.raises(LocationTakenError):
        await reserve(database, "/a", position=1)
    await reserve(database, "/a", handler="other")
    assert (0, "/a", True) in await places(database)
    assert await places(database, "run_2") == []


async def test_reserving_the_same_place_again_keeps_what_is_stored(database: Database) -> None:
    """A retry finds its bytes where it left them."""
    await reserve(database, "/a")
    await store(database)
    await reserve(database, "/a")
    assert await places(database) == [(0, "/a", True)]


async def test_a_claim_moves_and_frees_its_old_place(database: Database) -> None:
    """The new place holds nothing yet; the old one may be taken by another run."""
    await reserve(database, "/a")
    await store(database)
    await reserve(database, "/b")
    assert await places(database) == [(0, "/b", False)]
    await add(database, ("run_2", Event.SETTLED))
    await reserve(database, "/a", run_id="run_2")
    with pytest.raises(LocationTakenError):
        await reserve(database, "/a")
    assert await places(database) == [(0, "/b", False)]


@pytest.mark.parametrize("state", [DispatchState.DEAD, DispatchState.DONE])
async def test_a_place_where_nothing_was_stored_is_free_once_its_dispatches_are_over(
    database: Database, state: DispatchState
) -> None:
    """Dead or done: its claim is void. As long as one dispatch may still store there, the place is kept for it."""
    await add(database, ("run_1", Event.SETTLED, state, 0), ("run_1", Event.COST_FINAL))
    await reserve(database, "/a")
    with pytest.raises(LocationTakenError, match="another output, at position 0 of run_1") as caught:
        await reserve(database, "/a", run_id="run_2")
    assert caught.value.pending, "ready"
    (leased,) = await claim(database)
    with pytest.raises(LocationTakenError) as caught:
        await reserve(database, "/a", run_id="run_2")
    assert caught.value.pending, "leased"
    await finish(database, leased)
    await reserve(database, "/a", run_id="run_2")
    assert await places(database) == []
    assert await places(database, "run_2") == [(0, "/a", False)]


async def test_a_place_where_something_is_stored_is_free_only_if_it_is_seen_to_be_vacant(
    database: Database,
) -> None:
    """The ledger cannot know that a file is gone; the handler that looked says so, once all work there is over."""
    await add(database, ("run_1", Event.SETTLED))
    await reserve(database, "/a")
    await store(database)
    for vacant in (False, True):
        with pytest.raises(LocationTakenError) as caught:
            await reserve(database, "/a", run_id="run_2", vacant=vacant)
        assert caught.value.pending == vacant
    (leased,) = await claim(database)
    await finish(database, leased)
    with pytest.raises(LocationTakenError) as caught:
        await reserve(database, "/a", run_id="run_2")
    assert not caught.value.pending
    with pytest.raises(LocationTakenError):
        await reserve(database, "/a", position=1, vacant=True)
    await reserve(database, "/a", run_id="run_2", vacant=True)
    assert await places(database, "run_2") == [(0, "/a", False)]


async def test_a_retry_of_a_dead_dispatch_and_a_claim_to_its_place_exclude_each_other(
    database: Database,
) -> None:
    """Whichever commits first has the place: two runs never believe that it is theirs."""
    await add(database, ("run_1", Event.SETTLED, DispatchState.DEAD, 0), ("run_2", Event.SETTLED))
    await reserve(database, "/a")

    async def retry() -> tuple[Leased, ...]:
        dead = [DispatchState.DEAD]
        await database.write(
            lambda tx: redispatch.retry_dispatches(
                tx, redispatch.seqs_to_retry(tx, states=dead, limit=1), now=NOW, states=dead
            )
        )
        return await claim(database, limit=1)

    retried, taken = await asyncio.gather(
        retry(), reserve(database, "/a", run_id="run_2"), return_exceptions=True
    )
    kept = await places(database)
    assert bool(kept) == isinstance(taken, LocationTakenError)
    assert not isinstance(retried, BaseException)
    assert [artifact.location for leased in retried for artifact in leased.artifacts] == (
        ["/a"] if kept and retried[0].run.run_id == "run_1" else []
    )


async def test_positions_before_the_first_are_the_handlers_own(database: Database) -> None:
    """The manifest has -1, thumbnails lie below it: each a place of its own."""
    for position, location in ((-1, "/m"), (-2, "/t0"), (-3, "/t1")):
        await reserve(database, location, position=position)
    with pytest.raises(LocationTakenError):
        await reserve(database, "/t1", position=-4)
    assert await places(database) == [(-3, "/t1", False), (-2, "/t0", False), (-1, "/m", False)]


async def test_bytes_are_safe_with_their_hash_or_not_at_all(database: Database) -> None:
    await reserve(database, "/a")
    with pytest.raises(exc.IntegrityError):
        await database.write(lambda tx: tx.exec_driver_sql("UPDATE artifacts SET sha256 = 'ab'"))
