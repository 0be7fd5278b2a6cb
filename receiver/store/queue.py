"""Statements on dispatches and artifacts, for the dispatcher. Its writes are guarded by leases."""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import msgspec
from sqlalchemy import (
    CTE,
    ColumnElement,
    Connection,
    and_,
    exists,
    func,
    literal_column,
    or_,
    select,
    update,
)
from sqlalchemy.dialects import postgresql
from sqlalchemy.exc import IntegrityError

from receiver.errors import LocationTakenError
from receiver.model import Artifact, Dispatch, DispatchState, Event, Lane, Output, Run
from receiver.store.ledger import outputs_of_runs, runs_by_id
from receiver.store.rows import to_artifact, to_dispatch, to_ms
from receiver.store.schema import artifacts, dispatch_attempts, dispatches

# Literals: a partial index is used only if the query itself has its condition.
READY: ColumnElement[str] = literal_column(f"'{DispatchState.READY.value}'")
_LEASED: ColumnElement[str] = literal_column(f"'{DispatchState.LEASED.value}'")
UNFINISHED = (READY, _LEASED)
_UNFINISHED_VALUES = frozenset({DispatchState.READY.value, DispatchState.LEASED.value})

DISPATCH_COLUMNS = (
    *dispatches.c,
    select(func.max(dispatch_attempts.c.attempt))
    .where(dispatch_attempts.c.dispatch_seq == dispatches.c.seq)
    .correlate(dispatches)
    .scalar_subquery()
    .label("last_attempt"),
)
"""A dispatch with the number of its latest attempt: what `to_dispatch` reads."""
_EXHAUSTED_AT_ONCE = 50


@dataclass(frozen=True, slots=True)
class Leased:
    """A dispatch leased to a worker, with what its handler needs. `seq` is the key of the row."""

    seq: int
    dispatch: Dispatch
    run: Run
    outputs: tuple[Output, ...]
    artifacts: tuple[Artifact, ...]


def claim(
    tx: Connection,
    handler: str,
    *,
    limit: int,
    max_attempts: int,
    token: str,
    now: datetime,
    until: datetime,
    expired_by: datetime | None = None,
    lanes: Collection[Lane] = tuple(Lane),
) -> tuple[Leased, ...]:
    """Lease up to `limit` due dispatches of a handler to `token`, longest due first.

    The attempt is counted. Dispatches of one run and handler are leased one at a time, in the order
    they were made. One whose attempts are exhausted is not leased again: see `mark_exhausted`. With
    `expired_by`, leases of other workers that had expired by then are taken over.
    """
    due = _claimable(handler, lanes, limit, max_attempts, now=now, expired_by=expired_by)
    statement = (
        update(dispatches)
        .where(dispatches.c.seq.in_(select(due.c.seq)))
        .values(
            state=DispatchState.LEASED.value,
            attempts=dispatches.c.attempts + 1,
            lease_token=token,
            lease_until=to_ms(until),
        )
        .returning(*DISPATCH_COLUMNS)
    )
    rows = tx.execute(statement).mappings().all()
    if not rows:
        return ()
    leased = {row["seq"]: _begin_attempt(to_dispatch(row), row["last_attempt"] or 0) for row in rows}
    tx.execute(
        postgresql.insert(dispatch_attempts).on_conflict_do_nothing(),
        [
            {"dispatch_seq": seq, "attempt": dispatch.last_attempt, "started_at": to_ms(now)}
            for seq, dispatch in leased.items()
        ],
    )
    run_ids = {row["run_id"] for row in rows}
    runs, outputs = runs_by_id(tx, run_ids), outputs_of_runs(tx, run_ids)
    stored = artifacts_of_runs(tx, run_ids, handler)
    return tuple(
        Leased(seq, each, runs[each.run_id], outputs[each.run_id], stored[each.run_id])
        for seq, each in leased.items()
    )


def _begin_attempt(dispatch: Dispatch, before: int) -> Dispatch:
    """Return a dispatch whose new attempt is counted, numbered after those in its history."""
    return msgspec.structs.replace(dispatch, last_attempt=max(before + 1, dispatch.attempts))


