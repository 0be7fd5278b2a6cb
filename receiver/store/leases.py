"""Statements on leases for work that only one process may do. Judged by the database's clock."""

from datetime import datetime

from sqlalchemy import Connection, delete, or_, select
from sqlalchemy.dialects import postgresql

from receiver.store.rows import from_ms, to_ms
from receiver.store.schema import leases


def claim(tx: Connection, name: str, *, owner: str, token: str, now: datetime, until: datetime) -> bool:
    """Claim a lease that is free, expired or already ours; False if another process holds it."""
    statement = postgresql.insert(leases).values(name=name, owner=owner, token=token, until=to_ms(until))
    taken = statement.on_conflict_do_update(
        index_elements=["name"],
        set_={"owner": owner, "token": token, "until": to_ms(until)},
        where=or_(leases.c.until <= to_ms(now), leases.c.token == token),
    ).returning(leases.c.name)
    return tx.execute(taken).first() is not None


def held_until(tx: Connection, name: str) -> datetime | None:
    """Return when a lease ends, or None if no process holds it."""
    ends = tx.execute(select(leases.c.until).where(leases.c.name == name)).scalar_one_or_none()
    return None if ends is None else from_ms(ends)


def release(tx: Connection, name: str, *, token: str) -> None:
    """Release a lease, if it is ours."""
    tx.execute(delete(leases).where(leases.c.name == name, leases.c.token == token))
