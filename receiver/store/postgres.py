"""PostgreSQL: any number of processes share one ledger. Jobs and statements are those of SQLite.

It works through PgBouncer in transaction mode: no prepared statements, no session settings. LISTEN
needs a session of its own, so `listen_url` may bypass the pooler; without LISTEN, replicas find
each other's work by polling every second.
"""

import asyncio
import contextlib
import os
import random
import socket
import time
import weakref
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from typing import Any, TypeVar

import psycopg
from sqlalchemy import URL, Connection, Engine, create_engine, event, exc

from receiver.errors import StoreUnavailableError
from receiver.net.database_url import parse_database_url
from receiver.store.rows import from_ms

T = TypeVar("T")
Job = Callable[[Connection], T]

CHANNEL = "flora_receiver"
_TRIES = 3
_RETRYABLE = {"40001", "40P01"}
"""Serialization failure, deadlock: the same transaction may work now."""
_PAUSE_SECONDS = 0.1
"""The longest pause before a retry; random, so that two transactions do not collide again."""
_KEPT_FOR_WRITERS = 2
"""Connections that reads never take: a slow page of the operations API must not hold up
callbacks."""
_TROUBLE = (exc.OperationalError, exc.InterfaceError, exc.InternalError)
_CLOSE_SECONDS = 5.0
"""How long running jobs may take to end when the database is closed."""
_PREFACE = (
    "SELECT set_config('lock_timeout', '5s', true), set_config('idle_in_transaction_session_timeout', '10s', true), "
    "current_setting('transaction_read_only')"
)
"""Begins every writing transaction, and applies to it alone. A frozen replica must not keep its
locks, and waiting for a lock must end: callbacks commit one after the other. It also detects a
standby, and makes a job without statements reach the server at all (`/readyz`). """
_NOW = "SELECT (extract(epoch FROM clock_timestamp()) * 1000)::bigint"
_TIMEOUTS: dict[str, Any] = {
    # If the server vanishes, a callback must not wait for the minutes that TCP would.
    "connect_timeout": 5,
    "keepalives_idle": 5,
    "keepalives_interval": 2,
    "keepalives_count": 3,
    "tcp_user_timeout": 8000,
}


class PostgresDatabase:
    """A PostgreSQL database, shared with other processes."""

    shared = True

    def __init__(
        self, url: str, *, listen_url: str | None = None, connections: int = 8, database_clock: bool = True
    ) -> None:
        """Prepare the engine; connections are made when they are needed.

        With `database_clock` off, leases are judged by the caller's clock, as tests need it.
        """
        self._writing = _engine(url, connections)
        # A snapshot, as on SQLite; set by BEGIN, so that it applies behind a pooler too.
        self._reading = self._writing.execution_options(
            isolation_level="REPEATABLE READ", postgresql_readonly=True
        )
        self._sessions: weakref.WeakSet[psycopg.Connection[Any]] = weakref.WeakSet()
        event.listen(self._writing, "connect", lambda session, _: self._sessions.add(session))
        self._is_aborted = False
        self._listen_parameters = _to_parameters(self._writing, listen_url or url)
        self._database_clock = database_clock
        self._writers = ThreadPoolExecutor(connections, thread_name_prefix="ledger")
        self._readers = ThreadPoolExecutor(
            max(1, connections - _KEPT_FOR_WRITERS), thread_name_prefix="ledger-read"
        )

    @classmethod
    def open(cls, url: str, *, listen_url: str | None = None, connections: int = 8) -> "PostgresDatabase":
        """Connect once, so that a wrong URL fails now. Blocking. Raises StoreUnavailableError."""
        database = cls(url, listen_url=listen_url, connections=connections)
        try:
            database._run_bare(lambda _: None)
        except exc.DBAPIError as error:  # for example an option in the URL that libpq does not know
            database._release()
            raise _unavailable(error) from error
        except BaseException:
            database._release()
            raise
        return database

    async def write(self, job: Job[T]) -> T:
        """Run `job` in a transaction; its writes are durable on return.

        `job` may run more than once: after a deadlock, or on a new connection if the old one was
        lost before COMMIT.
        """
        # If the caller is cancelled, its job still runs to its end.
        return await asyncio.shield(_in_thread(self._writers, self._run_write, job))

    async def read(self, job: Job[T]) -> T:
        """Run `job` in a read-only transaction."""
        return await _in_thread(self._readers, self._run_read, job)

    async def run(self, job: Job[T]) -> T:
        """Run `job` on a connection outside any transaction (migrations)."""
        return await _in_thread(self._writers, self._run_bare, job)

    def now(self, tx: Connection, default: datetime) -> datetime:
        """Return the time of the database: the clocks of replicas may differ."""
        return from_ms(tx.exec_driver_sql(_NOW).scalar_one()) if self._database_clock else default

    async def notify(self, what: str) -> None:
        """Notify the other processes, in a transaction of its own. Never needed for correctness."""
        with contextlib.suppress(StoreUnavailableError):
            await self.write(
                lambda tx: tx.exec_driver_sql("SELECT pg_notify(%s, %s)", (CHANNEL, what)).close()
            )

    async def notices(self) -> AsyncIterator[str]:
        """Yield notifications of all processes until the connection is lost; "" once it listens."""
        try:
            connection = await psycopg.AsyncConnection.connect(autocommit=True, **self._listen_parameters)
            async with connection:
                await connection.execute(f"LISTEN {CHANNEL}".encode())
                yield ""
                async for notice in connection.notifies():
                    yield notice.payload
        except psycopg.OperationalError as error:
            raise StoreUnavailableError(f"cannot listen: {_first_line(error)}") from error

    async def close(self) -> None:
        """Finish running jobs and disconnect; a server that does not respond is not waited for."""
        releasing = asyncio.ensure_future(asyncio.to_thread(self._release))
        await asyncio.wait({releasing}, timeout=_CLOSE_SECONDS)
        if not releasing.done():
            self._abort()
        await releasing

    def _abort(self) -> None:
        """Shut down all connections: threads that wait for one keep the process alive."""
        self._is_aborted = True
        for threads in (self._writers, self._readers):
            threads.shutdown(wait=False, cancel_futures=True)
        for session in list(self._sessions):
            with (
                contextlib.suppress(OSError, psycopg.Error),
                socket.socket(fileno=os.dup(session.fileno())) as line,
            ):
                line.shutdown(socket.SHUT_RDWR)

    def _release(self) -> None:
        self._writers.shutdown()
        self._readers.shutdown()
        self._writing.dispose()

    def _run_write(self, job: Job[T]) -> T:
        for attempt in range(1, _TRIES + 1):
            committing = False
            if self._is_aborted:
                raise StoreUnavailableError("the database is being closed")
            try:
                with self._writing.connect() as connection, connection.begin() as transaction:
                    begin_writing(connection)
                    result = job(connection)
                    committing = True
                    transaction.commit()
                    return result
            except _TROUBLE as error:
                lost = error.connection_invalidated and not committing
                is_retryable = _state(error) in _RETRYABLE
                if attempt == _TRIES or not (lost or is_retryable):
                    raise _unavailable(error) from error
                if is_retryable:
                    time.sleep(_PAUSE_SECONDS * random.SystemRandom().uniform(0.2, 1))
        raise AssertionError("unreachable")

    def _run_read(self, job: Job[T]) -> T:
        for attempt in range(1, _TRIES + 1):
            try:
                with self._reading.connect() as connection, connection.begin():
                    return job(connection)
            except _TROUBLE as error:
                if attempt == _TRIES or self._is_aborted or not error.connection_invalidated:
                    raise _unavailable(error) from error
        raise AssertionError("unreachable")

    def _run_bare(self, job: Job[T]) -> T:
        try:
            with self._writing.connect() as connection:
                return job(connection)
        except _TROUBLE as error:
            raise _unavailable(error) from error