def _claimable(
    handler: str,
    lanes: Collection[Lane],
    limit: int,
    max_attempts: int,
    *,
    now: datetime,
    expired_by: datetime | None,
) -> CTE:
    """Select the dispatches that `claim` may lease."""
    earlier = dispatches.alias("earlier")
    return (
        select(dispatches.c.seq)
        .where(
            dispatches.c.handler == handler,
            dispatches.c.lane.in_(lanes),
            _is_due(now, expired_by=expired_by),
            dispatches.c.attempts < max_attempts,
            ~exists().where(
                earlier.c.run_id == dispatches.c.run_id,
                earlier.c.handler == dispatches.c.handler,
                earlier.c.seq < dispatches.c.seq,
                earlier.c.state.in_(UNFINISHED),
            ),
        )
        .order_by(dispatches.c.due_at, dispatches.c.seq)
        .limit(limit)
        .with_for_update(skip_locked=True)
        # A CTE, not an IN subquery: PostgreSQL may run the latter again and claim more than LIMIT.
        .cte("due")
    )


def mark_exhausted(
    tx: Connection, handler: str, *, max_attempts: int, now: datetime, expired_by: datetime | None = None
) -> tuple[Dispatch, ...]:
    """Mark due dispatches without attempts left as dead: workers died, or the limit was lowered.

    Some at a time: callbacks share the writer, and each dead dispatch may add alerts.
    """
    due = (
        select(dispatches.c.seq)
        .where(
            dispatches.c.handler == handler,
            _is_due(now, expired_by=expired_by),
            dispatches.c.attempts >= max_attempts,
        )
        .order_by(dispatches.c.due_at, dispatches.c.seq)
        .limit(_EXHAUSTED_AT_ONCE)
        .with_for_update(skip_locked=True)
        .cte("exhausted")
    )
    statement = (
        update(dispatches)
        .where(dispatches.c.seq.in_(select(due.c.seq)))
        .values(
            state=DispatchState.DEAD.value,
            lease_token=None,
            lease_until=None,
            finished_at=to_ms(now),
            last_error=func.coalesce(
                dispatches.c.last_error, "every worker that tried it stopped before it answered"
            ),
        )
        .returning(*DISPATCH_COLUMNS)
    )
    return tuple(to_dispatch(row) for row in tx.execute(statement).mappings().all())


def renew(tx: Connection, seqs: Collection[int], *, token: str, until: datetime) -> frozenset[int]:
    """Extend leases; return those still held. The others were taken over: their work must stop."""
    statement = (
        update(dispatches)
        .where(_is_leased_by(seqs, token))
        .values(lease_until=to_ms(until))
        .returning(dispatches.c.seq)
    )
    return frozenset(tx.execute(statement).scalars())


def finish(
    tx: Connection,
    leased: Leased,
    *,
    token: str,
    state: DispatchState,
    now: datetime,
    due_at: datetime | None = None,
    error: str | None = None,
    result: Mapping[str, Any] | None = None,
    lane: Lane | None = None,
) -> bool:
    """Record how an attempt ended. If its lease was lost, write nothing and return False.

    `lane` is that of the next attempt, by the sizes measured in this one.
    """
    over = state is not DispatchState.READY
    changed = tx.execute(
        update(dispatches)
        .where(_is_leased_by([leased.seq], token))
        .values(
            state=state.value,
            lease_token=None,
            lease_until=None,
            due_at=to_ms(due_at or leased.dispatch.due_at),
            last_error=error,
            result=None
            if result is None
            else json.dumps(dict(result), default=str),  # ASCII: half characters are escaped
            finished_at=to_ms(now) if over else None,
            lane=(lane or leased.dispatch.lane).value,
        )
    ).rowcount
    if not changed:
        return False
    tx.execute(
        update(dispatch_attempts)
        .where(
            dispatch_attempts.c.dispatch_seq == leased.seq,
            dispatch_attempts.c.attempt == leased.dispatch.last_attempt,
        )
        .values(ended_at=to_ms(now), outcome=state.value, error=error)
    )
    return True


