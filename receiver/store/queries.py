"""Statements of the operations API. They read only, on a reader's connection.

Lists are paged by key, newest first: a row inserted between two pages shifts none of the others.
"""

from collections.abc import Collection
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import ColumnElement, Connection, Row, and_, func, select, tuple_

from receiver.model import (
    Artifact,
    Dispatch,
    DispatchState,
    Output,
    ReadAttempt,
    Rejection,
    Run,
    RunState,
    Start,
    StartState,
)
from receiver.store.ledger import outputs_of_runs, reads_of_run
from receiver.store.queue import DISPATCH_COLUMNS, artifacts_of_run, dispatches_of_run
from receiver.store.rows import from_ms, from_ms_or_none, to_dispatch, to_ms, to_run
from receiver.store.schema import (
    deliveries,
    delivery_bodies,
    dispatch_attempts,
    dispatches,
    rejections,
    runs,
    starts,
)
from receiver.store.starts import to_start

_UNFINISHED = (DispatchState.READY.value, DispatchState.LEASED.value)
_OVER = (RunState.COMPLETED, RunState.FAILED, RunState.LOST)


@dataclass(frozen=True, slots=True)
class RunDetails:
    """A run with its last reads, outputs, artifacts, dispatches and start."""

    run: Run
    reads: tuple[ReadAttempt, ...]
    outputs: tuple[Output, ...]
    artifacts: tuple[Artifact, ...]
    dispatches: tuple[Dispatch, ...]
    start: Start | None

    def is_finished_for(self, handlers: Collection[str]) -> bool:
        """Return whether the run has ended and these handlers have nothing left to do for it."""
        left = (row.state.value in _UNFINISHED and row.handler in handlers for row in self.dispatches)
        return self.run.state in _OVER and not any(left)


@dataclass(frozen=True, slots=True)
class DeliveryRecord:
    """A recorded delivery; `body` and `signature` are None if not selected or already deleted."""

    seq: int
    delivery_id: str
    run_id: str | None
    event: str | None
    api_version: str | None
    received_at: datetime
    age: int
    readable: bool
    duplicates: int
    last_duplicate_at: datetime | None
    body: bytes | None = None
    signature: str | None = None


@dataclass(frozen=True, slots=True)
class Attempt:
    """One call of a handler."""

    handler: str
    event: str
    attempt: int
    started_at: datetime
    ended_at: datetime | None
    outcome: str | None
    error: str | None


def run_details(tx: Connection, run_id: str) -> RunDetails | None:
    """Return a run with its last reads, outputs, artifacts, dispatches and start."""
    row = tx.execute(select(runs).where(runs.c.run_id == run_id)).mappings().one_or_none()
    if row is None:
        return None
    start = tx.execute(select(starts).where(starts.c.run_id == run_id).limit(1)).mappings().one_or_none()
    return RunDetails(
        run=to_run(row),
        reads=reads_of_run(tx, run_id),
        outputs=outputs_of_runs(tx, [run_id])[run_id],
        artifacts=tuple(artifacts_of_run(tx, run_id)),
        dispatches=dispatches_of_run(tx, run_id),
        start=None if start is None else to_start(start),
    )


def is_finished(tx: Connection, run_id: str, handlers: Collection[str]) -> bool | None:
    """Return whether a run has ended and these handlers have nothing left to do for it.

    None means that there is no such run.
    """
    state = tx.execute(select(runs.c.state).where(runs.c.run_id == run_id)).scalar_one_or_none()
    if state is None:
        return None
    return RunState(state) in _OVER and not runs_with_work(tx, [run_id], handlers)


def runs_with_work(tx: Connection, run_ids: Collection[str], handlers: Collection[str]) -> frozenset[str]:
    """Return those of these runs for which these handlers still have something to do."""
    statement = select(dispatches.c.run_id).where(
        dispatches.c.run_id.in_(run_ids),
        dispatches.c.state.in_(_UNFINISHED),
        dispatches.c.handler.in_(handlers),
    )
    return frozenset(tx.execute(statement.distinct()).scalars())


