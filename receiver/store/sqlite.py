"""SQLite: one file, used by one process.

There is one writer connection, on one thread: two connections that write or checkpoint at once can
corrupt a WAL file before SQLite 3.51.3. Jobs that queue up during a commit share the next one.
Readers are `query_only`.
"""

import asyncio
import contextlib
import errno
import fcntl
import os
import queue
import sqlite3
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, Generic, TypeVar

from sqlalchemy import URL, Connection, Engine, NullPool, create_engine, event, exc

from receiver.errors import StoreInUseError, StoreUnavailableError
from receiver.ownership import match_owner

T = TypeVar("T")
Job = Callable[[Connection], T]

_MAX_BATCH = 64
"""Jobs of one commit: limits how long the first of them waits for the last."""
_READERS = 4


_IS_HELD = frozenset({errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES})
_GIVES_NO_LOCKS = frozenset({errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL})
"""What `flock` answers on NFS without a lock daemon, and on some FUSE file systems."""


class SqliteDatabase:
    """A SQLite file, owned by this process."""

    shared = False

    def __init__(self, path: Path, *, busy_timeout_ms: int = 2_000, readers: int = _READERS) -> None:
        """Lock and open the file. Raises StoreInUseError, StoreUnavailableError."""
        self._path = path
        self._lock = _lock_file(path)
        _make_file(path)
        self._closing = False
        self._jobs: queue.SimpleQueue[tuple[Job[Any], Future[Any]] | None] = queue.SimpleQueue()
        self._writing = _sqlite_engine(path, busy_timeout_ms, read_only=False)
        self._reading = _sqlite_engine(path, busy_timeout_ms, read_only=True)
        self._readers = ThreadPoolExecutor(readers, thread_name_prefix="ledger-read")
        try:
            self._connection = self._writing.connect()
        except exc.DBAPIError as error:
            self._release()
            raise _unavailable(error) from error
        self._writer = threading.Thread(target=self._write_forever, name="ledger-write", daemon=True)
        self._writer.start()

    @staticmethod
    def hold(path: Path) -> int:
        """Lock a file without opening it; closing the handle unlocks it. Raises StoreInUseError."""
        return _lock_file(path)

    async def write(self, job: Job[T]) -> T:
        """Run `job` in a transaction; its writes are durable on return.

        Raises StoreUnavailableError if nothing was committed for a temporary reason, else what
        `job` raised.
        """
        return await self._queue(job)

    async def read(self, job: Job[T]) -> T:
        """Run `job` in a read-only snapshot of what is committed."""
        return await asyncio.get_running_loop().run_in_executor(self._readers, self._read, job)

    async def run(self, job: Callable[[Connection], T]) -> T:
        """Run `job` on the writer's connection, outside any transaction (migrations)."""
        return await self._queue(_Bare(job))

    async def _queue(self, job: Job[T]) -> T:
        if self._closing:
            raise StoreUnavailableError("the database is being closed")  # the writer would not run it
        future: Future[T] = Future()
        self._jobs.put((job, future))
        # If the caller is cancelled, its job still runs to its end.
        return await asyncio.shield(asyncio.wrap_future(future))

    def now(self, _tx: Connection, default: datetime) -> datetime:
        """Return the time by which leases expire: that of this process, the only one."""
        return default

    async def notify(self, what: str) -> None:
        """Do nothing: there is no other process."""

    async def notices(self) -> AsyncIterator[str]:
        """Yield nothing: there is no other process."""
        return
        yield

    async def close(self) -> None:
        """Finish queued jobs, checkpoint, and unlock the file."""
        self._closing = True
        self._jobs.put(None)
        await asyncio.to_thread(self._writer.join)
        await asyncio.to_thread(self._readers.shutdown)
        self._reading.dispose()
        self._connection.close()
        self._release()

    def _release(self) -> None:
        self._writing.dispose()
        os.close(self._lock)

    def _read(self, job: Job[T]) -> T:
        try:
            with self._reading.connect() as connection, connection.begin():
                return job(connection)
        except exc.OperationalError as error:
            raise _unavailable(error) from error

    def _write_forever(self) -> None:
        while (first := self._jobs.get()) is not None:
            batch = [first]
            stop = False
            while len(batch) < _MAX_BATCH:
                try:
                    item = self._jobs.get_nowait()
                except queue.Empty:
                    break
                if item is None:
                    stop = True
                    break
                batch.append(item)
            self._write(batch)
            if stop:
                break
        self._checkpoint()

    def _write(self, batch: list[tuple[Job[Any], Future[Any]]]) -> None:
        """Run a batch in order; adjacent jobs share one commit, each in its own savepoint."""
        together: list[tuple[Job[Any], Future[Any]]] = []
        for job, future in batch:
            if isinstance(job, _Bare):
                self._commit(together)
                together = []
                _run_into(future, partial(job, self._connection))
                self._end_transaction()
            else:
                together.append((job, future))
        self._commit(together)

    def _commit(self, batch: list[tuple[Job[Any], Future[Any]]]) -> None:
        if not batch:
            return
        answers: list[tuple[Future[Any], Any, Exception | None]] = []
        try:
            with self._connection.begin() as whole:
                for job, future in batch:
                    try:
                        with (
                            self._connection.begin_nested() if len(batch) > 1 else contextlib.nullcontext()
                        ):
                            answers.append((future, job(self._connection), None))
                    except exc.OperationalError:
                        raise  # full, locked, read-only: SQLite may have ended the whole transaction
                    except Exception as error:
                        answers.append((future, None, error))
                        if len(batch) == 1:
                            whole.rollback()
        except exc.DBAPIError as error:
            self._end_transaction()
            for _, future in batch:
                future.set_exception(_unavailable(error))
            return
        except BaseException as error:
            self._end_transaction()
            for _, future in batch:
                future.set_exception(error)
            return
        for future, result, failure in answers:
            if failure is None:
                future.set_result(result)
            else:
                future.set_exception(failure)

    def _end_transaction(self) -> None:
        """End an open transaction: after a failed COMMIT SQLAlchemy forgets it, SQLite does not."""
        try:
            self._connection.rollback()
            self._connection.connection.rollback()
        except (exc.DBAPIError, sqlite3.Error):
            self._connection.invalidate()  # closes it; the next BEGIN opens another

    def _checkpoint(self) -> None:
        """Move the WAL into the file, so that the next start has nothing to recover. Optional."""
        try:
            self._connection.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)")
            self._connection.rollback()
        except exc.DBAPIError:
            pass


