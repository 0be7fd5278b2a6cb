"""`flora-receiver check`: checks settings, handlers and database before `serve`; sends nothing."""

import asyncio
import os
from datetime import UTC, datetime
from pathlib import Path

import typer

from receiver.cli.output import FAILED, print_findings, report_errors
from receiver.config import load_settings, redact
from receiver.errors import Problem, ReceiverError, StoreInUseError
from receiver.plugins.loader import (
    CheckWarning,
    Loaded,
    check_handlers,
    close_handlers,
    load_handlers,
    mask_secrets,
)
from receiver.service.wiring import find_untrusted, find_unusable_files
from receiver.store import open_database
from receiver.store.database import find_probe_url, probe_write
from receiver.store.migrate import HEAD, current_revision


def run(config: Path | None, *, json: bool) -> None:
    with report_errors(as_json=json):
        settings = load_settings(config, os.environ)
        loaded = load_handlers(settings)
        problems, concerns = asyncio.run(_check_and_close(loaded))
        state, database_problems = asyncio.run(_check_database(settings.database.url))
        unusable = find_unusable_files(settings)
        untrusted, odd = ([], []) if unusable else find_untrusted(settings, datetime.now(UTC))
        problems += [*database_problems, *unusable, *untrusted]
        warnings = [*settings.find_warnings(), *odd, *concerns]
        names = ", ".join(each.registration.name for each in loaded)
        lines = ["Settings: valid", f"Handlers: {names}", f"Database: {state}"]
        lines += [f"Warning: {each.path}: {each.message}" for each in warnings]
        lines += [f"Error: {each.path}: {each.message}" for each in problems]
        if not problems:
            lines.append("No problems found. Start the service with `flora-receiver serve`.")
        data = {
            "ok": not problems,
            "settings": redact(mask_secrets(settings, os.environ)),
            "database": state,
            "warnings": [{"path": each.path, "message": each.message} for each in warnings],
            "problems": [{"path": each.path, "message": each.message} for each in problems],
        }
        print_findings(data, "\n".join(lines), as_json=json)
        if problems:
            raise typer.Exit(FAILED)


async def _check_and_close(loaded: tuple[Loaded, ...]) -> tuple[list[Problem], list[CheckWarning]]:
    """Return the handlers' problems and warnings."""
    try:
        return await check_handlers(loaded)
    finally:
        await close_handlers(loaded)


async def _check_database(url: str) -> tuple[str, list[Problem]]:
    """Return the state of the database and its problems. Use by a running service is no problem."""
    try:
        with find_probe_url(url) as probed:
            return await _probe_database(probed)
    except ReceiverError as error:
        return "unusable", [Problem("database.url", str(error))]


async def _probe_database(url: str) -> tuple[str, list[Problem]]:
    try:
        database = await asyncio.to_thread(open_database, url)
    except StoreInUseError:
        return "in use by a running service", []
    try:
        await database.write(probe_write)
        revision = await database.run(current_revision)
    finally:
        await database.close()
    if revision == HEAD:
        return "up to date", []
    if revision is None:
        return "empty: `serve` will create its tables", []
    return f"at revision {revision}: `serve` will migrate it", []
