"""`flora-receiver check`: would `serve` work? Settings, handlers, database; nothing is sent anywhere."""

import asyncio
import os
from pathlib import Path

import typer

from receiver.cli.output import FAILED, print_result, report_errors
from receiver.config import load_settings, redact
from receiver.errors import Problem, ReceiverError, StoreInUseError
from receiver.plugins.loader import Loaded, check_handlers, close_handlers, load_handlers, mask_secrets
from receiver.store import open_database
from receiver.store.database import probe_write
from receiver.store.migrate import HEAD, current_revision


def run(config: Path | None, *, json: bool) -> None:
    with report_errors(as_json=json):
        settings = load_settings(config, os.environ)
        loaded = load_handlers(settings)
        problems, unreachable = asyncio.run(_handlers(loaded))
        state, trouble = asyncio.run(_database(settings.database.url))
        problems += trouble
        warnings = settings.warnings() + unreachable
        names = ", ".join(each.registration.name for each in loaded)
        lines = ["Settings: fine", f"Handlers: {names}", f"Database: {state}"]
        lines += [f"Warning: {warning.path}: {warning.message}" for warning in warnings]
        lines += [f"Wrong: {problem.path}: {problem.message}" for problem in problems]
        if not problems:
            lines.append("Ready: start it with `flora-receiver serve`.")
        data = {
            "ok": not problems,
            "settings": redact(mask_secrets(settings, os.environ)),
            "database": state,
            "warnings": [{"path": each.path, "message": each.message} for each in warnings],
            "problems": [{"path": each.path, "message": each.message} for each in problems],
        }
        print_result(data, "\n".join(lines), as_json=json)
        if problems:
            raise typer.Exit(FAILED)


async def _handlers(loaded: tuple[Loaded, ...]) -> tuple[list[Problem], list[Problem]]:
    """Return what is wrong with the handlers, and what may pass by itself."""
    try:
        return await check_handlers(loaded)
    finally:
        await close_handlers(loaded)


async def _database(url: str) -> tuple[str, list[Problem]]:
    """Return what state the database is in, and what is wrong with it. One in use by a running service is fine."""
    try:
        database = await asyncio.to_thread(open_database, url)
    except StoreInUseError:
        return "in use by a running service", []
    except ReceiverError as error:
        return "unusable", [Problem("database.url", str(error))]
    try:
        await database.write(probe_write)
        revision = await database.run(current_revision)
    except ReceiverError as error:
        return "unusable", [Problem("database.url", str(error))]
    finally:
        await database.close()
    if revision == HEAD:
        return "up to date", []
    return ("empty: serve will set it up" if revision is None else f"at {revision}: serve will migrate it"), []
