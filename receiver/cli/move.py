"""`flora-receiver move`: copies a SQLite ledger to PostgreSQL and compares the two."""

import os
from pathlib import Path

from receiver.cli.backup import sqlite_path
from receiver.cli.output import format_table, print_result, report_errors
from receiver.config import load_settings
from receiver.errors import ConfigError, Problem, StoreUnavailableError
from receiver.net.database_url import parse_database_url, show_database_url
from receiver.store.database import NO_PSYCOPG


def run(config: Path | None, to: str, *, json: bool) -> None:
    with report_errors(as_json=json):
        settings = load_settings(config, os.environ, need_secrets=False)
        ledger = sqlite_path(settings, advice="there is nothing to move")
        _check_target(to)
        try:
            from receiver.store.move import move
        except ImportError as error:
            raise StoreUnavailableError(NO_PSYCOPG) from error
        moved = move(ledger, to)
        rows = [(name, str(copy.rows), copy.checksum) for name, copy in moved.tables.items()]
        what = f"Copied {ledger} to" if moved.copied else f"Nothing was copied: {ledger} was already in"
        text = (
            f"{format_table(('table', 'rows', 'checksum'), rows)}\n"
            f"{what} {show_database_url(to)}. Row counts and checksums of every table are equal.\n"
            "Set [database] url (RECEIVER_DATABASE__URL) to it, then start the service. "
            "Do not start the service on the SQLite file again."
        )
        tables = {
            name: {"rows": copy.rows, "checksum": copy.checksum} for name, copy in moved.tables.items()
        }
        data = {"ledger": str(ledger), "copied": moved.copied, "tables": tables}
        print_result(data, text, as_json=json)


def _check_target(to: str) -> None:
    """Raise ConfigError if `--to` is no URL of PostgreSQL."""
    try:
        is_file = parse_database_url(to).path is not None
    except ValueError as error:
        raise ConfigError([Problem("--to", str(error))]) from error
    if is_file:
        raise ConfigError([Problem("--to", "must be postgresql://…")])
