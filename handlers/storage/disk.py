"""A directory as a place for outputs: temporary file, hash, fsync, rename, fsync of the directory.

The hidden temporary file is in the directory of its target, which may be another file system. What
a killed process left there is removed by the next one that writes there. All file work runs in
threads; a lock per file makes the clean-up of a cancelled download wait for the write that it
interrupts.

Links in the tree are followed: files may have been moved elsewhere, and directories may be
elsewhere. A link in place of a file is replaced, never written through.
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

from handlers.storage.places import NO_METADATA, Digest, PlaceError
from receiver.handler import make_directory, match_owner

_PART_PREFIX = ".part-flora-"  # a file of this name that is not locked is removed
_STALE_SECONDS = 24 * 3600  # no download runs for so long; only for file systems without locks
_MAX_DIRECTORIES = 10_000
_MAX_THREADS = 16  # they mostly wait for fsync
_READ_BYTES = 1024 * 1024

_SYNC_UNSUPPORTED = frozenset({errno.EINVAL, errno.EBADF})  # of a directory, on SMB and others

P = ParamSpec("P")
T = TypeVar("T")


class LocalDisk:
    """Files below `root`, which is created when needed."""

    def __init__(self, root: Path) -> None:
        self.root = root.absolute()
        self._tree = _Tree(self.root)
        self._threads = ThreadPoolExecutor(_MAX_THREADS, thread_name_prefix="storage")

    def locate(self, key: str) -> str:
        return (self.root / key).as_uri()

    def key_of(self, location: str) -> str | None:
        parts = urlsplit(location)
        path = Path(unquote(parts.path))
        if parts.scheme != "file" or not path.is_relative_to(self.root):
            return None
        key = path.relative_to(self.root)
        return None if ".." in key.parts else key.as_posix()

    def earlier_location(self, key: str) -> str | None:
        return None

    def earlier_key_of(self, location: str) -> str | None:
        return None

    async def size(self, key: str) -> int | None:
        return await self._run(_file_size, self.root / key)

    async def read(self, key: str) -> AsyncIterator[bytes]:
        path = self.root / key
        if await self._run(_file_size, path) is None:
            return
        file = await self._run(path.open, "rb")
        try:
            while chunk := await self._run(file.read, _READ_BYTES):
                yield chunk
        finally:
            file.close()

    async def write(
        self,
        key: str,
        chunks: AsyncIterable[bytes],
        *,
        content_type: str | None,
        expected: int | None,
        metadata: Mapping[str, str] = NO_METADATA,
    ) -> Digest:
        part = _Part(self._tree, self.root / key, expected)
        writing: asyncio.Task[None] | None = None
        try:
            async for chunk in chunks:  # the next chunk is received while this one is hashed and written
                if writing is not None:
                    await writing
                writing = asyncio.create_task(self._run(part.write, chunk))
                writing.add_done_callback(_retrieve_error)
            if writing is not None:
                await writing
            return await self._run(part.publish)
        finally:
            if not part.closed:
                await asyncio.shield(self._run(part.discard))

    async def check(self) -> None:
        """Write and remove a file in the directory, and clean up after killed processes.

        A directory that does not exist yet is not created: the one that it will be in is tried.
        """
        await self._run(self._probe)

    async def close(self) -> None:
        self._threads.shutdown(wait=False)

    def _probe(self) -> None:
        directory = next(each for each in (self.root, *self.root.parents) if os.path.lexists(each))
        part = _Part(_Tree(directory), directory / "probe", None)
        try:
            part.write(b"probe")
            part.sync()
        finally:
            part.discard()
        if directory == self.root:
            _sweep(directory)

    async def _run(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return await asyncio.get_running_loop().run_in_executor(
                self._threads, lambda: function(*args, **kwargs)
            )
        except OSError as error:
            raise PlaceError(self._describe(error)) from error

    def _describe(self, error: OSError) -> str:
        if error.errno == errno.ENOSPC:
            return f"disk full at {self.root}: {_free_space(self.root)}"
        return f"cannot write to {self.root}: {error.strerror or error}"


class _Tree:
    """Creates directories that survive a power failure: each is synced once per process.

    Existing directories too: the thread or process that created one may not have synced it yet.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._synced: set[Path] = set()
        self._swept: set[Path] = set()

    def enter(self, path: Path) -> None:
        """Create a directory to write to, and clean it up on the first visit of this process."""
        self._create(path)
        if path not in self._swept:
            if len(self._swept) >= _MAX_DIRECTORIES:
                self._swept.clear()
            self._swept.add(path)
            _sweep(path)

    def _create(self, path: Path) -> None:
        if path == self.root and path.is_dir():
            return
        if path in self._synced and path.is_dir():
            return
        if path.parent != path and (path.parent.is_relative_to(self.root) or not path.parent.is_dir()):
            self._create(path.parent)
        try:
            make_directory(path)
        except FileExistsError:
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path)) from None
        _sync(path.parent)
        if len(self._synced) >= _MAX_DIRECTORIES:
            self._synced.clear()
        self._synced.add(path)


