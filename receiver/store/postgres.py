"""PostgreSQL: any number of processes share one ledger. Same jobs, same statements as on SQLite; only the engine differs.

It works through PgBouncer in transaction mode: no prepared statements, nothing set for a session. LISTEN needs a session
of its own, so `listen_url` may lead past the pooler; without any, replicas find each other's work by looking every second.
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
from sqlalchemy import Connection, Engine, create_engine, event, exc, make_url

from receiver.errors import StoreUnavailableError
from receiver.store.rows import from_ms

T = TypeVar("T")
Job = Callable[[Connection], T]

CHANNEL = "flora_receiver"
_TRIES = 3
_AGAIN = {"40001", "40P01"}
"""Serialization failure, deadlock: PostgreSQL's own word that the same transaction may work now."""
_PAUSE_SECONDS = 0.1
"""Before that, at most: whoever won needs its turn first, and two that lost must not meet again."""
_KEPT_FOR_WRITERS = 2
"""Connections that reads never take: a slow page of the operations API must not hold up callbacks."""
_TROUBLE = (exc.OperationalError, exc.InterfaceError, exc.InternalError)
_CLOSE_SECONDS = 5.0
"""What is running when we close has that long to be over."""
_PREFACE = (
    "SELECT set_config('lock_timeout', '5s', true), set_config('idle_in_transaction_session_timeout', '10s', true), "
    "current_setting('transaction_read_only')"
)
"""Opens every transaction that writes, and holds for it alone. A replica that is frozen in one must not keep its locks,
and whoever wants one of them must not wait for ever: callbacks come through one after the other. It also tells a standby
from a server that takes writes, and makes a job without a statement of its own ask the server at all (`/readyz`).
"""
_NOW = "SELECT (extract(epoch FROM clock_timestamp()) * 1000)::bigint"
_TIMEOUTS: dict[str, Any] = {
    # A server that is gone without a word must not hold a callback for the minutes that TCP would wait.
    "connect_timeout": 5,
    "keepalives_idle": 5,
    "keepalives_interval": 2,
    "keepalives_count": 3,
    "tcp_user_timeout": 8000,
}