def is_attempt_recorded(tx: Connection, leased: Leased) -> bool:
    """Return whether the end of this attempt is recorded, which only its own worker does."""
    ended = exists().where(
        dispatch_attempts.c.dispatch_seq == leased.seq,
        dispatch_attempts.c.attempt == leased.dispatch.last_attempt,
        dispatch_attempts.c.ended_at.is_not(None),
    )
    return bool(tx.execute(select(ended)).scalar_one())


def release(tx: Connection, seqs: Collection[int], *, token: str) -> int:
    """Release unused leases without counting the attempt: the process stops."""
    if not seqs:
        return 0
    held = select(*DISPATCH_COLUMNS).where(_is_leased_by(seqs, token))
    for row in tx.execute(held).mappings().all():
        tx.execute(
            dispatch_attempts.delete().where(
                dispatch_attempts.c.dispatch_seq == row["seq"],
                dispatch_attempts.c.attempt == row["last_attempt"],
            )
        )
    return tx.execute(
        update(dispatches)
        .where(_is_leased_by(seqs, token))
        .values(
            state=DispatchState.READY.value,
            attempts=dispatches.c.attempts - 1,
            lease_token=None,
            lease_until=None,
        )
    ).rowcount


def release_all(tx: Connection) -> int:
    """Release all leases, at start on SQLite: the processes that held them have ended."""
    return tx.execute(
        update(dispatches)
        .where(dispatches.c.state == DispatchState.LEASED.value)
        .values(state=DispatchState.READY.value, lease_token=None, lease_until=None)
    ).rowcount


def due_lanes(
    tx: Connection, handler: str, *, now: datetime, expired_by: datetime | None = None
) -> frozenset[Lane]:
    """Return the lanes in which a handler has due dispatches."""
    due = [
        exists().where(
            dispatches.c.handler == handler,
            dispatches.c.lane == lane.value,
            _is_due(now, expired_by=expired_by),
        )
        for lane in Lane
    ]
    return frozenset(lane for lane, some in zip(Lane, tx.execute(select(*due)).one(), strict=True) if some)


def next_dispatch_due_ms(tx: Connection, handlers: Collection[str], *, after: datetime) -> int | None:
    """Return when the next dispatch of these handlers becomes due, in Unix milliseconds, or None.

    Those already due are left out: they run, or wait for an attempt to end, which wakes the
    dispatcher.
    """
    return tx.execute(
        select(func.min(dispatches.c.due_at)).where(
            dispatches.c.handler.in_(handlers),
            dispatches.c.lane.in_(tuple(Lane)),  # the index has it before the time
            dispatches.c.state.in_(UNFINISHED),
            dispatches.c.state == READY,
            dispatches.c.due_at > to_ms(after),
        )
    ).scalar_one_or_none()


def next_round(tx: Connection, run_id: str, event: Event) -> int:
    """Return the round after the last one of an event of a run."""
    last = tx.execute(
        select(func.max(dispatches.c.round)).where(
            dispatches.c.run_id == run_id, dispatches.c.event == event.value
        )
    ).scalar_one_or_none()
    return 0 if last is None else last + 1


def artifacts_of_runs(
    tx: Connection, run_ids: Collection[str], handler: str
) -> dict[str, tuple[Artifact, ...]]:
    """Return what a handler has reserved or stored for each of these runs, by position."""
    statement = (
        select(artifacts)
        .where(artifacts.c.run_id.in_(run_ids), artifacts.c.handler == handler)
        .order_by(artifacts.c.run_id, artifacts.c.position)
    )
    found: dict[str, list[Artifact]] = {run_id: [] for run_id in run_ids}
    for row in tx.execute(statement).mappings():
        found[row["run_id"]].append(to_artifact(row))
    return {run_id: tuple(rows) for run_id, rows in found.items()}