class _Part:
    """One file that is being written. Its methods block, and exclude each other."""

    def __init__(self, tree: "_Tree", target: Path, expected: int | None) -> None:
        self.closed = False
        self._tree = tree
        self._target = target
        self._expected = expected or 0
        self._path = target.parent / f"{_PART_PREFIX}{secrets.token_hex(8)}"
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
                view = view[os.write(self._fd, view) :]
            self._digest.update(chunk)
            self._size += len(chunk)

    def sync(self) -> None:
        os.fsync(self._fd)

    def publish(self) -> Digest:
        """Make the file durable under its name. An identical file that exists is left as it is."""
        target = self._target
        with self._lock:
            if self.closed:
                raise asyncio.CancelledError
            self._open()
            digest = Digest(self._size, self._digest.hexdigest())
            if _has_content(target, digest):
                self._close(remove=True)
                _sync(target)
            else:
                self.sync()
                self._path.replace(target)
                self._close(remove=False)
            _sync(target.parent)
            return digest

    def discard(self) -> None:
        with self._lock:
            if not self.closed:
                self._close(remove=True)

    def _open(self) -> None:
        if self._fd >= 0:
            return
        self._tree.enter(self._target.parent)
        usage = os.statvfs(self._target.parent)
        if (
            usage.f_blocks and usage.f_bavail * usage.f_frsize < self._expected
        ):  # some file systems report zeros
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        while True:
            self._fd = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
            match_owner(self._fd, self._target.parent)
            with suppress(OSError):
                fcntl.flock(self._fd, fcntl.LOCK_EX)  # held while this process lives: see _remove_abandoned
            if os.fstat(self._fd).st_nlink:
                return
            os.close(self._fd)  # it was removed before it was locked

    def _close(self, *, remove: bool) -> None:
        self.closed = True
        if self._fd < 0:
            return
        os.close(self._fd)
        if remove:
            self._path.unlink(missing_ok=True)


def _sweep(directory: Path) -> None:
    """Remove the unfinished files of killed processes from a directory."""
    for path in directory.glob(f"{_PART_PREFIX}*"):
        with suppress(OSError):
            _remove_abandoned(path)


def _remove_abandoned(path: Path) -> None:
    """Remove an unfinished file, holding its lock, which it gets only if the writer is dead."""
    fd = os.open(path, os.O_WRONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return
        except OSError:
            if os.fstat(fd).st_mtime >= time.time() - _STALE_SECONDS:
                return
        path.unlink()
    finally:
        os.close(fd)


def _free_space(path: Path) -> str:
    try:
        usage = os.statvfs(path)
    except OSError:
        return "free space unknown"
    if usage.f_files and not usage.f_favail:
        return "no inodes left for another file"
    return f"{usage.f_bavail * usage.f_frsize / 1e6:.1f} MB free"


def _file_size(path: Path) -> int | None:
    try:
        status = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    return status.st_size if stat.S_ISREG(status.st_mode) else None


def _has_content(path: Path, digest: Digest) -> bool:
    if _file_size(path) != digest.size:
        return False
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == digest.sha256


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in _SYNC_UNSUPPORTED or not path.is_dir():
            raise
    finally:
        os.close(fd)


def _retrieve_error(task: asyncio.Task[None]) -> None:
    """Read a task's error, or asyncio would log it if the download fails before its write does."""
    if not task.cancelled():
        task.exception()
