"""Work that is retried by hand: its history stays and is numbered on, its limit counts from there."""

from datetime import timedelta
from functools import partial
from typing import Any

import pytest
from sqlalchemy import event

from receiver.model import Dispatch, DispatchState, Event, RunState
from receiver.store import Database, ledger, queries, queue, redispatch
from receiver.store.queue import Leased
from tests.support.core import NOW, Core, a_run

TOKEN = "t1"
UNTIL = NOW + timedelta(seconds=60)
DEAD = (DispatchState.DEAD,)
LIMIT = 2


async def add(core: Core, *states: DispatchState, handler: str = "h") -> None:
    """Add a run for each state, `run_0` onwards, with a dispatch in it."""
    runs = [a_run(RunState.COMPLETED, run_id=f"run_{n}") for n in range(len(states))]
    rows = [Dispatch(f"run_{n}", handler, Event.SETTLED, 0, state, NOW) for n, state in enumerate(states)]

    def job(tx: Any) -> None:
        ledger.add_runs(tx, runs)
        ledger.add_dispatches(tx, rows)

    await core.database.write(job)


async def fail(core: Core, times: int) -> list[int]:
    """Let the handler's attempts fail; the last one allowed is the end. Return how each was counted."""
    counted = []
    for _ in range(times):
        (leased,) = await claim(core)
        counted.append(leased.dispatch.attempts)
        end = DispatchState.DEAD if leased.dispatch.attempts == LIMIT else DispatchState.READY
        finish = partial(queue.finish, leased=leased, token=TOKEN, state=end, now=NOW, error="away")
        assert await core.database.write(finish)
    return counted


async def claim(core: Core) -> tuple[Leased, ...]:
    return await core.database.write(
        lambda tx: queue.claim(tx, "h", limit=10, max_attempts=LIMIT, token=TOKEN, now=NOW, until=UNTIL)
    )


async def retry(
    core: Core, states: tuple[DispatchState, ...] = DEAD, **chosen: Any
) -> tuple[Dispatch, ...]:
    seqs = await core.database.read(
        lambda tx: redispatch.seqs_to_retry(tx, states=states, **{"limit": 10, **chosen})
    )
    return await core.database.write(
        lambda tx: redispatch.retry_dispatches(tx, seqs, now=NOW, states=states)
    )


async def history(core: Core) -> list[tuple[int, str | None]]:
    rows = await core.database.read(lambda tx: queries.attempts_of_run(tx, "run_0"))
    return [(row.attempt, row.outcome) for row in rows]


async def test_attempts_are_numbered_on_and_the_limit_counts_from_the_retry(core: Core) -> None:
    await add(core, DispatchState.READY)
    assert await fail(core, LIMIT) == [1, 2]
    (again,) = await retry(core)
    assert (again.state, again.attempts, again.last_attempt, again.last_error) == (
        DispatchState.READY, 0, 2, "away"
    )  # fmt: skip
    assert await history(core) == [(1, "ready"), (2, "dead")]
    assert await fail(core, LIMIT) == [1, 2]
    assert await history(core) == [(1, "ready"), (2, "dead"), (3, "ready"), (4, "dead")]
    (dead,) = await core.dispatches("run_0")
    assert (dead.state, dead.attempts, dead.last_attempt) == (DispatchState.DEAD, 2, 4)


async def test_an_attempt_that_is_given_back_after_a_retry_leaves_the_history_as_it_was(core: Core) -> None:
    await add(core, DispatchState.READY)
    await fail(core, LIMIT)
    await retry(core)
    (leased,) = await claim(core)
    assert leased.dispatch.last_attempt == 3
    assert not await core.database.read(lambda tx: queue.is_attempt_recorded(tx, leased))
    await core.database.write(lambda tx: queue.release(tx, [leased.seq], token=TOKEN))
    assert await history(core) == [(1, "ready"), (2, "dead")]
    assert await fail(core, 1) == [1]
    assert (await history(core))[2:] == [(3, "ready")]


async def test_what_waits_is_due_now_with_all_its_attempts(core: Core) -> None:
    await add(core, DispatchState.READY)
    await fail(core, 1)
    (again,) = await retry(core)
    assert (again.due_at, again.attempts, again.last_attempt) == (NOW, 0, 1)
    assert await fail(core, LIMIT) == [1, 2]


async def test_only_what_may_be_retried_is_found_in_the_order_of_its_keys(core: Core) -> None:
    """New work, work in progress and work that is done are left alone."""
    ready, dead, done = DispatchState.READY, DispatchState.DEAD, DispatchState.DONE
    await add(core, dead, ready, done, dead, DispatchState.SKIPPED, dead)
    found = await core.database.read(lambda tx: redispatch.seqs_to_retry(tx, states=DEAD, limit=2))
    assert found == (1, 4)
    rest = await core.database.read(lambda tx: redispatch.seqs_to_retry(tx, states=DEAD, limit=2, after=4))
    assert rest == (6,)
    assert [row.run_id for row in await retry(core, handler="h")] == ["run_0", "run_3", "run_5"]
    assert await retry(core, redispatch.OVER, run_id="run_2", handler="other") == ()
    assert [row.run_id for row in await retry(core, redispatch.OVER, run_id="run_2")] == ["run_2"]
    leased = await claim(core)
    assert len(leased) == 5
    assert await retry(core, redispatch.OVER) == ()


async def test_what_changed_since_it_was_found_is_left_alone(core: Core) -> None:
    await add(core, DispatchState.READY)
    assert (
        await core.database.write(
            lambda tx: redispatch.retry_dispatches(tx, [1], now=NOW, states=redispatch.OVER)
        )
        == ()
    )


async def test_dispatches_without_attempts_left_die_some_at_a_time(core: Core) -> None:
    """A lower limit may end thousands at once, and callbacks share the writer."""
    await add(core, *[DispatchState.READY] * 60)
    ended = [
        len(await core.database.write(lambda tx: queue.mark_exhausted(tx, "h", max_attempts=0, now=NOW)))
        for _ in range(3)
    ]
    assert ended == [50, 10, 0]


@pytest.mark.parametrize("handler", [None, "h"])
async def test_finding_the_dead_reads_nothing_that_is_done(database: Database, handler: str | None) -> None:
    """Among millions that are done, the dead and the waiting are found by their indexes."""
    asked: list[tuple[str, Any]] = []

    def plans(tx: Any) -> list[str]:
        def note(_c: Any, _cursor: Any, statement: str, parameters: Any, *_: Any) -> None:
            asked.append((statement, parameters))

        event.listen(tx, "before_cursor_execute", note)
        redispatch.seqs_to_retry(tx, states=DEAD, limit=10, handler=handler)
        event.remove(tx, "before_cursor_execute", note)
        explain = "EXPLAIN " if database.shared else "EXPLAIN QUERY PLAN "
        if database.shared:  # in a small table PostgreSQL reads everything, which is right
            tx.exec_driver_sql("SET LOCAL enable_seqscan = off").close()
        return [
            "\n".join(row[-1] for row in tx.exec_driver_sql(explain + statement, parameters))
            for statement, parameters in asked
        ]

    dead, waiting = await database.write(plans)
    assert "ix_dispatches_dead" in dead
    assert "ix_dispatches_due" in waiting
