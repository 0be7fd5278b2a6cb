"""Looks at the ledger and its disk: written, synced, with room left. Beside a running service, that one is asked."""

import os
import shutil
import sqlite3
import tempfile
from collections.abc import Callable
from pathlib import Path

import httpx

from receiver.config import Settings
from receiver.doctor.findings import Finding
from receiver.errors import ReceiverError, StoreInUseError
from receiver.http import own_client
from receiver.store import open_database

_ROOM = 1024**3
_SOUND = (3, 51, 3)


def _free(directory: Path) -> int:
    return shutil.disk_usage(directory).free


async def of_ledger(settings: Settings, *, free: Callable[[Path], int] = _free) -> list[Finding]:
    """Open the ledger, write and sync. `free` returns how many bytes are left where a directory is."""
    url = settings.database.url
    found: list[Finding] = []
    if url.startswith("sqlite:///"):
        found += _of_disk(Path(url.removeprefix("sqlite:///")).parent, free)
        if sqlite3.sqlite_version_info < _SOUND:
            found.append(Finding("database.old_sqlite", f"SQLite {sqlite3.sqlite_version}"))
    try:
        database = open_database(url)
    except StoreInUseError:
        return found + await _of_service(settings)
    except ReceiverError as error:
        return [*found, Finding("database.unusable", str(error))]
    try:
        await database.write(lambda _: None)
    except ReceiverError as error:
        found.append(Finding("database.unusable", str(error)))
    finally:
        await database.close()
    return found


def _of_disk(directory: Path, free: Callable[[Path], int]) -> list[Finding]:
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory) as file:
            file.write(b"flora-receiver")
            file.flush()
            os.fsync(file.fileno())
        left = free(directory)
    except OSError as error:
        return [Finding("database.unusable", f"{directory}: {error.strerror}")]
    return [] if left >= _ROOM else [Finding("database.full", f"{left // 1024**2} MiB are left at {directory}")]


async def _of_service(settings: Settings) -> list[Finding]:
    """Ask the service that holds the ledger whether it can commit."""
    url = f"{own_origin(settings)}/readyz"
    try:
        async with own_client() as client:
            answer = await client.get(url)
    except httpx.HTTPError as error:
        return [Finding("database.unanswered", f"{url}: {type(error).__name__}")]
    if answer.is_success:
        return []
    return [Finding("database.unanswered", f"{url}: {answer.status_code} {' '.join(answer.text.split())[:120]}")]


def own_origin(settings: Settings) -> str:
    """Return where this machine's own receiver listens, seen from this machine."""
    host = settings.public.host
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)  # noqa: S104
    return f"{'https' if settings.tls.cert else 'http'}://{host}:{settings.public.port}"
