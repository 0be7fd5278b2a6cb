"""Access to the user's database: one thread, at most one connection, one transaction for each job.

For the handler `database`. Cancelling a job shuts its connection down, since a frozen server would
otherwise block the thread for ever.
"""

import asyncio
import json
import os
import socket
import sqlite3
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib import import_module
from pathlib import Path
from threading import Event as Flag
from typing import Any, TypeVar
from urllib.parse import quote

from sqlalchemy import URL, Connection, Engine, NullPool, create_engine, event, exc, make_url

from handlers.database.errors import to_failure
from handlers.database.tables import DialectName
from receiver.handler import Secret, needs

T = TypeVar("T")

STATEMENT_SECONDS = 15
"""How long one statement may take, waiting for locks included."""
_POSTGRES_OPTIONS: Mapping[str, Any] = {
    "connect_timeout": 5,
    "keepalives_idle": 5,
    "keepalives_interval": 2,
    "keepalives_count": 3,
    "tcp_user_timeout": 8000,
    "prepare_threshold": None,  # behind PgBouncer, each transaction may run on another server
}
_to_json = partial(json.dumps, ensure_ascii=False)


class Connections:
    """Runs jobs on one database, one after another. Connects with the first."""

    def __init__(self, url: URL, *, create: bool) -> None:
        self._driver_connection: Any = None
        self._engine = (
            self._postgres(url) if dialect_of(url) == "postgresql" else _sqlite(url, create=create)
        )
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="handler-database")

    async def run(self, job: Callable[[Connection], T]) -> T:
        """Run `job` in a transaction and return its result. Raises DatabaseFailedError.

        Cancellation keeps a waiting job from starting, and disconnects a running one.
        """
        is_cancelled = Flag()
        future = self._thread.submit(self._transact, job, is_cancelled)
        try:
            return await asyncio.wrap_future(future)
        except asyncio.CancelledError:
            is_cancelled.set()
            if future.running():
                self._disconnect()
            raise

    async def close(self) -> None:
        last = self._thread.submit(self._engine.dispose)
        self._thread.shutdown(wait=False)
        await asyncio.wrap_future(last)

    def _transact(self, job: Callable[[Connection], T], is_cancelled: Flag) -> T:
        has_retried = False
        while True:
            try:
                with self._engine.connect() as connection:
                    result = job(connection)
                    connection.commit()
                    return result
            except exc.DBAPIError as error:
                # A dead pooled connection fails at its first use. Every job can be repeated.
                if error.connection_invalidated and not has_retried and not is_cancelled.is_set():
                    has_retried = True
                    continue
                raise to_failure(error) from error
            except (exc.SQLAlchemyError, sqlite3.Error, OverflowError) as error:
                raise to_failure(error) from error

    def _disconnect(self) -> None:
        """Shut the connection's socket down, so that the thread stops waiting for the server."""
        connection = self._driver_connection
        if connection is None or connection.closed:
            return
        with socket.socket(fileno=os.dup(connection.fileno())) as duplicate:
            duplicate.shutdown(socket.SHUT_RDWR)

    def _postgres(self, url: URL) -> Engine:
        with needs("flora-receiver[postgres]"):
            import_module("psycopg")
        engine = create_engine(
            url.set(drivername="postgresql+psycopg"),
            pool_size=1,
            max_overflow=0,
            connect_args={
                name: value for name, value in _POSTGRES_OPTIONS.items() if name not in url.query
            },
            json_serializer=_to_json,
            hide_parameters=True,
        )

        @event.listens_for(engine, "connect", insert=True)
        def keep_connection(connection: Any, _record: Any) -> None:
            self._driver_connection = connection

        @event.listens_for(engine, "begin")
        def limit_statements(connection: Connection) -> None:
            connection.exec_driver_sql(f"SET LOCAL statement_timeout = '{STATEMENT_SECONDS}s'")

        return engine


def _sqlite(url: URL, *, create: bool) -> Engine:
    path = Path(url.database or "").absolute()
    if path.with_name(f"{path.name}.lock").exists():
        raise ValueError(f"{path.name} is a ledger of flora-receiver itself: name a database of your own")
    address = f"file:{quote(str(path))}?mode={'rwc' if create else 'rw'}"

    def connect() -> sqlite3.Connection:
        connection = sqlite3.connect(address, uri=True, timeout=STATEMENT_SECONDS, check_same_thread=False)
        connection.isolation_level = None  # `begin` below says BEGIN
        connection.execute("PRAGMA foreign_keys = ON")
        return connection

    engine = create_engine(
        "sqlite://", creator=connect, poolclass=NullPool, json_serializer=_to_json, hide_parameters=True
    )

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE")

    return engine


def to_url(secret: Secret) -> URL:
    """Parse a database's URL. ValueError, without the URL in it, if it cannot be used."""
    try:
        url = make_url(secret.get_secret_value())
    except (exc.ArgumentError, ValueError):
        raise ValueError("cannot be read: write @, / and : in a password as %40, %2F and %3A") from None
    if url.drivername not in {"postgresql", "sqlite"}:
        raise ValueError("must be postgresql://… or sqlite:///path/to/file.db")
    if url.drivername == "sqlite" and (url.host or url.query or (url.database or ":memory:") == ":memory:"):
        raise ValueError("must name a file and no more, as in sqlite:///runs.db (absolute: four slashes)")
    return url


def dialect_of(url: URL) -> DialectName:
    return "sqlite" if url.drivername == "sqlite" else "postgresql"
