"""A directory as a place for outputs: hidden temporary file, hash while writing, fsync, rename, fsync of the directory.

The temporary file lies in the directory of its target, which may be a file system of its own; what a killed process
left there is swept up by the next one that writes there. All file work happens in threads of its own; a lock per file
keeps the clean-up of a cancelled download behind the write that it interrupts.

The tree is the operator's: links are followed, to read what was moved elsewhere and to write below directories that lie
elsewhere. A file's own link is replaced, never written through.
"""

import asyncio
import errno
import fcntl
import hashlib
import os
import secrets
import stat
import threading
import time
from collections.abc import AsyncIterable, AsyncIterator, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import ParamSpec, TypeVar
from urllib.parse import unquote, urlsplit

from handlers.storage.places import NO_METADATA, PlaceError, Stored

PART_PREFIX = ".part-flora-"  # ours alone: what is called so and locked by nobody is removed
STALE_SECONDS = 24 * 3600  # no download runs for that long; asked only where the file system has no locks
REMEMBERED_DIRECTORIES = 10_000
THREADS = 16  # they mostly wait for fsync
READ_BYTES = 1024 * 1024

_NO_SYNC = frozenset({errno.EINVAL, errno.EBADF})  # of a directory, on SMB and others: it cannot be done there

_write = os.write  # tests put a full disk here

P = ParamSpec("P")
T = TypeVar("T")


class LocalDisk:
    """Files under `root`, which is made when it is needed."""

    def __init__(self, root: Path) -> None:
        self.root = root.absolute()
        self._tree = _Tree(self.root)
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="storage")

    def locate(self, key: str) -> str:
        return (self.root / key).as_uri()

    def key_of(self, location: str) -> str | None:
        parts = urlsplit(location)
        path = Path(unquote(parts.path))
        if parts.scheme != "file" or not path.is_relative_to(self.root):
            return None
        key = path.relative_to(self.root)
        return None if ".." in key.parts else key.as_posix()

    async def size(self, key: str) -> int | None:
        return await self._run(_file_size, self.root / key)

    async def read(self, key: str) -> AsyncIterator[bytes]:
        path = self.root / key
        if await self._run(_file_size, path) is None:
            return
        file = await self._run(path.open, "rb")
        try:
            while chunk := await self._run(file.read, READ_BYTES):
                yield chunk
        finally:
            file.close()

    async def put(
        self,
        key: str,
        chunks: AsyncIterable[bytes],
        *,
        content_type: str | None,
        expected: int | None,
        metadata: Mapping[str, str] = NO_METADATA,
    ) -> Stored:
        part = _Part(self._tree, self.root / key, expected)
        writing: asyncio.Task[None] | None = None
        try:
            async for chunk in chunks:  # the next chunk is received while this one is hashed and written
                if writing is not None:
                    await writing
                writing = asyncio.create_task(self._run(part.write, chunk))
                writing.add_done_callback(_retrieve)
            if writing is not None:
                await writing
            return await self._run(part.publish)
        finally:
            if not part.closed:
                await asyncio.shield(self._run(part.discard))

    async def check(self) -> None:
        """Make the directory, write and remove a file in it, and sweep up after dead processes."""
        await self._run(self._probe)

    async def close(self) -> None:
        self._threads.shutdown(wait=False)

    def _probe(self) -> None:
        part = _Part(self._tree, self.root / "probe", None)
        try:
            part.write(b"probe")
            part.sync()
        finally:
            part.discard()
        _sweep(self.root)

    async def _run(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, lambda: work(*args, **kwargs))
        except OSError as exc:
            raise PlaceError(self._explained(exc)) from exc

    def _explained(self, exc: OSError) -> str:
        if exc.errno == errno.ENOSPC:
            return f"disk full at {self.root}: {_room(self.root)}"
        return f"cannot write to {self.root}: {exc.strerror or exc}"


