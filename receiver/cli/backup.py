"""`flora-receiver backup` and `restore`: copies of a SQLite ledger."""

import asyncio
import os
from pathlib import Path

from receiver.cli.connection import connect
from receiver.cli.output import print_result, report_errors
from receiver.config import Settings, load_settings
from receiver.errors import ConfigError, Problem, ReceiverApiError, StoreInUseError, StoreUnavailableError
from receiver.store import backup as copies
from receiver.store import open_database


def make_backup(config: Path | None, file: Path, *, json: bool) -> None:
    with report_errors(as_json=json):
        settings = load_settings(config, os.environ, need_secrets=False)
        ledger, target = sqlite_path(settings), file.absolute()
        try:
            size = asyncio.run(_copy(settings, target)) if ledger.exists() else None
            reason = f"{ledger} does not exist"
        except StoreInUseError as error:
            size, reason = None, str(error)
        if size is None:  # a running service makes the copy, also of a file that was removed under it
            size = _copy_by_service(target, reason)
        text = f"Wrote {target}: {size} bytes, verified."
        print_result({"path": str(target), "size": size}, text, as_json=json)


def _copy_by_service(target: Path, reason: str) -> int:
    """Have the running service copy its ledger; `reason` is why this process cannot."""
    try:
        with connect() as receiver:
            return receiver.backup(target)
    except ReceiverApiError as error:
        if error.code == "unreachable":
            raise StoreUnavailableError(f"{reason}, and {error}") from error
        raise


def restore_backup(config: Path | None, file: Path, *, json: bool) -> None:
    with report_errors(as_json=json):
        ledger = sqlite_path(load_settings(config, os.environ, need_secrets=False))
        aside = copies.restore(file.absolute(), ledger)
        kept = f" The previous ledger is now {aside}." if aside else ""
        data = {"ledger": str(ledger), "aside": None if aside is None else str(aside)}
        print_result(data, f"Restored {ledger} from {file}.{kept}", as_json=json)


def sqlite_path(
    settings: Settings, *, advice: str = "use pg_dump and pg_restore, which work while it is in use"
) -> Path:
    """Return the path of a SQLite ledger. Raises ConfigError with `advice` if it is PostgreSQL."""
    path = settings.database.location.path
    if path is None:
        raise ConfigError([Problem("database.url", f"is PostgreSQL: {advice}")])
    return path


async def _copy(settings: Settings, target: Path) -> int:
    database = open_database(settings.database.url)
    try:
        return await database.read(lambda tx: copies.copy(tx, target))
    finally:
        await database.close()