def run_page(
    tx: Connection, *, limit: int, state: RunState | None = None, before: tuple[int, str] | None = None
) -> tuple[Run, ...]:
    """Return runs by (first_seen_at, run_id), newest first.

    `before` is the `run_key` of the last run of the previous page.
    """
    key = (runs.c.first_seen_at, runs.c.run_id)
    statement = select(runs).order_by(*(column.desc() for column in key)).limit(limit)
    if state is not None:
        statement = statement.where(runs.c.state == state.value)
    if before is not None:
        statement = statement.where(tuple_(*key) < tuple_(*before))
    return tuple(to_run(row) for row in tx.execute(statement).mappings())


def start_page(
    tx: Connection,
    *,
    limit: int,
    state: StartState | None = None,
    key: str | None = None,
    prefix: str | None = None,
    before: tuple[int, str] | None = None,
) -> tuple[Start, ...]:
    """Return starts by (created_at, token), newest first; `prefix` is that of their keys."""
    order = (starts.c.created_at, starts.c.token)
    statement = select(starts).order_by(*(column.desc() for column in order)).limit(limit)
    if state is not None:
        statement = statement.where(starts.c.state == state.value)
    if key is not None:
        statement = statement.where(starts.c.idempotency_key == key)
    if prefix is not None:
        statement = statement.where(func.substr(starts.c.idempotency_key, 1, len(prefix)) == prefix)
    if before is not None:
        statement = statement.where(tuple_(*order) < tuple_(*before))
    return tuple(to_start(row) for row in tx.execute(statement).mappings())


def delivery_page(
    tx: Connection, *, limit: int, run_id: str | None = None, before: int | None = None
) -> tuple[DeliveryRecord, ...]:
    """Return deliveries by their sequence, newest first."""
    statement = select(deliveries).order_by(deliveries.c.seq.desc()).limit(limit)
    if run_id is not None:
        statement = statement.where(deliveries.c.run_id == run_id)
    if before is not None:
        statement = statement.where(deliveries.c.seq < before)
    return tuple(_to_delivery_record(row) for row in tx.execute(statement))


def delivery_by_id(tx: Connection, delivery_id: str) -> DeliveryRecord | None:
    """Return one delivery with its raw body, if that is still kept."""
    statement = (
        select(deliveries, delivery_bodies.c.body, delivery_bodies.c.signature)
        .outerjoin(delivery_bodies, delivery_bodies.c.seq == deliveries.c.seq)
        .where(deliveries.c.delivery_id == delivery_id)
    )
    row = tx.execute(statement).one_or_none()
    return None if row is None else _to_delivery_record(row, body=row.body, signature=row.signature)


def rejection_page(
    tx: Connection, *, limit: int, before: int | None = None
) -> tuple[tuple[int, Rejection], ...]:
    """Return refused requests with their sequence, newest first."""
    statement = select(rejections).order_by(rejections.c.seq.desc()).limit(limit)
    if before is not None:
        statement = statement.where(rejections.c.seq < before)
    return tuple(
        (row.seq, Rejection(from_ms(row.rejected_at), row.code, row.remote, row.size))
        for row in tx.execute(statement)
    )


def dispatch_page(
    tx: Connection, *, limit: int, state: DispatchState, before: int | None = None
) -> tuple[tuple[int, Dispatch], ...]:
    """Return the dispatches in a state with their sequence, newest first."""
    statement = (
        select(*DISPATCH_COLUMNS)
        .where(dispatches.c.state == state.value)
        .order_by(dispatches.c.seq.desc())
        .limit(limit)
    )
    if before is not None:
        statement = statement.where(dispatches.c.seq < before)
    return tuple((row["seq"], to_dispatch(row)) for row in tx.execute(statement).mappings())


def orphan_page(
    tx: Connection, *, limit: int, handlers: Collection[str], before: int | None = None
) -> tuple[tuple[int, Dispatch], ...]:
    """Return dispatches that wait for other handlers than these, with `seq`, newest first."""
    statement = (
        select(*DISPATCH_COLUMNS)
        .where(_is_orphaned(handlers))
        .order_by(dispatches.c.seq.desc())
        .limit(limit)
    )
    if before is not None:
        statement = statement.where(dispatches.c.seq < before)
    return tuple((row["seq"], to_dispatch(row)) for row in tx.execute(statement).mappings())


