"""Fills the generated parts of the documents from the code; `make docs` runs it.

A generated part stands between `<!-- generated: NAME ARGUMENTS -->` and `<!-- end -->`; `PARTS` has
the names. `test_generated.py` fails while a document is not what this module would write.
"""

import json
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict
from importlib.metadata import entry_points
from pathlib import Path

import yaml

from receiver.cli.doctor.findings import FINDING_KINDS
from receiver.cli.trigger.cases import CASES
from receiver.config import Setting, describe, environment_variables
from receiver.emulator.faults import KINDS
from receiver.model import When
from receiver.plugins.loader import GROUP, find_handler, options_of
from receiver.telemetry import Metrics
from receiver.web.ops.openapi import openapi_document
from receiver.web.public import STATUS
from tests.docs.command_parts import command_reference, command_table
from tests.docs.contract_parts import error_table, fixture_table, function_table, member_table
from tests.docs.markdown import to_code, to_table
from tests.docs.meanings import CASE_MEANINGS, FAULT_MEANINGS, REFUSAL_MEANINGS
from tests.docs.source_parts import ROOT, module_tables, package_table

_REGION = re.compile(
    r"^(?P<open><!-- generated: (?P<what>[^>]+?) -->)\n.*?^(?P<end><!-- end -->)$", re.MULTILINE | re.DOTALL
)


_FOLDERS = ("deploy", "handlers", "receiver", "tests")


def documents() -> list[Path]:
    """Return every page of the repository; the example plug-in is a package of its own."""
    found = [ROOT / "README.md", *(page for folder in _FOLDERS for page in (ROOT / folder).rglob("*.md"))]
    return sorted(page for page in found if "example_plugin" not in page.parts)


def fill(text: str) -> str:
    """Return a document with its generated parts written anew."""
    return _REGION.sub(lambda found: "\n".join((found["open"], _part(found["what"]), found["end"])), text)


def _part(what: str) -> str:
    name, *arguments = what.split()
    return PARTS[name](*arguments)


def _settings() -> str:
    return to_table("setting | default | meaning", (_setting_row(row) for row in describe()))


def _options(handler: str) -> str:
    return to_table("option | default | meaning", (_setting_row(row) for row in options_of(handler)))


def _handler_defaults() -> str:
    """Tabulate what the classes of the shipped handlers set for their entries in the settings."""
    rows = (
        _default_row(point.name)
        for point in sorted(entry_points(group=GROUP), key=lambda point: point.name)
    )
    return to_table("handler | `on` | `when` | `max_attempts` | `timeout_seconds` | `concurrency`", rows)


def _default_row(name: str) -> tuple[str, ...]:
    handler = find_handler(name)
    on = ", ".join(to_code(event) for event in getattr(handler, "on", ()))
    when = {
        key: value for key, value in asdict(getattr(handler, "when", When())).items() if value is not None
    }
    filters = ", ".join(to_code(f"{key} = {json.dumps(value)}") for key, value in when.items())
    limits = (getattr(handler, limit, None) for limit in ("max_attempts", "timeout_seconds", "concurrency"))
    return (
        to_code(name),
        on,
        filters or "–",
        *("–" if each is None else to_code(f"{each:g}") for each in limits),
    )


def _setting_row(row: Setting) -> tuple[str, str, str]:
    return to_code(row.path), to_code(row.default), row.help


def _environment() -> str:
    """Tabulate the variables that have a name of their own, and the settings that they set."""
    own = {name: each for name, each in environment_variables().items() if "__" not in name}
    return to_table(
        "variable | sets", ((to_code(name), to_code(".".join(each.path))) for name, each in own.items())
    )


def _metrics() -> str:
    return to_table(
        "metric | type | meaning",
        ((to_code(name), kind, text) for name, kind, text in Metrics().catalogue()),
    )


def _refusals() -> str:
    rows = ((str(int(status)), to_code(code), REFUSAL_MEANINGS[code]) for code, status in STATUS.items())
    return to_table("status | code | meaning", rows)


def _endpoints() -> str:
    """Tabulate the requests of the operations API by its own OpenAPI document."""
    document = openapi_document()
    schemas = document["components"]["schemas"]
    rows = []
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            names = [each["name"] for each in operation.get("parameters", ()) if each["in"] == "query"]
            body = (
                operation.get("requestBody", {})
                .get("content", {})
                .get("application/json", {})
                .get("schema", {})
            )
            names += schemas.get(body.get("$ref", "").rsplit("/", 1)[-1], {}).get("properties", {})
            parameters = ", ".join(to_code(name) for name in names)
            rows.append((to_code(f"{method.upper()} {path}"), parameters, operation["summary"]))
    return to_table("request | parameters | purpose", rows)


def _findings() -> str:
    rows = (
        (to_code(name), kind.severity, kind.summary, kind.cause, kind.fix)
        for name, kind in FINDING_KINDS.items()
    )
    return to_table("finding | severity | meaning | usual cause | fix", rows)


def _alerts() -> str:
    rules = yaml.safe_load((ROOT / "deploy/prometheus/alerts.yml").read_text("utf-8"))["groups"][0]["rules"]
    rows = (
        (to_code(rule["alert"]), rule["labels"]["severity"], f"{notes['summary']}.", notes["description"])
        for rule in rules
        for notes in (rule["annotations"],)
    )
    return to_table("alert | severity | meaning | what to do", rows)


def _cases() -> str:
    return to_table("case | request", ((to_code(name), CASE_MEANINGS[name]) for name in CASES))


def _faults() -> str:
    rows = (
        (
            to_code(kind),
            family,
            ", ".join(_fault_option(*option) for option in own.items()),
            FAULT_MEANINGS[kind],
        )
        for kind, (family, own) in KINDS.items()
    )
    return to_table("kind | affects | options | effect", rows)


def _fault_option(name: str, default: object) -> str:
    """Return an option with its default in parentheses, unless it has none."""
    if default in (None, ""):
        return f"`{name}`"
    shown = str(default).lower() if isinstance(default, bool) else str(default).removesuffix(".0")
    return f"`{name}` ({shown})"


PARTS: Mapping[str, Callable[..., str]] = {
    "settings": _settings,
    "environment": _environment,
    "options": _options,
    "handler-defaults": _handler_defaults,
    "commands": command_table,
    "command-reference": command_reference,
    "metrics": _metrics,
    "refusals": _refusals,
    "endpoints": _endpoints,
    "findings": _findings,
    "alerts": _alerts,
    "cases": _cases,
    "faults": _faults,
    "members": member_table,
    "functions": function_table,
    "errors": error_table,
    "fixtures": fixture_table,
    "packages": package_table,
    "modules": module_tables,
}
"""What a generated part may hold, by its name. Words after the name are its arguments."""


def main() -> None:
    for page in documents():
        before = page.read_text("utf-8")
        after = fill(before)
        if after != before:
            page.write_text(after, "utf-8")
            sys.stdout.write(f"{page.relative_to(ROOT)} was stale and has been written anew.\n")


if __name__ == "__main__":
    main()
