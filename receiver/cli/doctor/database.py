"""Checks the ledger and its disk: it can be written and synced, and there is space left.

If a running service holds the ledger, that service's `/readyz` is read instead.
"""

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
from receiver.errors import ReceiverError, StoreInUseError, StoreUnavailableError
from receiver.net.addresses import local_origin
from receiver.net.clients import own_client
from receiver.net.ownership import find_existing
from receiver.store import open_database
from receiver.store.database import find_probe_url, probe_write

_MIN_FREE_BYTES = 1024**3
_SAFE_SQLITE = (3, 51, 3)
"""Earlier versions can corrupt a WAL file that has two writers."""
_MAX_MESSAGE = 120


def _free_bytes(directory: Path) -> int:
    return shutil.disk_usage(directory).free


async def check_database(
    settings: Settings, *, free_bytes: Callable[[Path], int] = _free_bytes
) -> list[Finding]:
    """Write to the ledger and its disk. `free_bytes` returns the free space at a directory.

    A SQLite ledger that does not exist yet is not created: a temporary one is used in its place.
    """
    url = settings.database.url
    path = settings.database.location.path
    if path is None:
        return await _check_writable(url, settings)
    findings: list[Finding] = []
    if sqlite3.sqlite_version_info < _SAFE_SQLITE:
        findings.append(Finding("database.old_sqlite", f"SQLite {sqlite3.sqlite_version}"))
    directory = path.parent
    try:
        directory = find_existing(path.parent)
        findings += _check_disk(directory, free_bytes)
        with find_probe_url(url) as probed:
            return findings + await _check_writable(probed, settings)
    except StoreUnavailableError as error:
        return [*findings, Finding("database.unusable", str(error))]
    except OSError as error:
        is_full = error.errno in {errno.ENOSPC, errno.EDQUOT}
        kind = "database.full" if is_full else "database.unusable"
        return [*findings, Finding(kind, f"{directory}: {error.strerror}")]


def _check_disk(directory: Path, free_bytes: Callable[[Path], int]) -> list[Finding]:
    with tempfile.TemporaryFile(dir=directory) as file:
        file.write(b"flora-receiver")
        file.flush()
        os.fsync(file.fileno())
    left = free_bytes(directory)
    if left >= _MIN_FREE_BYTES:
        return []
    return [Finding("database.full", f"{left // 1024**2} MiB free at {directory}")]


async def _check_writable(url: str, settings: Settings) -> list[Finding]:
    try:
        database = await asyncio.to_thread(open_database, url)
    except StoreInUseError:
        return await _check_service(settings)
    except ReceiverError as error:
        return [Finding("database.unusable", str(error))]
    try:
        await database.write(probe_write)
    except ReceiverError as error:
        return [Finding("database.unusable", str(error))]
    finally:
        await database.close()
    return []


async def _check_service(settings: Settings) -> list[Finding]:
    """Read whether the service that holds the ledger can commit."""
    url = f"{own_origin(settings)}/readyz"
    try:
        async with own_client(bound=settings.public.host) as client:
            response = await client.get(url)
    except httpx.HTTPError as error:
        return [Finding("database.unanswered", f"{url}: {type(error).__name__}")]
    if response.is_success:
        return []
    text = " ".join(response.text.split())[:_MAX_MESSAGE]
    return [Finding("database.unanswered", f"{url}: {response.status_code} {text}")]


def own_origin(settings: Settings) -> str:
    """Return the origin at which this machine reaches its own receiver."""
    public = settings.public
    return local_origin(public.host, public.port, tls=settings.tls.cert is not None)
