"""Statements by which operators have handlers repeat their work, or catch up on older runs."""

from collections.abc import Collection
from datetime import datetime

from sqlalchemy import Connection, and_, exists, or_, select, update
from sqlalchemy.dialects import postgresql

from receiver.model import Dispatch, DispatchState, Event
from receiver.store.queue import dispatches_of_run
from receiver.store.rows import dispatch_row, to_dispatch, to_ms
from receiver.store.schema import dispatch_attempts, dispatches, runs

OVER = (DispatchState.DONE, DispatchState.DEAD)


def reset_dispatches(
    tx: Connection,
    *,
    now: datetime,
    states: Collection[DispatchState],
    run_id: str | None = None,
    handler: str | None = None,
) -> tuple[Dispatch, ...]:
    """Make dispatches in these states, and those that wait for a retry, due now; return them.

    Their earlier attempts are deleted, since attempts are counted from one again.
    """
    waiting = and_(dispatches.c.state == DispatchState.READY.value, dispatches.c.attempts > 0)
    over = dispatches.c.state.in_([state.value for state in states])
    statement = update(dispatches).where(or_(over, waiting))
    if run_id is not None:
        statement = statement.where(dispatches.c.run_id == run_id)
    if handler is not None:
        statement = statement.where(dispatches.c.handler == handler)
    armed = statement.values(
        state=DispatchState.READY.value, attempts=0, due_at=to_ms(now), finished_at=None, result=None
    ).returning(dispatches)
    rows = tx.execute(armed).mappings().all()
    for row in rows:
        tx.execute(dispatch_attempts.delete().where(dispatch_attempts.c.dispatch_seq == row["seq"]))
    return tuple(to_dispatch(row) for row in rows)


def open_round(
    tx: Connection, run_id: str, *, names: Collection[str], handler: str | None = None, now: datetime
) -> tuple[Dispatch, ...]:
    """Add a new round of the finished dispatches of a run, for the handlers in `names`; return it.

    A new round has its own idempotency keys, so effects are applied again.
    """
    last: dict[tuple[str, Event], Dispatch] = {}
    for row in dispatches_of_run(tx, run_id):
        if row.handler in names and handler in (None, row.handler):
            key = row.handler, row.event
            last[key] = max(last.get(key, row), row, key=lambda dispatch: dispatch.round)
    new = [
        Dispatch(run_id, row.handler, row.event, row.round + 1, DispatchState.READY, due_at=now)
        for row in last.values()
        if row.state in OVER
    ]
    if new:
        tx.execute(
            postgresql.insert(dispatches).on_conflict_do_nothing(), [dispatch_row(row) for row in new]
        )
    return tuple(new)


def runs_unknown_to(tx: Connection, handler: str, *, since: datetime, limit: int) -> tuple[str, ...]:
    """Return runs settled since then without a dispatch for a handler: it was not configured yet.

    Reads every run since then.
    """
    dispatched = exists().where(
        dispatches.c.run_id == runs.c.run_id,
        dispatches.c.handler == handler,
        dispatches.c.event == Event.SETTLED.value,
    )
    statement = (
        select(runs.c.run_id)
        .where(runs.c.settled_at >= to_ms(since), ~dispatched)
        .order_by(runs.c.settled_at)
    )
    return tuple(tx.execute(statement.limit(limit)).scalars())
