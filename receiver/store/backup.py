"""Backup and restore of a SQLite ledger while it is in use. PostgreSQL has its own tools."""

import contextlib
import os
import shutil
import sqlite3
from datetime import UTC, datetime
from pathlib import Path

from sqlalchemy import Connection

from receiver.errors import StoreUnavailableError
from receiver.net.ownership import make_directory, match_owner
from receiver.store.ledger_files import LedgerFiles

_COMPANIONS = ("-wal", "-shm")


def copy(tx: Connection, target: Path) -> int:
    """Write the ledger as `tx` sees it to a new file, checked and synced; return its bytes.

    Writers are not blocked meanwhile. Raises StoreUnavailableError if the file cannot be written.
    """
    part = target.with_name(f".{target.name}.part")
    try:
        if target.exists():
            raise StoreUnavailableError(f"{target} already exists: a backup overwrites nothing")
        os.close(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600))
        source = tx.connection.driver_connection
        assert isinstance(source, sqlite3.Connection)
        with contextlib.closing(sqlite3.connect(part)) as copied:
            source.backup(copied)
            copied.execute("PRAGMA journal_mode = DELETE")
            _check_integrity(copied, part)
        _fsync(part)
        match_owner(part, target.parent)
        part.rename(target)
        _fsync(target.parent)
        return target.stat().st_size
    except (OSError, sqlite3.Error) as error:
        with contextlib.suppress(OSError):
            part.unlink()
        raise StoreUnavailableError(f"cannot write {target}: {error}") from error


def restore(source: Path, ledger: Path, *, now: datetime | None = None) -> Path | None:
    """Replace a ledger by a backup; return the path to which the old ledger was moved, if any.

    Raises StoreInUseError while a service runs, StoreUnavailableError if the backup is unusable or
    the ledger cannot be written.
    """
    part = ledger.with_name(f".{ledger.name}.part")
    try:
        with contextlib.closing(sqlite3.connect(f"file:{source}?mode=ro", uri=True)) as copied:
            _check_integrity(copied, source)
            known = copied.execute(
                "SELECT count(*) FROM sqlite_master WHERE name = 'alembic_version'"
            ).fetchone()[0]
        if not known:
            raise StoreUnavailableError(f"{source} is not a ledger of flora-receiver")
        make_directory(ledger.parent)
        files = LedgerFiles(ledger, create=False)
        try:
            aside = _set_aside(ledger, now or datetime.now(UTC))
            shutil.copyfile(source, part)
            part.chmod(0o600)
            match_owner(part, ledger.parent)
            _fsync(part)
            part.rename(ledger)
            _fsync(ledger.parent)
        finally:
            files.close()
    except (OSError, sqlite3.Error) as error:
        raise StoreUnavailableError(f"cannot restore {ledger} from {source}: {error}") from error
    return aside


def _set_aside(ledger: Path, now: datetime) -> Path | None:
    """Rename the old files: a WAL that stayed would be applied to the backup."""
    if not ledger.exists():
        return None
    aside = ledger.with_name(f"{ledger.name}.before-{now:%Y%m%dT%H%M%SZ}")
    for suffix in ("", *_COMPANIONS):
        with contextlib.suppress(FileNotFoundError):
            ledger.with_name(ledger.name + suffix).rename(aside.with_name(aside.name + suffix))
    return aside


def _check_integrity(connection: sqlite3.Connection, path: Path) -> None:
    [(result,)] = connection.execute("PRAGMA integrity_check(1)").fetchall()
    if result != "ok":
        raise StoreUnavailableError(f"{path} is damaged: {result}")


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
