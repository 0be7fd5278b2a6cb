"""`flora-receiver handlers …`: the installed handlers, their options and their tables.

The loader is imported when a command runs, so that `--help` does not wait for it.
"""

import os
from dataclasses import asdict
from typing import Annotated

import typer

from receiver.cli.options import Config, Json
from receiver.cli.output import format_table, print_findings, print_result, report_errors

handlers = typer.Typer(help="Show handlers, their options and their tables.", no_args_is_help=True)


@handlers.command("list")
def list_handlers(config: Config = None, json: Json = False) -> None:
    """List the installed and the configured handlers."""
    from receiver.config import load_settings
    from receiver.plugins.loader import find_broken_handlers, installed_handlers

    with report_errors(as_json=json):
        settings = load_settings(config, os.environ, need_secrets=False)
        configured = [{"name": entry.name, "use": entry.use} for entry in settings.handlers]
        broken = find_broken_handlers()
        installed = [name for name in installed_handlers() if name not in broken]
        lines = ["Installed: " + ", ".join(installed)]
        lines += [f"Broken: {reason}" for reason in broken.values()]
        lines += [f"Configured: {entry['name']} (use = {entry['use']!r})" for entry in configured]
        problems = [{"name": name, "reason": reason} for name, reason in broken.items()]
        data = {"installed": installed, "broken": problems, "configured": configured}
        print_findings(data, "\n".join(lines), as_json=json)


@handlers.command("show")
def show_handler(
    use: Annotated[
        str, typer.Argument(help="The handler's `use`: storage, forward or package.module:Class.")
    ],
    json: Json = False,
) -> None:
    """Show the options of a handler."""
    from receiver.plugins.loader import options_of

    with report_errors(as_json=json):
        found = options_of(use)
        rows = [(each.path, each.type, each.default, each.help) for each in found]
        table = format_table(("option", "type", "default", "meaning"), rows)
        data = {"use": use, "options": [asdict(each) for each in found]}
        print_result(data, table if rows else f"{use} has no options.", as_json=json)


@handlers.command("schema")
def print_schema(
    name: Annotated[str, typer.Argument(help="The handler's name or its `use`.")],
    config: Config = None,
    json: Json = False,
) -> None:
    """Print the SQL of a handler's tables."""
    from receiver.config import load_settings
    from receiver.plugins.loader import describe_schema

    with report_errors(as_json=json):
        settings = load_settings(config, os.environ, need_secrets=False)
        sql = describe_schema(settings, name, os.environ)
        print_result({"handler": name, "sql": sql}, sql, as_json=json)
