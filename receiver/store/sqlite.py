"""SQLite: one file, used by one process.

There is one writer connection, on one thread: two connections that write or checkpoint at once can
corrupt a WAL file before SQLite 3.51.3. Jobs that queue up during a commit share the next one.
Readers are `query_only`.

After each commit, and before its callers hear of it, the path must still lead to the files that are
open (`ledger_files`). Otherwise nothing is written any more, and only a restart helps. What this
process still has open is copied to a new file, for it would be gone after that restart.
"""

import asyncio
import contextlib
import queue
import sqlite3
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, Generic, TypeVar

import structlog
from sqlalchemy import URL, Connection, Engine, NullPool, create_engine, event, exc

from receiver.errors import StoreUnavailableError
from receiver.net.ownership import make_directory
from receiver.store import backup
from receiver.store.ledger_files import LedgerFiles

log = structlog.get_logger("receiver.store")

T = TypeVar("T")
Job = Callable[[Connection], T]

_MAX_BATCH = 64
"""Jobs of one commit: limits how long the first of them waits for the last."""
_READERS = 4


class SqliteDatabase:
    """A SQLite file, owned by this process."""

    shared = False

    def __init__(self, path: Path, *, busy_timeout_ms: int = 2_000, readers: int = _READERS) -> None:
        """Lock and open the file. Raises StoreInUseError, StoreUnavailableError."""
        self._path = path
        self._files = LedgerFiles(path)
        self._loss: str | None = None
        """What happened to the files, once it has; it stays."""
        self._must_rescue = False
        self._closing = False
        self._jobs: queue.SimpleQueue[tuple[Job[Any], Future[Any]] | None] = queue.SimpleQueue()
        self._writing = _sqlite_engine(path, busy_timeout_ms, self._files, read_only=False)
        self._reading = _sqlite_engine(path, busy_timeout_ms, self._files, read_only=True)
        self._readers = ThreadPoolExecutor(readers, thread_name_prefix="ledger-read")
        try:
            self._connection = self._writing.connect()
        except exc.DBAPIError as error:
            self._release()
            raise _unavailable(error) from error
        self._writer = threading.Thread(target=self._write_forever, name="ledger-write", daemon=True)
        self._writer.start()

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
        if self._loss is not None:
            raise StoreUnavailableError(self._loss)
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
        self._files.close()

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
            if self._must_rescue:
                self._must_rescue = False
                self._rescue()
            if stop:
                break
        self._checkpoint()

    def _write(self, batch: list[tuple[Job[Any], Future[Any]]]) -> None:
        """Run a batch in order; adjacent jobs share one commit, each in its own savepoint."""
        if self._loss is not None:
            for _, future in batch:
                future.set_exception(StoreUnavailableError(self._loss))
            return
        together: list[tuple[Job[Any], Future[Any]]] = []
        for job, future in batch:
            if isinstance(job, _Bare):
                self._commit(together)
                together = []
                _run_into(future, partial(self._run_bare, job))
                self._end_transaction()
            else:
                together.append((job, future))
        self._commit(together)

    def _run_bare(self, job: "_Bare[T]") -> T:
        result = job(self._connection)
        self._check_files()
        return result

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
            self._check_files()
        except exc.DBAPIError as error:
            failed = self._find_loss() or _unavailable(error)
            self._end_transaction()
            for _, future in batch:
                future.set_exception(failed)
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

    def _check_files(self) -> None:
        """Raise StoreUnavailableError if the path does not lead to the open files any more.

        Called after a commit, before its callers hear of it: what they hear of was then in the file
        that the path names.
        """
        if (loss := self._find_loss()) is not None:
            raise loss

    def _find_loss(self) -> StoreUnavailableError | None:
        if self._loss is None:
            if (change := self._files.find_change()) is None:
                return None
            self._must_rescue = not change.lock_only
            self._loss = f"{change.reason} while the service ran: it accepts nothing until it is restarted"
            log.critical("ledger.lost", path=str(self._path), reason=self._loss)
        return StoreUnavailableError(self._loss)

    def _rescue(self) -> None:
        """Copy the files that are open, but have no name any more, to a new file."""
        target = self._path.with_name(f"{self._path.name}.rescued-{datetime.now(UTC):%Y%m%dT%H%M%SZ}")
        try:
            make_directory(target.parent)
            backup.copy(self._connection, target)
        except (StoreUnavailableError, OSError, exc.DBAPIError) as error:
            fix = "stop the service, restore the latest backup, start the service"
            log.critical("ledger.not_rescued", reason=str(error), fix=fix)
            return
        fix = f"stop the service, run `flora-receiver restore {target}`, start the service"
        log.critical(
            "ledger.rescued", copy=str(target), fix=f"it has all that was received; to go on from it: {fix}"
        )

    def _end_transaction(self) -> None:
        """End an open transaction: after a failed COMMIT SQLAlchemy forgets it, SQLite does not."""
        try:
            self._connection.rollback()
            self._connection.connection.rollback()
        except (exc.DBAPIError, sqlite3.Error):
            self._connection.invalidate()  # closes it; the next BEGIN opens another

    def _checkpoint(self) -> None:
        """Move the WAL into the file, so that the next start has nothing to recover. Optional."""
        with contextlib.suppress(exc.DBAPIError, sqlite3.Error):
            # By the driver: SQLAlchemy would begin a transaction, in which there is no checkpoint.
            self._connection.connection.cursor().execute("PRAGMA wal_checkpoint(TRUNCATE)")


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
    files = LedgerFiles(path, create=False)
    engine = _sqlite_engine(path, 2_000, files, read_only=True)
    try:
        with engine.connect() as connection:
            yield connection
    except exc.DBAPIError as error:
        raise _unavailable(error) from error
    finally:
        engine.dispose()
        files.close()


def _sqlite_engine(path: Path, busy_timeout_ms: int, files: LedgerFiles, *, read_only: bool) -> Engine:
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
        # A path that was taken by another file must not be read or written as if it were this one.
        if (change := files.find_change()) is not None and not change.lock_only:
            raise sqlite3.OperationalError(change.reason)
        if not read_only:
            connection.execute("SELECT count(*) FROM sqlite_master")  # now there is a WAL
            files.note_side_files()

    if not read_only:

        @event.listens_for(engine, "close")
        def forget(_connection: sqlite3.Connection, _record: Any) -> None:
            files.forget_side_files()  # without readers this was the last connection, which removes them

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
