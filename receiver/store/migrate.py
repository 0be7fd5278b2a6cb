"""Bring a database to this version's tables. Called by the service at start and by `flora-receiver migrate`."""

import time

from sqlalchemy import Connection, exc, inspect, text

HEAD = "0005"
"""The revision this version of the code works on; a test holds it against the migrations."""
_LOCK = 0x464C4F5241
"""A number that no other program locks: FLORA in ASCII."""
_PATIENCE = "3s"
"""How long a migration waits for a table. Who comes after it waits behind it: callbacks too, and they have eight seconds."""
_TRIES = 10
_PAUSE_SECONDS = 1.0
_AGAIN = {"40P01", "55P03"}
"""Deadlock with a replica that writes, lock timeout behind one that reads for long (pg_dump): nothing was done."""


def current_revision(connection: Connection) -> str | None:
    """Return the revision that a database is at; None: it is empty."""
    if not inspect(connection).has_table("alembic_version"):
        return None
    revision: str | None = connection.execute(text("SELECT version_num FROM alembic_version")).scalar_one_or_none()
    return revision


def upgrade(connection: Connection) -> tuple[str | None, str]:
    """Upgrade to HEAD; return the revisions before and after. A database that is up to date costs one query."""
    before = current_revision(connection)
    connection.rollback()
    if before == HEAD:
        return before, HEAD
    if connection.dialect.name != "postgresql":
        _upgrade(connection, before)
        return before, HEAD
    for left in reversed(range(_TRIES)):
        try:
            return _upgrade_shared(connection)
        except exc.OperationalError as error:
            if not left or getattr(error.orig, "sqlstate", None) not in _AGAIN:
                raise
            time.sleep(_PAUSE_SECONDS)
    raise AssertionError("unreachable")


def _upgrade_shared(connection: Connection) -> tuple[str | None, str]:
    with connection.begin():
        # One process at a time, the others wait and find nothing to do. A lock of the transaction, not of the session:
        # PgBouncer lends sessions out. All migrations are one transaction, so that a failure leaves what there was.
        connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _LOCK})
        connection.execute(text("SELECT set_config('lock_timeout', :patience, true)"), {"patience": _PATIENCE})
        before = current_revision(connection)
        if before != HEAD:
            _upgrade(connection, before)
    return before, HEAD


def _upgrade(connection: Connection, before: str | None) -> None:
    # Alembic takes 150 ms to import, and almost every start finds nothing to do.
    from receiver.store.alembic_runner import run_migrations  # noqa: PLC0415  # see above

    run_migrations(connection, before=before, head=HEAD)