class _Bare(Generic[T]):
    """A job that runs outside a transaction."""

    def __init__(self, job: Job[T]) -> None:
        self._job = job

    def __call__(self, connection: Connection) -> T:
        return self._job(connection)


@contextlib.contextmanager
def open_read_only(path: Path) -> Iterator[Connection]:
    """Lock an existing file and open it read-only, for use in the caller's thread.

    Raises StoreInUseError, StoreUnavailableError.
    """
    if not path.exists():
        raise StoreUnavailableError(f"{path} does not exist")
    lock = _lock_file(path)
    engine = _sqlite_engine(path, 2_000, read_only=True)
    try:
        with engine.connect() as connection:
            yield connection
    except exc.DBAPIError as error:
        raise _unavailable(error) from error
    finally:
        engine.dispose()
        os.close(lock)


def _lock_file(path: Path) -> int:
    try:
        handle = os.open(path.with_name(path.name + ".lock"), os.O_CREAT | os.O_RDWR, 0o600)
        match_owner(handle, path.parent)
    except OSError as error:
        raise StoreUnavailableError(f"cannot write beside {path}: {error.strerror}") from error
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(handle)
        if error.errno not in _IS_HELD:
            raise StoreUnavailableError(_describe_lock_error(path, error)) from error
        raise StoreInUseError(
            f"{path} belongs to another running flora-receiver: stop it, or give this one its own [database] url"
        ) from error
    return handle


def _make_file(path: Path) -> None:
    """Make the file, if it is missing, before SQLite does: its log and index get the file's owner."""
    with contextlib.suppress(OSError):  # SQLite says what is wrong
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        match_owner(handle, path.parent)
        os.close(handle)


def _describe_lock_error(path: Path, error: OSError) -> str:
    if error.errno in _GIVES_NO_LOCKS:
        return (
            f"the file system of {path.absolute().parent} gives no locks ({error.strerror}), and without one two "
            "processes could write the ledger at once: put it on a local disk"
        )
    return f"cannot lock {path}.lock: {error.strerror}"


def _sqlite_engine(path: Path, busy_timeout_ms: int, *, read_only: bool) -> Engine:
    # Not from a text: a file's name may hold what is special in a URL.
    engine = create_engine(
        URL.create("sqlite", database=str(path)),
        connect_args={"check_same_thread": False},
        **_pool(read_only),
    )

    @event.listens_for(engine, "connect")
    def prepare(connection: sqlite3.Connection, _record: Any) -> None:
        connection.isolation_level = None  # BEGIN is explicit: the driver would begin before writes only
        for pragma in (
            f"busy_timeout = {busy_timeout_ms}",
            "journal_mode = WAL",
            "synchronous = FULL",  # a commit syncs: 2xx means durable
            "foreign_keys = ON",
            # An insert of many rows keeps a copy of each page that it changes: in a file, it costs
            # twice as much.
            "query_only = ON" if read_only else "temp_store = MEMORY",
        ):
            connection.execute(f"PRAGMA {pragma}")

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        connection.exec_driver_sql("BEGIN" if read_only else "BEGIN IMMEDIATE")

    return engine


def _pool(read_only: bool) -> dict[str, Any]:
    return {"pool_size": _READERS, "max_overflow": 0} if read_only else {"poolclass": NullPool}


def _run_into(future: Future[Any], call: Callable[[], Any]) -> None:
    try:
        future.set_result(call())
    except BaseException as error:
        future.set_exception(error)


def _unavailable(error: exc.DBAPIError) -> StoreUnavailableError:
    return StoreUnavailableError(f"the database cannot be used now: {error.orig}")
