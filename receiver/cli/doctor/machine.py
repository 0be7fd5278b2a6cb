"""Looks at the ledger and its disk: written, synced, with room left. Beside a running service, that one is asked."""

import asyncio
import errno
import os
import shutil
import sqlite3
import tempfile
from collections.abc import Callable
from pathlib import Path

import httpx

from receiver.cli.doctor.findings import Finding
from receiver.config import Settings
from receiver.errors import ReceiverError, StoreInUseError
from receiver.net.addresses import http_origin, local_host
from receiver.net.clients import own_client
from receiver.store import open_database
from receiver.store.touching import touch

_ROOM = 1024**3
_SOUND = (3, 51, 3)


def _free(directory: Path) -> int:
    return shutil.disk_usage(directory).free


async def of_ledger(settings: Settings, *, free: Callable[[Path], int] = _free) -> list[Finding]:
    """Write and sync. `free` returns how many bytes are left where a directory is.

    A ledger that is not there yet is not made: another one is tried in its place, and removed.
    """
    url = settings.database.url
    if not url.startswith("sqlite:///"):
        return await _of_written(url, settings)
    found: list[Finding] = []
    if sqlite3.sqlite_version_info < _SOUND:
        found.append(Finding("database.old_sqlite", f"SQLite {sqlite3.sqlite_version}"))
    path = Path(url.removeprefix("sqlite:///"))
    directory = path.parent
    try:
        directory, there = _looked_up(path)
        with tempfile.TemporaryDirectory(prefix="flora-receiver-doctor-", dir=directory) as scratch:
            found += _of_disk(directory, free)
            tried = url if there else f"sqlite:///{scratch}/receiver.db"
            return found + await _of_written(tried, settings)
    except OSError as error:
        return [*found, Finding(_kind(error.errno), f"{directory}: {error.strerror}")]


def _looked_up(path: Path) -> tuple[Path, bool]:
    """Return the innermost directory that is there, and whether the file is."""
    return next(each for each in path.absolute().parents if each.exists()), path.exists()


def _of_disk(directory: Path, free: Callable[[Path], int]) -> list[Finding]:
    with tempfile.TemporaryFile(dir=directory) as file:
        file.write(b"flora-receiver")
        file.flush()
        os.fsync(file.fileno())
    left = free(directory)
    return [] if left >= _ROOM else [Finding("database.full", f"{left // 1024**2} MiB are left at {directory}")]


def _kind(number: int | None) -> str:
    return "database.full" if number in {errno.ENOSPC, errno.EDQUOT} else "database.unusable"


async def _of_written(url: str, settings: Settings) -> list[Finding]:
    try:
        database = await asyncio.to_thread(open_database, url)
    except StoreInUseError:
        return await _of_service(settings)
    except ReceiverError as error:
        return [Finding("database.unusable", str(error))]
    try:
        await database.write(touch)
    except ReceiverError as error:
        return [Finding("database.unusable", str(error))]
    finally:
        await database.close()
    return []


async def _of_service(settings: Settings) -> list[Finding]:
    """Ask the service that holds the ledger whether it can commit."""
    url = f"{own_origin(settings)}/readyz"
    try:
        async with own_client(bound=settings.public.host) as client:
            answer = await client.get(url)
    except httpx.HTTPError as error:
        return [Finding("database.unanswered", f"{url}: {type(error).__name__}")]
    if answer.is_success:
        return []
    return [Finding("database.unanswered", f"{url}: {answer.status_code} {' '.join(answer.text.split())[:120]}")]


def own_origin(settings: Settings) -> str:
    """Return the origin at which this machine reaches its own receiver."""
    public = settings.public
    return http_origin(local_host(public.host), public.port, tls=settings.tls.cert is not None)