def reserve_location(
    tx: Connection,
    run_id: str,
    handler: str,
    position: int,
    output_id: str,
    location: str,
    *,
    vacant: bool = False,
) -> None:
    """Reserve a location for an output, in place of an earlier one of the same output.

    Raises LocationTakenError if the location belongs to another output. A claim is void if its
    run's dispatches are over and nothing is stored there: it never was, or, as `vacant` states, no
    longer is.
    """
    _delete_void_claim(tx, run_id, handler, position, location, vacant=vacant)
    statement = postgresql.insert(artifacts).values(
        run_id=run_id, handler=handler, position=position, output_id=output_id, location=location
    )
    moved = statement.on_conflict_do_update(
        index_elements=["run_id", "handler", "position"],
        set_={
            "location": location,
            "output_id": output_id,
            "stored_at": None,
            "sha256": None,
            "size": None,
        },
        where=artifacts.c.location != location,
    )
    try:
        tx.execute(moved)
    except IntegrityError as error:
        # Another process has reserved it at the same time.
        raise LocationTakenError(f"{location} belongs to another output", pending=True) from error


def _delete_void_claim(
    tx: Connection, run_id: str, handler: str, position: int, location: str, *, vacant: bool
) -> None:
    """Delete the claim of another run to a location if it is void, else raise LocationTakenError."""
    held = and_(artifacts.c.handler == handler, artifacts.c.location == location)
    row = tx.execute(select(artifacts).where(held)).mappings().one_or_none()
    if row is None or (row["run_id"], row["position"]) == (run_id, position):
        return
    holder = to_artifact(row)
    # Locked, or its dispatch might be retried, and find its claim, before this commit.
    states = tx.execute(
        select(dispatches.c.state)
        .where(dispatches.c.run_id == holder.run_id, dispatches.c.handler == handler)
        .order_by(dispatches.c.seq)
        .with_for_update()
    ).scalars()
    is_at_work = holder.run_id == run_id or not {*states}.isdisjoint(_UNFINISHED_VALUES)
    has_file = holder.stored_at is not None and not vacant
    if is_at_work or has_file:
        raise LocationTakenError(
            f"{location} belongs to another output, at position {holder.position} of {holder.run_id}",
            pending=is_at_work and not has_file and holder.run_id != run_id,
        )
    tx.execute(artifacts.delete().where(held, artifacts.c.run_id == holder.run_id))


def store_artifact(
    tx: Connection,
    run_id: str,
    handler: str,
    position: int,
    *,
    size: int,
    sha256: str,
    content_type: str | None,
    now: datetime,
) -> None:
    """Record that the bytes at a reserved location are stored."""
    tx.execute(
        update(artifacts)
        .where(
            artifacts.c.run_id == run_id, artifacts.c.handler == handler, artifacts.c.position == position
        )
        .values(size=size, sha256=sha256, content_type=content_type, stored_at=to_ms(now))
    )


def dispatches_of_run(tx: Connection, run_id: str) -> tuple[Dispatch, ...]:
    """Return a run's dispatches in the order they were made."""
    statement = select(*DISPATCH_COLUMNS).where(dispatches.c.run_id == run_id).order_by(dispatches.c.seq)
    return tuple(to_dispatch(row) for row in tx.execute(statement).mappings())


def artifacts_of_run(tx: Connection, run_id: str) -> Sequence[Artifact]:
    """Return what all handlers have stored for a run."""
    statement = select(artifacts).where(artifacts.c.run_id == run_id)
    return [to_artifact(row) for row in tx.execute(statement.order_by(artifacts.c.position)).mappings()]


def _is_due(now: datetime, *, expired_by: datetime | None) -> Any:
    """Match what is ready and due and, with `expired_by`, leases that had expired by then."""
    due = and_(dispatches.c.state == READY, dispatches.c.due_at <= to_ms(now))
    if expired_by is not None:
        due = or_(due, and_(dispatches.c.state == _LEASED, dispatches.c.lease_until <= to_ms(expired_by)))
    return and_(dispatches.c.state.in_(UNFINISHED), due)


def _is_leased_by(seqs: Collection[int], token: str) -> Any:
    return and_(
        dispatches.c.seq.in_(seqs),
        dispatches.c.state == DispatchState.LEASED.value,
        dispatches.c.lease_token == token,
    )
