"""A program's arguments, made from templates, and its environment variables. Pure.

For the handler `command`. Values come from outside. In an argument each becomes a harmless file
name, and the argument never starts with a dash because of one. In the environment they are
complete, under names that mean nothing to other programs.
"""

import re
from collections.abc import Mapping
from typing import Any

from handlers.file_names import to_file_name
from handlers.template import (
    RUN_FIELDS,
    RUN_TIMES,
    FieldKind,
    Fields,
    Placeholder,
    Template,
    run_text,
    to_text,
)
from receiver.handler import SettledRun, storable_text

_MAX_VALUE = 8 * 1024
_MAX_METADATA = 64 * 1024
"""Bytes, in one value and in all. Systems limit the environment; the JSON has what is longer."""

_FIELDS: Fields = {**RUN_FIELDS, "run_file": FieldKind.TEXT, "outputs_dir": FieldKind.TEXT}


class ArgumentTemplate:
    """A parsed argument, such as `--market={metadata[market]}`. ValueError if it is wrong."""

    def __init__(self, text: str) -> None:
        if "\x00" in text:
            raise ValueError("an argument cannot hold a NUL character")
        self._template = Template(text, _FIELDS)

    def render(self, run: SettledRun, paths: Mapping[str, str]) -> str:
        """Return the argument for a run; `paths` holds `run_file` and `outputs_dir`."""

        def to_argument(field: Placeholder) -> str:
            return paths[field.name] if field.name in paths else run_text(run, field, to_file_name)

        text = self._template.fill(to_argument)
        starts_with_value = isinstance(next(iter(self._template.parts), ""), Placeholder)
        return f"_{text}" if starts_with_value and text.startswith("-") else text


def to_variables(document: Mapping[str, Any]) -> dict[str, str]:
    """Return the fields of a run document as `RUN_…`. Null is empty, which suits `set -u`."""
    error = document["error"] or {"code": None, "message": None}
    values = {
        "RUN_ID": document["run_id"],
        "RUN_TYPE": document["run_type"],
        **{f"RUN_{name.upper()}": document[name] for name in (*_DOCUMENT_FIELDS, *sorted(RUN_TIMES))},
        "RUN_ERROR_CODE": error["code"],
        "RUN_ERROR_MESSAGE": error["message"],
    }
    fields = {name: to_text(value)[:_MAX_VALUE] for name, value in values.items()}
    variables = {**_metadata_variables(document["metadata"]), **fields}
    return {name: storable_text(value) for name, value in variables.items()}


_DOCUMENT_FIELDS = (
    "event",
    "idempotency_key",
    "status",
    "technique_id",
    "workspace_id",
    "project_id",
    "charged_cost",
    "settled_by",
    "verdict",
)


def _metadata_variables(metadata: Mapping[str, Any]) -> dict[str, str]:
    """Return `RUN_METADATA_<KEY>` variables, without keys that share a name and values too long."""
    named: dict[str, list[str]] = {}
    for key, value in metadata.items():
        name = "RUN_METADATA_" + re.sub(r"[^A-Za-z0-9]", "_", key).upper()
        named.setdefault(name, []).append(to_text(value))
    variables, free = {}, _MAX_METADATA
    for name, values in sorted(named.items()):
        size = len(name) + len(values[0].encode(errors="replace"))
        if len(values) == 1 and size <= min(_MAX_VALUE, free):
            variables[name] = values[0]
            free -= size
    return variables
