"""What a ledger's database can do, whichever it is, and which one a URL names. Jobs are plain functions of a connection."""

from collections.abc import AsyncIterator, Callable
from datetime import datetime
from pathlib import Path
from typing import Protocol, TypeVar

from sqlalchemy import Connection, exc, inspect, make_url, text
from sqlalchemy.exc import ArgumentError

from receiver.errors import StoreUnavailableError
from receiver.store.sqlite import SqliteDatabase

T = TypeVar("T")
Job = Callable[[Connection], T]

NO_PSYCOPG = "PostgreSQL needs psycopg: pip install 'flora-receiver[postgres]'"


class Database(Protocol):
    """A database that is open."""

    shared: bool
    """Whether other processes may work on it at the same time."""

    async def write(self, job: Job[T]) -> T:
        """Run `job` in a transaction; when this returns, what it wrote is durable. It may run more than once.

        Raises StoreUnavailableError when nothing is known to be committed for a reason that may pass; else what `job` raised.
        """
        ...

    async def read(self, job: Job[T]) -> T:
        """Run `job` on a connection that cannot write, in a snapshot of what is committed."""
        ...

    async def run(self, job: Job[T]) -> T:
        """Run `job` on a connection outside any transaction (migrations)."""
        ...

    def now(self, tx: Connection, default: datetime) -> datetime:
        """Return the time by which leases are judged: the database's where it is shared, else `default`."""
        ...

    async def notify(self, what: str) -> None:
        """Tell the other processes something; it may get lost."""
        ...

    def notices(self) -> AsyncIterator[str]:
        """Yield what other processes tell, until the connection is lost."""
        ...

    async def close(self) -> None:
        """Finish what is running and let go."""
        ...


def open_database(url: str, *, listen_url: str | None = None, pool_size: int = 8) -> Database:
    """Open the database that `[database] url` names. Blocking: call it before the loop starts, or from a thread."""
    try:
        parsed = make_url(url)
    except ArgumentError as error:
        raise StoreUnavailableError("[database] url is not a URL") from error
    if parsed.get_backend_name() == "postgresql":
        try:
            from receiver.store.postgres import PostgresDatabase  # noqa: PLC0415  # psycopg comes with an extra
        except ImportError as error:
            raise StoreUnavailableError(NO_PSYCOPG) from error
        return PostgresDatabase.open(url, listen_url=listen_url, connections=pool_size)
    if parsed.get_backend_name() != "sqlite" or not parsed.database:
        raise StoreUnavailableError("[database] url must be sqlite:///FILE or postgresql://…")
    path = Path(parsed.database)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StoreUnavailableError(f"cannot create {path.parent}: {error.strerror}") from error
    return SqliteDatabase(path)


def redact_url(url: str) -> str:
    """Return a URL as it may be logged: without user, password and options."""
    scheme, _, rest = url.partition("://")
    return f"{scheme}://{rest.partition('?')[0].rpartition('@')[2]}"


def probe_write(tx: Connection) -> None:
    """Write something without changing it, so that the commit has to reach the disk.

    An empty transaction proves nothing: SQLite begins one on a read-only file without an error. Raises
    StoreUnavailableError.
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
    """Check cheaply, as readiness does often, that the database takes writes. Raises StoreUnavailableError.

    On PostgreSQL every writing transaction checks that when it begins, so nothing is left to do.
    """
    if tx.dialect.name == "sqlite":
        probe_write(tx)
