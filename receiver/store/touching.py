"""Proves that a database can be written, without changing anything in it. For `doctor`, `check`, readiness and canaries."""

from sqlalchemy import Connection, exc, inspect, text

from receiver.errors import StoreUnavailableError


def touch(tx: Connection) -> None:
    """Write something that is there already, so that the commit has to sync. Raises StoreUnavailableError.

    An empty transaction proves nothing: of a read-only file SQLite makes a transaction that reads, and says no word.
    """
    try:
        if tx.dialect.name == "sqlite":
            number = int(tx.exec_driver_sql("PRAGMA user_version").scalar_one())
            tx.exec_driver_sql(f"PRAGMA user_version = {number}")
        elif inspect(tx).has_table("alembic_version"):
            tx.execute(text("UPDATE alembic_version SET version_num = version_num"))
    except exc.DBAPIError as error:
        raise StoreUnavailableError(f"the database cannot be written: {error.orig}") from error


def check_writable(tx: Connection) -> None:
    """Do what readiness asks for many times a minute. Of PostgreSQL, BEGIN has asked already whether it takes writes."""
    if tx.dialect.name == "sqlite":
        touch(tx)
