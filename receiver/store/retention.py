"""Statements of the janitor: retention, rejections, clock jumps. Each deletes a few rows only."""

from collections.abc import Sequence
from datetime import datetime

from sqlalchemy import Connection, delete, func, insert, or_, select, update

from receiver.model import DispatchState, Rejection
from receiver.store.rows import from_ms, to_ms
from receiver.store.schema import deliveries, delivery_bodies, dispatches, rejections, runs


def add_rejections(tx: Connection, new: Sequence[Rejection], *, keep: int) -> None:
    """Add refused requests, and delete the oldest beyond `keep`."""
    if not new:
        return
    tx.execute(
        insert(rejections),
        [
            {
                "rejected_at": to_ms(row.rejected_at),
                "code": row.code,
                "remote": row.remote,
                "size": row.size,
            }
            for row in new[-keep:]
        ],
    )
    newest = tx.execute(select(func.max(rejections.c.seq))).scalar_one()
    tx.execute(delete(rejections).where(rejections.c.seq <= newest - keep))


def delete_bodies(tx: Connection, *, before: datetime, limit: int) -> int:
    """Delete the raw bodies of old deliveries; the deliveries stay, for deduplication."""
    old = (
        select(delivery_bodies.c.seq)
        .join(deliveries, deliveries.c.seq == delivery_bodies.c.seq)
        .where(deliveries.c.received_at < to_ms(before))
        .order_by(deliveries.c.received_at)
        .limit(limit)
    )
    return tx.execute(delete(delivery_bodies).where(delivery_bodies.c.seq.in_(old))).rowcount


def delete_ledger(tx: Connection, *, before: datetime, limit: int) -> int:
    """Delete old runs that have ended, with all that refers to them, and old deliveries."""
    unfinished = select(dispatches.c.run_id).where(
        dispatches.c.state.in_((DispatchState.READY.value, DispatchState.LEASED.value))
    )
    old_runs = (
        select(runs.c.run_id)
        .where(
            runs.c.first_seen_at < to_ms(before),
            runs.c.state.in_(("completed", "failed", "lost")),
            runs.c.run_id.not_in(unfinished),
        )
        .order_by(runs.c.first_seen_at)
        .limit(limit)
    )
    deleted = tx.execute(delete(runs).where(runs.c.run_id.in_(old_runs))).rowcount
    old_deliveries = (
        select(deliveries.c.seq)
        .where(
            deliveries.c.received_at < to_ms(before),
            or_(deliveries.c.run_id.is_(None), deliveries.c.run_id.not_in(select(runs.c.run_id))),
        )
        .order_by(deliveries.c.received_at)
        .limit(limit)
    )
    return deleted + tx.execute(delete(deliveries).where(deliveries.c.seq.in_(old_deliveries))).rowcount


def newest_record_at(tx: Connection) -> datetime | None:
    """Return when the newest run or delivery was recorded, or None if the ledger is empty."""
    run, delivery = (
        tx.execute(select(func.max(column))).scalar_one_or_none()
        for column in (runs.c.first_seen_at, deliveries.c.received_at)
    )
    times = [value for value in (run, delivery) if value is not None]
    return from_ms(max(times)) if times else None


def make_due_by(tx: Connection, *, now: datetime, latest: datetime) -> int:
    """Make due now what is due after `latest`: the clock had jumped ahead when it was scheduled."""
    pulled = tx.execute(
        update(runs).where(runs.c.next_poll_at > to_ms(latest)).values(next_poll_at=to_ms(now))
    ).rowcount
    return (
        pulled
        + tx.execute(
            update(dispatches)
            .where(dispatches.c.state == DispatchState.READY.value, dispatches.c.due_at > to_ms(latest))
            .values(due_at=to_ms(now))
        ).rowcount
    )
