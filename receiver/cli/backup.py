"""`flora-receiver backup`, `restore` and `move`: copies of a SQLite ledger, and its way to PostgreSQL."""

import asyncio
import os
from pathlib import Path

from receiver.cli.connection import connect
from receiver.cli.output import format_table, print_result, report_errors
from receiver.config import Settings, load_settings
from receiver.errors import ConfigError, Problem, ReceiverApiError, StoreInUseError, StoreUnavailableError
from receiver.store import backup as copies
from receiver.store import open_database
from receiver.store.database import NO_PSYCOPG, redact_url

_PG_DUMP = "use pg_dump and pg_restore, which copy it while it is in use"


def backup(config: Path | None, file: Path, *, json: bool) -> None:
    with report_errors(as_json=json):
        settings = load_settings(config, os.environ, need_secrets=False)
        _sqlite(settings)
        target = file.absolute()
        try:
            size = asyncio.run(_copied(settings, target))
        except StoreInUseError as error:
            # The service has the file: it makes the copy, and its words are ours.
            try:
                with connect() as receiver:
                    size = receiver.backup(target)
            except ReceiverApiError as refused:
                raise refused from error
        print_result({"path": str(target), "size": size}, f"{target}: {size} bytes, checked.", as_json=json)


def restore(config: Path | None, file: Path, *, json: bool) -> None:
    with report_errors(as_json=json):
        ledger = _sqlite(load_settings(config, os.environ, need_secrets=False))
        aside = copies.restore(file.absolute(), ledger)
        told = f" What was there is {aside} now." if aside else ""
        data = {"ledger": str(ledger), "aside": None if aside is None else str(aside)}
        print_result(data, f"{ledger} is as it was when {file} was made.{told}", as_json=json)


def move(config: Path | None, to: str, *, json: bool) -> None:
    with report_errors(as_json=json):
        ledger = _sqlite(load_settings(config, os.environ, need_secrets=False), otherwise="there is nothing to move")
        if not to.startswith("postgresql://"):
            raise ConfigError([Problem("--to", "must be postgresql://…")])
        try:
            from receiver.store.move import move as moved_to
        except ImportError as error:
            raise StoreUnavailableError(NO_PSYCOPG) from error
        moved = moved_to(ledger, to)
        rows = [(name, str(held.rows), held.checksum) for name, held in moved.tables.items()]
        was = f"{ledger} is" if moved.copied else f"Nothing was copied: {ledger} was"
        text = (
            f"{format_table(('table', 'rows', 'checksum'), rows)}\n{was} in {redact_url(to)}, every row of it, as counts and "
            "checksums of both sides say.\nName that in [database] url (RECEIVER_DATABASE__URL), then start the service. "
            "Never start it on the file again."
        )
        data = {
            "ledger": str(ledger),
            "copied": moved.copied,
            "tables": {name: {"rows": held.rows, "checksum": held.checksum} for name, held in moved.tables.items()},
        }
        print_result(data, text, as_json=json)


async def _copied(settings: Settings, target: Path) -> int:
    database = open_database(settings.database.url)
    try:
        return await database.read(lambda tx: copies.copy(tx, target))
    finally:
        await database.close()


def _sqlite(settings: Settings, *, otherwise: str = _PG_DUMP) -> Path:
    url = settings.database.url
    if not url.startswith("sqlite:///"):
        raise ConfigError([Problem("database.url", f"is PostgreSQL: {otherwise}")])
    return Path(url.removeprefix("sqlite:///"))