class PostgresDatabase:
    """A PostgreSQL database that other processes use too."""

    shared = True

    def __init__(
        self, url: str, *, listen_url: str | None = None, connections: int = 8, database_clock: bool = True
    ) -> None:
        """Connect lazily: a database that is away now may be back when it is needed.

        Tests that turn the clock by hand switch `database_clock` off.
        """
        self._writing = _engine(url, connections)
        # A snapshot, as readers have on SQLite; said with BEGIN, so that it holds behind a pooler too.
        self._reading = self._writing.execution_options(isolation_level="REPEATABLE READ", postgresql_readonly=True)
        self._sessions: weakref.WeakSet[psycopg.Connection[Any]] = weakref.WeakSet()
        event.listen(self._writing, "connect", lambda session, _: self._sessions.add(session))
        self._hung_up = False
        self._listen_url = _plain(listen_url or url)
        self._database_clock = database_clock
        self._writers = ThreadPoolExecutor(connections, thread_name_prefix="ledger")
        self._readers = ThreadPoolExecutor(max(1, connections - _KEPT_FOR_WRITERS), thread_name_prefix="ledger-read")

    @classmethod
    def open(cls, url: str, *, listen_url: str | None = None, connections: int = 8) -> "PostgresDatabase":
        """Connect once, so that a wrong URL is told at start. Blocking. Raises StoreUnavailableError."""
        database = cls(url, listen_url=listen_url, connections=connections)
        try:
            database._bare(lambda _: None)
        except BaseException:
            database._let_go()
            raise
        return database

    async def write(self, job: Job[T]) -> T:
        """Run `job` in a transaction; when this returns, what it wrote is durable.

        `job` may run more than once: after a deadlock, or on a new connection if the old one was lost before COMMIT.
        """
        # A caller that is cancelled leaves; its job still runs, whole.
        return await asyncio.shield(_in_thread(self._writers, self._transact, job))

    async def read(self, job: Job[T]) -> T:
        """Run `job` in a transaction that cannot write."""
        return await _in_thread(self._readers, self._look, job)

    async def run(self, job: Job[T]) -> T:
        """Run `job` on a connection outside any transaction (migrations)."""
        return await _in_thread(self._writers, self._bare, job)

    def now(self, tx: Connection, default: datetime) -> datetime:
        """Return the database's time: leases must not depend on how well the clocks of replicas agree."""
        return from_ms(tx.exec_driver_sql(_NOW).scalar_one()) if self._database_clock else default

    async def notify(self, what: str) -> None:
        """Wake the other processes; outside any transaction of consequence, and never needed for correctness."""
        with contextlib.suppress(StoreUnavailableError):
            await self.write(lambda tx: tx.exec_driver_sql("SELECT pg_notify(%s, %s)", (CHANNEL, what)).close())

    async def notices(self) -> AsyncIterator[str]:
        """Yield what any process notifies, until the connection is lost; "" first, once it listens."""
        try:
            connection = await psycopg.AsyncConnection.connect(self._listen_url, autocommit=True, **_TIMEOUTS)
            async with connection:
                await connection.execute(f"LISTEN {CHANNEL}".encode())
                yield ""
                async for notice in connection.notifies():
                    yield notice.payload
        except psycopg.OperationalError as error:
            raise StoreUnavailableError(f"cannot listen: {_first_line(error)}") from error

    async def close(self) -> None:
        """Finish what is running and disconnect; a server that does not answer any more is not waited for."""
        letting_go = asyncio.ensure_future(asyncio.to_thread(self._let_go))
        await asyncio.wait({letting_go}, timeout=_CLOSE_SECONDS)
        if not letting_go.done():
            self._hang_up()
        await letting_go

    def _hang_up(self) -> None:
        """End what waits for an answer: a thread that does would keep the whole process from ending."""
        self._hung_up = True
        for threads in (self._writers, self._readers):
            threads.shutdown(wait=False, cancel_futures=True)
        for session in list(self._sessions):
            with contextlib.suppress(OSError, psycopg.Error), socket.socket(fileno=os.dup(session.fileno())) as line:
                line.shutdown(socket.SHUT_RDWR)

    def _let_go(self) -> None:
        self._writers.shutdown()
        self._readers.shutdown()
        self._writing.dispose()

    def _transact(self, job: Job[T]) -> T:
        for attempt in range(1, _TRIES + 1):
            committing = False
            if self._hung_up:
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
                again = _state(error) in _AGAIN
                if attempt == _TRIES or not (lost or again):
                    raise _unavailable(error) from error
                if again:
                    time.sleep(_PAUSE_SECONDS * random.SystemRandom().uniform(0.2, 1))
        raise AssertionError("unreachable")

    def _look(self, job: Job[T]) -> T:
        for attempt in range(1, _TRIES + 1):
            try:
                with self._reading.connect() as connection, connection.begin():
                    return job(connection)
            except _TROUBLE as error:
                if attempt == _TRIES or self._hung_up or not error.connection_invalidated:
                    raise _unavailable(error) from error
        raise AssertionError("unreachable")

    def _bare(self, job: Job[T]) -> T:
        try:
            with self._writing.connect() as connection:
                return job(connection)
        except _TROUBLE as error:
            raise _unavailable(error) from error


@contextlib.contextmanager
def connect(url: str) -> Iterator[Connection]:
    """Connect for a command that works alone, in its own thread. Raises StoreUnavailableError."""
    engine = _engine(url, 1)
    try:
        with engine.connect() as connection:
            yield connection
    except exc.DBAPIError as error:
        raise _unavailable(error) from error
    finally:
        engine.dispose()


def begin_writing(connection: Connection) -> None:
    """Open a transaction that writes. Raises StoreUnavailableError where none can."""
    if connection.exec_driver_sql(_PREFACE).one()[2] == "on":
        connection.invalidate()  # after a failover the name leads elsewhere: the next one is made anew
        raise StoreUnavailableError("the database takes no writes now: it is read-only, or a standby")


def _in_thread(threads: ThreadPoolExecutor, call: Callable[[Job[T]], T], job: Job[T]) -> "asyncio.Future[T]":
    try:
        return asyncio.get_running_loop().run_in_executor(threads, call, job)
    except RuntimeError as error:
        raise StoreUnavailableError("the database is being closed") from error


def _engine(url: str, connections: int) -> Engine:
    return create_engine(
        make_url(url).set(drivername="postgresql+psycopg"),
        pool_size=connections,
        max_overflow=0,
        pool_timeout=None,  # whoever waits for a connection has its own patience
        # PgBouncer in transaction mode gives every transaction another server: nothing may be prepared on one.
        connect_args={"prepare_threshold": None, **_TIMEOUTS},
    )


def _plain(url: str) -> str:
    return make_url(url).set(drivername="postgresql").render_as_string(hide_password=False)


def _state(error: exc.DBAPIError) -> str | None:
    return getattr(error.orig, "sqlstate", None)


def _unavailable(error: exc.DBAPIError) -> StoreUnavailableError:
    return StoreUnavailableError(f"the database cannot be used now: {_first_line(error.orig)}")


def _first_line(error: object) -> str:
    # PostgreSQL adds the statement's values further down.
    return (str(error).splitlines() or [type(error).__name__])[0]