def count_orphans(tx: Connection, handlers: Collection[str]) -> dict[str, int]:
    """Return how many dispatches wait for handlers other than these, by handler."""
    statement = (
        select(dispatches.c.handler, func.count())
        .where(_is_orphaned(handlers))
        .group_by(dispatches.c.handler)
    )
    return {handler: int(rows) for handler, rows in tx.execute(statement)}


def attempts_of_run(tx: Connection, run_id: str) -> tuple[Attempt, ...]:
    """Return every call of a handler about a run, oldest first."""
    statement = (
        select(dispatch_attempts, dispatches.c.handler, dispatches.c.event)
        .join(dispatches, dispatches.c.seq == dispatch_attempts.c.dispatch_seq)
        .where(dispatches.c.run_id == run_id)
        .order_by(dispatch_attempts.c.started_at, dispatches.c.seq, dispatch_attempts.c.attempt)
    )
    return tuple(
        Attempt(
            row.handler, row.event, row.attempt, from_ms(row.started_at), from_ms_or_none(row.ended_at), row.outcome,
            row.error,
        )
        for row in tx.execute(statement)
    )  # fmt: skip


def count_unsettled(tx: Connection) -> dict[str, int]:
    """Return how many runs are open, and how many reported. Reads unsettled runs only."""
    states = (RunState.OPEN.value, RunState.REPORTED.value)
    statement = (
        select(runs.c.state, func.count())
        .where(runs.c.next_poll_at.is_not(None), runs.c.state.in_(states))
        .group_by(runs.c.state)
    )
    return dict.fromkeys(states, 0) | {state: int(rows) for state, rows in tx.execute(statement)}


def count_backlog(tx: Connection, handlers: Collection[str]) -> dict[str, int]:
    """Return how many dispatches are ready, leased, dead, and orphaned (of other handlers)."""
    states = (*_UNFINISHED, DispatchState.DEAD.value)
    statement = (
        select(dispatches.c.state, func.count())
        .where(dispatches.c.state.in_(states), ~_is_orphaned(handlers))
        .group_by(dispatches.c.state)
    )
    counted = {state: int(rows) for state, rows in tx.execute(statement)}
    return dict.fromkeys(states, 0) | counted | {"orphaned": sum(count_orphans(tx, handlers).values())}


def overdue_seconds(tx: Connection, handlers: Collection[str], *, now: datetime) -> dict[str, float]:
    """Return by how many seconds the oldest read and dispatch of these handlers are overdue."""
    ready = and_(dispatches.c.state == DispatchState.READY.value, dispatches.c.handler.in_(handlers))
    oldest = {
        "run": tx.execute(
            select(func.min(runs.c.next_poll_at)).where(runs.c.next_poll_at.is_not(None))
        ).scalar_one_or_none(),
        "dispatch": tx.execute(select(func.min(dispatches.c.due_at)).where(ready)).scalar_one_or_none(),
    }
    return {
        queue: 0.0 if due is None else max(0.0, (to_ms(now) - due) / 1000) for queue, due in oldest.items()
    }


def run_key(run: Run) -> tuple[int, str]:
    """Return the key by which pages of runs are ordered."""
    return to_ms(run.first_seen_at), run.run_id


def start_key(start: Start) -> tuple[int, str]:
    """Return the key by which pages of starts are ordered."""
    return to_ms(start.created_at), start.token


def _is_orphaned(handlers: Collection[str]) -> ColumnElement[bool]:
    return and_(dispatches.c.state.in_(_UNFINISHED), dispatches.c.handler.not_in(handlers))


def _to_delivery_record(
    row: Row[Any], *, body: bytes | None = None, signature: str | None = None
) -> DeliveryRecord:
    return DeliveryRecord(
        seq=row.seq,
        delivery_id=row.delivery_id,
        run_id=row.run_id,
        event=row.event,
        api_version=row.api_version,
        received_at=from_ms(row.received_at),
        age=row.age,
        readable=row.readable,
        duplicates=row.duplicates,
        last_duplicate_at=from_ms_or_none(row.last_duplicate_at),
        body=body,
        signature=signature,
    )