@contextlib.contextmanager
def connect(url: str) -> Iterator[Connection]:
    """Connect for a command that works in its own thread. Raises StoreUnavailableError."""
    engine = _engine(url, 1)
    try:
        with engine.connect() as connection:
            yield connection
    except exc.DBAPIError as error:
        raise _unavailable(error) from error
    finally:
        engine.dispose()


def begin_writing(connection: Connection) -> None:
    """Begin a writing transaction. Raises StoreUnavailableError if the server takes no writes."""
    if connection.exec_driver_sql(_PREFACE).one()[2] == "on":
        connection.invalidate()  # after a failover the next connection may reach another server
        raise StoreUnavailableError("the database takes no writes now: it is read-only or a standby")


def _in_thread(
    threads: ThreadPoolExecutor, call: Callable[[Job[T]], T], job: Job[T]
) -> "asyncio.Future[T]":
    try:
        return asyncio.get_running_loop().run_in_executor(threads, call, job)
    except RuntimeError as error:
        raise StoreUnavailableError("the database is being closed") from error


def _engine(url: str, connections: int) -> Engine:
    return create_engine(
        _to_sqlalchemy(url),
        pool_size=connections,
        max_overflow=0,
        pool_timeout=None,  # callers have time limits of their own
        # PgBouncer in transaction mode gives every transaction another session: nothing may be
        # prepared.
        connect_args={"prepare_threshold": None, **_TIMEOUTS},
    )


def _to_sqlalchemy(url: str) -> URL:
    parts = parse_database_url(url)
    return URL.create(
        "postgresql+psycopg",
        username=parts.username,
        password=parts.password,
        host=parts.host,
        port=parts.port,
        database=parts.name or None,
        query={name: values[0] if len(values) == 1 else values for name, values in parts.options.items()},
    )


def _to_parameters(engine: Engine, url: str) -> dict[str, Any]:
    """Return a URL as psycopg's parameters, as the engine would connect with it."""
    _, parameters = engine.dialect.create_connect_args(_to_sqlalchemy(url))
    return {**parameters, **_TIMEOUTS}


def _state(error: exc.DBAPIError) -> str | None:
    return getattr(error.orig, "sqlstate", None)


def _unavailable(error: exc.DBAPIError) -> StoreUnavailableError:
    return StoreUnavailableError(f"the database cannot be used now: {_first_line(error.orig)}")


def _first_line(error: object) -> str:
    # The lines after it have the values of the statement.
    return (str(error).splitlines() or [type(error).__name__])[0]
