"""The interface of the ledger's database, and opening one. Jobs are functions of a connection."""

import contextlib
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from datetime import datetime
from typing import Protocol, TypeVar
from urllib.parse import quote

from sqlalchemy import Connection, exc, inspect, text

from receiver.errors import StoreUnavailableError
from receiver.net.database_url import parse_database_url
from receiver.net.ownership import find_existing, make_directory
from receiver.store.sqlite import SqliteDatabase

T = TypeVar("T")
Job = Callable[[Connection], T]

NO_PSYCOPG = "PostgreSQL needs psycopg: pip install 'flora-receiver[postgres]'"


class Database(Protocol):
    """An open database."""

    shared: bool
    """Whether other processes may work on it at the same time."""

    async def write(self, job: Job[T]) -> T:
        """Run `job` in a transaction; its writes are durable on return. It may run more than once.

        Raises StoreUnavailableError if a commit is not confirmed for a temporary reason, else what
        `job` raised.
        """
        ...

    async def read(self, job: Job[T]) -> T:
        """Run `job` in a read-only snapshot of what is committed."""
        ...

    async def run(self, job: Job[T]) -> T:
        """Run `job` on a connection outside any transaction (migrations)."""
        ...

    def now(self, tx: Connection, default: datetime) -> datetime:
        """Return the time by which leases expire: the database's if shared, else `default`."""
        ...

    async def notify(self, what: str) -> None:
        """Notify the other processes; a notification may get lost."""
        ...

    def notices(self) -> AsyncIterator[str]:
        """Yield the notifications of other processes until the connection is lost."""
        ...

    async def close(self) -> None:
        """Finish running jobs and disconnect."""
        ...


def open_database(url: str, *, listen_url: str | None = None, pool_size: int = 8) -> Database:
    """Open the database of `[database] url`. Blocking: not for the event loop's thread."""
    try:
        location = parse_database_url(url)
    except ValueError as error:
        raise StoreUnavailableError(f"[database] url {error}") from error
    if location.path is None:
        try:
            from receiver.store.postgres import PostgresDatabase  # noqa: PLC0415  # psycopg comes with an extra
        except ImportError as error:
            raise StoreUnavailableError(NO_PSYCOPG) from error
        return PostgresDatabase.open(url, listen_url=listen_url, connections=pool_size)
    path = location.path
    try:
        make_directory(path.parent)
    except OSError as error:
        raise StoreUnavailableError(f"cannot create {path.parent}: {error.strerror}") from error
    return SqliteDatabase(path)


@contextlib.contextmanager
def find_probe_url(url: str) -> Iterator[str]:
    """Yield the URL at which to try what a database can do, without leaving anything behind.

    For a SQLite file that does not exist yet, it is a temporary one in the directory where the
    first start would make it. Raises StoreUnavailableError.
    """
    path = parse_database_url(url).path
    if path is None or path.exists():
        yield url
        return
    directory = find_existing(path.parent)
    try:
        scratch = tempfile.TemporaryDirectory(prefix="flora-receiver-check-", dir=directory)
    except OSError as error:
        raise StoreUnavailableError(f"cannot create {path.parent}: {error.strerror}") from error
    with scratch as name:
        yield f"sqlite:///{quote(name)}/receiver.db"


def probe_write(tx: Connection) -> None:
    """Write something without changing it, so that the commit has to reach the disk.

    An empty transaction proves nothing: SQLite begins one on a read-only file without an error.
    Raises StoreUnavailableError.
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
    """Check cheaply that the database takes writes. Raises StoreUnavailableError.

    On PostgreSQL every writing transaction checks that when it begins, so nothing is left to do.
    """
    if tx.dialect.name == "sqlite":
        probe_write(tx)
