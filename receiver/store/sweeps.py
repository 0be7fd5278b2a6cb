"""Statements of the sweeper: the watermark of each list."""

from datetime import datetime

from sqlalchemy import Connection, select
from sqlalchemy.dialects import postgresql

from receiver.store.rows import from_ms, to_ms
from receiver.store.schema import watermarks


def watermark(tx: Connection, scope: str) -> datetime | None:
    """Return the creation time of the newest run of the last complete sweep of a list, or None."""
    found = tx.execute(
        select(watermarks.c.created_at).where(watermarks.c.scope == scope)
    ).scalar_one_or_none()
    return None if found is None else from_ms(found)


def set_watermark(tx: Connection, scope: str, created_at: datetime, *, swept_at: datetime) -> None:
    """Record that a list was swept completely, up to the run created at `created_at`."""
    statement = postgresql.insert(watermarks)
    upsert = statement.on_conflict_do_update(
        index_elements=["scope"],
        set_={"created_at": statement.excluded.created_at, "swept_at": statement.excluded.swept_at},
    )
    tx.execute(upsert, [{"scope": scope, "created_at": to_ms(created_at), "swept_at": to_ms(swept_at)}])
