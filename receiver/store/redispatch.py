"""Statements by which operators have handlers repeat their work, or catch up on older runs."""

from collections.abc import Collection
from datetime import datetime

from sqlalchemy import ColumnElement, Connection, and_, exists, literal_column, or_, select, update
from sqlalchemy.dialects import postgresql

from receiver.model import Dispatch, DispatchState, Event
from receiver.store.queue import DISPATCH_COLUMNS, READY, UNFINISHED, dispatches_of_run
from receiver.store.rows import dispatch_row, to_dispatch, to_ms
from receiver.store.schema import dispatches, runs

OVER = (DispatchState.DONE, DispatchState.DEAD)

_IS_WAITING = and_(
    dispatches.c.state.in_(UNFINISHED), dispatches.c.state == READY, dispatches.c.attempts > 0
)


def _is_over(state: DispatchState) -> ColumnElement[bool]:
    """Match a state by a literal: with a parameter the index of dead dispatches is not used."""
    return dispatches.c.state == literal_column(f"'{state.value}'")


def seqs_to_retry(
    tx: Connection,
    *,
    states: Collection[DispatchState],
    limit: int,
    after: int = 0,
    run_id: str | None = None,
    handler: str | None = None,
) -> tuple[int, ...]:
    """Return the keys of dispatches in these states, and of those that wait for a retry.

    The lowest `limit` above `after`.
    """
    found: set[int] = set()
    seq = dispatches.c.seq
    # Of those that wait not by the bare key: SQLite would go through the done rows as well.
    chosen = [(_is_over(state), seq) for state in states] + [(_IS_WAITING, seq + 0)]
    for condition, key in chosen:
        statement = select(seq).where(condition, key > after)
        if run_id is not None:
            statement = statement.where(dispatches.c.run_id == run_id)
        if handler is not None:
            statement = statement.where(dispatches.c.handler == handler)
        found.update(tx.execute(statement.order_by(key).limit(limit)).scalars())
    return tuple(sorted(found)[:limit])


def retry_dispatches(
    tx: Connection, seqs: Collection[int], *, now: datetime, states: Collection[DispatchState]
) -> tuple[Dispatch, ...]:
    """Make those of these dispatches that may be retried due now; return them.

    Their history stays, and is numbered on. The limit of attempts counts from here.
    """
    statement = (
        update(dispatches)
        .where(dispatches.c.seq.in_(seqs), or_(_IS_WAITING, *(_is_over(state) for state in states)))
        .values(
            state=DispatchState.READY.value, attempts=0, due_at=to_ms(now), finished_at=None, result=None
        )
        .returning(*DISPATCH_COLUMNS)
    )
    rows = tx.execute(statement).mappings().all()
    return tuple(to_dispatch(row) for row in sorted(rows, key=lambda row: int(row["seq"])))


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
