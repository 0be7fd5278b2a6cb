"""The way to one database of the user's: a thread, at most one connection, a transaction for each job.

For `handlers.database`. An attempt that is cancelled hangs up under the feet of whoever waits on the connection, since
a frozen server would keep the thread for ever.
"""

import asyncio
import json
import os
import socket
import sqlite3
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from threading import Event as Flag
from typing import Any, TypeVar
from urllib.parse import quote

from sqlalchemy import URL, Connection, Engine, NullPool, create_engine, event, exc, make_url

from handlers.database.errors import explained
from handlers.database.tables import DialectName
from receiver.handler import Secret, needs

T = TypeVar("T")

SECONDS = 15
"""How long a statement of ours may take, and how long it may wait for somebody else's lock."""
_POSTGRES: Mapping[str, Any] = {
    "connect_timeout": 5,
    "keepalives_idle": 5,
    "keepalives_interval": 2,
    "keepalives_count": 3,
    "tcp_user_timeout": 8000,
    "prepare_threshold": None,  # behind PgBouncer every transaction may meet another server
}


_json = partial(json.dumps, ensure_ascii=False)


class Connections:
    """The way to one database: a thread, at most one connection, and a transaction for each job."""

    def __init__(self, url: URL, *, create: bool) -> None:
        self._wire: Any = None
        self._engine = self._postgres(url) if dialect_of(url) == "postgresql" else _sqlite(url, create=create)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="handler-database")

    async def run(self, job: Callable[[Connection], T]) -> T:
        """Run `job` in a transaction, or raise Refusal. Cancelled, it does not start, or loses its connection."""
        unwanted = Flag()
        future = self._thread.submit(self._transact, job, unwanted)
        try:
            return await asyncio.wrap_future(future)
        except asyncio.CancelledError:
            unwanted.set()
            if future.running():
                self._hang_up()
            raise

    async def close(self) -> None:
        last = self._thread.submit(self._engine.dispose)
        self._thread.shutdown(wait=False)
        await asyncio.wrap_future(last)

    def _transact(self, job: Callable[[Connection], T], unwanted: Flag) -> T:
        while True:
            try:
                with self._engine.connect() as connection:
                    result = job(connection)
                    connection.commit()
                    return result
            except exc.DBAPIError as error:
                # A pooled connection that had died meanwhile says so at its first use. All we do may be repeated.
                if error.connection_invalidated and not unwanted.is_set():
                    unwanted.set()
                    continue
                raise explained(error) from error
            except (exc.SQLAlchemyError, sqlite3.Error, OverflowError) as error:
                raise explained(error) from error

    def _hang_up(self) -> None:
        """End the connection under the feet of whoever waits on it: a frozen server must not keep the thread."""
        wire = self._wire
        if wire is None or wire.closed:
            return
        with socket.socket(fileno=os.dup(wire.fileno())) as line:
            line.shutdown(socket.SHUT_RDWR)

    def _postgres(self, url: URL) -> Engine:
        with needs("flora-receiver[postgres]"):
            import psycopg  # noqa: F401, PLC0415 - only who has PostgreSQL needs it
        engine = create_engine(
            url.set(drivername="postgresql+psycopg"),
            pool_size=1,
            max_overflow=0,
            connect_args={name: value for name, value in _POSTGRES.items() if name not in url.query},
            json_serializer=_json,
            hide_parameters=True,
        )

        @event.listens_for(engine, "connect", insert=True)
        def remember(wire: Any, _record: Any) -> None:
            self._wire = wire

        @event.listens_for(engine, "begin")
        def limit(connection: Connection) -> None:
            connection.exec_driver_sql(f"SET LOCAL statement_timeout = '{SECONDS}s'")

        return engine


def _sqlite(url: URL, *, create: bool) -> Engine:
    path = Path(url.database or "").absolute()
    if path.with_name(f"{path.name}.lock").exists():
        raise ValueError(f"{path.name} is a ledger of flora-receiver itself: name a database of your own")
    place = f"file:{quote(str(path))}?mode={'rwc' if create else 'rw'}"

    def connect() -> sqlite3.Connection:
        wire = sqlite3.connect(place, uri=True, timeout=SECONDS, check_same_thread=False)
        wire.isolation_level = None  # we say BEGIN ourselves
        wire.execute("PRAGMA foreign_keys = ON")
        return wire

    engine = create_engine(
        "sqlite://", creator=connect, poolclass=NullPool, json_serializer=_json, hide_parameters=True
    )

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE")

    return engine


def address_of(secret: Secret) -> URL:
    """Read a database's URL; ValueError, without the URL in it, where that cannot be."""
    try:
        url = make_url(secret.get_secret_value())
    except (exc.ArgumentError, ValueError):
        raise ValueError("cannot be read: write @, / and : in a password as %40, %2F and %3A") from None
    if url.drivername not in {"postgresql", "sqlite"}:
        raise ValueError("must be postgresql://… or sqlite:///path/to/file.db")
    if url.drivername == "sqlite" and (url.host or url.query or (url.database or ":memory:") == ":memory:"):
        raise ValueError("must name a file, as in sqlite:///runs.db, and nothing else (four slashes: an absolute path)")
    return url


def dialect_of(url: URL) -> DialectName:
    return "sqlite" if url.drivername == "sqlite" else "postgresql"
