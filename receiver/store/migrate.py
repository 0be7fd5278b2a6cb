"""Migrates a database to this version's tables. Called at start and by `flora-receiver migrate`."""

import time

from sqlalchemy import Connection, exc, inspect, text

HEAD = "0006"
"""The revision that this version requires; a test compares it with the migrations."""
_LOCK = 0x464C4F5241
"""The key of the advisory lock: FLORA in ASCII."""
_LOCK_TIMEOUT = "3s"
"""How long a migration waits for a table. Callbacks queue behind it, and they wait for 8 s only."""
_TRIES = 10
_PAUSE_SECONDS = 1.0
_RETRYABLE = {"40P01", "55P03"}
"""Deadlock with a replica, lock timeout behind a long read such as pg_dump's: nothing was done."""


def current_revision(connection: Connection) -> str | None:
    """Return the revision of a database, or None if it is empty."""
    if not inspect(connection).has_table("alembic_version"):
        return None
    revision: str | None = connection.execute(
        text("SELECT version_num FROM alembic_version")
    ).scalar_one_or_none()
    return revision


def upgrade(connection: Connection) -> tuple[str | None, str]:
    """Upgrade to HEAD; return the revisions before and after. One query if it is up to date."""
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
            if not left or getattr(error.orig, "sqlstate", None) not in _RETRYABLE:
                raise
            time.sleep(_PAUSE_SECONDS)
    raise AssertionError("unreachable")


def _upgrade_shared(connection: Connection) -> tuple[str | None, str]:
    with connection.begin():
        # One process migrates, the others wait and find nothing to do. The lock is the
        # transaction's, not the session's, because of PgBouncer. All migrations are one
        # transaction, so that a failure changes nothing.
        connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _LOCK})
        connection.execute(
            text("SELECT set_config('lock_timeout', :timeout, true)"), {"timeout": _LOCK_TIMEOUT}
        )
        before = current_revision(connection)
        if before != HEAD:
            _upgrade(connection, before)
    return before, HEAD


def _upgrade(connection: Connection, before: str | None) -> None:
    # Alembic takes 150 ms to import, and almost every start finds nothing to do.
    from receiver.store.alembic_runner import run_migrations  # noqa: PLC0415  # see above

    run_migrations(connection, before=before, head=HEAD)