class _Tree:
    """Makes directories that survive a power cut: each one's entry in its parent is synced once by this process.

    That holds for directories found, too: whoever made them, another thread perhaps, may not have come to the sync.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._durable: set[Path] = set()
        self._swept: set[Path] = set()

    def enter(self, path: Path) -> None:
        """Make a directory to write into, and sweep it when this process comes there for the first time."""
        self.make(path)
        if path not in self._swept:
            if len(self._swept) >= REMEMBERED_DIRECTORIES:
                self._swept.clear()
            self._swept.add(path)
            _sweep(path)

    def make(self, path: Path) -> None:
        if path == self.root and path.is_dir():
            return
        if path in self._durable and path.is_dir():
            return
        if path.parent != path and (path.parent.is_relative_to(self.root) or not path.parent.is_dir()):
            self.make(path.parent)
        try:
            path.mkdir(exist_ok=True)
        except FileExistsError:
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path)) from None
        _sync(path.parent)
        if len(self._durable) >= REMEMBERED_DIRECTORIES:
            self._durable.clear()
        self._durable.add(path)


class _Part:
    """One file in the making. Its methods block; they are called from threads, and wait for each other."""

    def __init__(self, tree: "_Tree", target: Path, expected: int | None) -> None:
        self.closed = False
        self._tree = tree
        self._target = target
        self._expected = expected or 0
        self._path = target.parent / f"{PART_PREFIX}{secrets.token_hex(8)}"
        self._fd = -1
        self._size = 0
        self._digest = hashlib.sha256()
        self._lock = threading.Lock()

    def write(self, chunk: bytes) -> None:
        with self._lock:
            if self.closed:
                return
            self._open()
            view = memoryview(chunk)
            while view:
                view = view[_write(self._fd, view) :]
            self._digest.update(chunk)
            self._size += len(chunk)

    def sync(self) -> None:
        os.fsync(self._fd)

    def publish(self) -> Stored:
        """Make the file durable under its name; an identical one that is there already stays as it is."""
        target = self._target
        with self._lock:
            if self.closed:
                raise asyncio.CancelledError
            self._open()
            stored = Stored(self._size, self._digest.hexdigest())
            if _holds(target, stored):
                self._close(remove=True)
                _sync(target)
            else:
                self.sync()
                self._path.replace(target)
                self._close(remove=False)
            _sync(target.parent)
            return stored

    def discard(self) -> None:
        with self._lock:
            if not self.closed:
                self._close(remove=True)

    def _open(self) -> None:
        if self._fd >= 0:
            return
        self._tree.enter(self._target.parent)
        usage = os.statvfs(self._target.parent)
        if usage.f_blocks and usage.f_bavail * usage.f_frsize < self._expected:  # some file systems tell nothing
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        while True:
            self._fd = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
            with suppress(OSError):
                fcntl.flock(self._fd, fcntl.LOCK_EX)  # held as long as this process lives: see _remove_abandoned
            if os.fstat(self._fd).st_nlink:
                return
            os.close(self._fd)  # swept up before it was locked

    def _close(self, *, remove: bool) -> None:
        self.closed = True
        if self._fd < 0:
            return
        os.close(self._fd)
        if remove:
            self._path.unlink(missing_ok=True)


def _sweep(directory: Path) -> None:
    """Remove the parts in a directory that nobody writes any more."""
    for path in directory.glob(f"{PART_PREFIX}*"):
        with suppress(OSError):
            _remove_abandoned(path)


def _remove_abandoned(path: Path) -> None:
    """Remove a part if its writer is dead, and so holds no lock; under the lock, so that nobody else takes it up."""
    fd = os.open(path, os.O_WRONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return
        except OSError:
            if os.fstat(fd).st_mtime >= time.time() - STALE_SECONDS:
                return
        path.unlink()
    finally:
        os.close(fd)


def _room(path: Path) -> str:
    try:
        usage = os.statvfs(path)
    except OSError:
        return "free space unknown"
    if usage.f_files and not usage.f_favail:
        return "it has no room for another file (no inodes left)"
    return f"{usage.f_bavail * usage.f_frsize / 1e6:.1f} MB free"


def _file_size(path: Path) -> int | None:
    try:
        status = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    return status.st_size if stat.S_ISREG(status.st_mode) else None


def _holds(path: Path, stored: Stored) -> bool:
    if _file_size(path) != stored.size:
        return False
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == stored.sha256


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    except OSError as exc:
        if exc.errno not in _NO_SYNC or not path.is_dir():
            raise
    finally:
        os.close(fd)


def _retrieve(task: asyncio.Task[None]) -> None:
    """Look at a task's error, so that asyncio does not complain where a download fails before its write does."""
    if not task.cancelled():
        task.exception()
