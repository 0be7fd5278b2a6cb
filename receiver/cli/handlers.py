"""`flora-receiver handlers list`, `handlers show` and `handlers schema`."""

import os
from dataclasses import asdict
from pathlib import Path

from receiver.cli.output import format_table, print_result, report_errors
from receiver.config import load_settings
from receiver.plugins.loader import available, describe_schema, options_of


def run(config: Path | None, *, json: bool) -> None:
    with report_errors(as_json=json):
        settings = load_settings(config, os.environ, need_secrets=False)
        configured = [{"name": entry.name, "use": entry.use} for entry in settings.handlers]
        lines = ["Installed: " + ", ".join(available())]
        lines += [f"Configured: {entry['name']} (use = {entry['use']!r})" for entry in configured]
        print_result({"installed": list(available()), "configured": configured}, "\n".join(lines), as_json=json)


def options(use: str, *, json: bool) -> None:
    with report_errors(as_json=json):
        found = options_of(use)
        rows = [(each.path, each.type, each.default, each.help) for each in found]
        text = format_table(("option", "type", "default", "means"), rows) if rows else f"{use} has no options."
        print_result({"use": use, "options": [asdict(each) for each in found]}, text, as_json=json)


def schema(config: Path | None, name: str, *, json: bool) -> None:
    with report_errors(as_json=json):
        sql = describe_schema(load_settings(config, os.environ, need_secrets=False), name, os.environ)
        print_result({"handler": name, "sql": sql}, sql, as_json=json)
