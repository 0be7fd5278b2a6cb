"""`flora-receiver backup` and `restore`: copies of a SQLite ledger, beside a running service or without one."""

import asyncio
import os
from pathlib import Path

from receiver.cli.connection import connect
from receiver.cli.output import explained, show
from receiver.config import Settings, load
from receiver.errors import ConfigError, Problem, ReceiverApiError, StoreInUseError
from receiver.store import backup as copies
from receiver.store import open_database


def backup(config: Path | None, file: Path, *, json: bool) -> None:
    with explained(as_json=json):
        settings = load(config, os.environ, need_secrets=False)
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
        show({"path": str(target), "size": size}, f"{target}: {size} bytes, checked.", as_json=json)


def restore(config: Path | None, file: Path, *, json: bool) -> None:
    with explained(as_json=json):
        ledger = _sqlite(load(config, os.environ, need_secrets=False))
        aside = copies.restore(file.absolute(), ledger)
        told = f" What was there is {aside} now." if aside else ""
        data = {"ledger": str(ledger), "aside": None if aside is None else str(aside)}
        show(data, f"{ledger} is as it was when {file} was made.{told}", as_json=json)


async def _copied(settings: Settings, target: Path) -> int:
    database = open_database(settings.database.url)
    try:
        return await database.read(lambda tx: copies.copy(tx, target))
    finally:
        await database.close()


def _sqlite(settings: Settings) -> Path:
    url = settings.database.url
    if not url.startswith("sqlite:///"):
        message = "is PostgreSQL: use pg_dump and pg_restore, which copy it while it is in use"
        raise ConfigError([Problem("database.url", message)])
    return Path(url.removeprefix("sqlite:///"))
