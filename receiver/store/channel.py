"""Statements on the callback channel: how many runs had which outcome in which hour."""

from collections.abc import Mapping
from datetime import datetime

from sqlalchemy import Connection, func, select
from sqlalchemy.dialects import postgresql

from receiver.store.rows import from_ms, to_ms
from receiver.store.schema import channel_hours, deliveries, rejections

_HOUR_MS = 3_600_000


def add_outcomes(tx: Connection, outcomes: Mapping[str, int], *, now: datetime) -> None:
    """Add to the counts of this hour."""
    if not outcomes:
        return
    hour = to_ms(now) // _HOUR_MS * _HOUR_MS
    statement = postgresql.insert(channel_hours)
    upsert = statement.on_conflict_do_update(
        index_elements=["hour", "outcome"], set_={"runs": channel_hours.c.runs + statement.excluded.runs}
    )
    tx.execute(
        upsert, [{"hour": hour, "outcome": key, "runs": runs} for key, runs in sorted(outcomes.items())]
    )


def outcomes_by_hour(tx: Connection, *, since: datetime) -> dict[datetime, dict[str, int]]:
    """Return the counts of each hour since `since`, oldest first; empty hours are left out."""
    statement = (
        select(channel_hours).where(channel_hours.c.hour >= to_ms(since)).order_by(channel_hours.c.hour)
    )
    hours: dict[datetime, dict[str, int]] = {}
    for row in tx.execute(statement).mappings():
        hours.setdefault(from_ms(row["hour"]), {})[row["outcome"]] = row["runs"]
    return hours


def count_arrivals(tx: Connection, *, since: datetime) -> int:
    """Return how many verified callbacks arrived since `since`."""
    statement = select(func.count()).select_from(deliveries).where(deliveries.c.received_at >= to_ms(since))
    return int(tx.execute(statement).scalar_one())


def count_refusals(tx: Connection, *, since: datetime) -> dict[str, int]:
    """Return how many requests were refused since `since`, by code, as far as they are kept."""
    statement = (
        select(rejections.c.code, func.count())
        .where(rejections.c.rejected_at >= to_ms(since))
        .group_by(rejections.c.code)
    )
    return {code: int(rows) for code, rows in tx.execute(statement)}
