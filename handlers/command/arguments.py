"""What a program is told besides the JSON form of its run: arguments from templates, and its environment. Pure.

For `handlers.command`. Values come from outside: in arguments they are made safe for file names, as in storage's keys,
and never begin one with a dash; in the environment they are whole, under names that mean nothing to any program.
"""

import re
from collections.abc import Mapping
from typing import Any

from handlers.file_names import to_file_name
from handlers.template import RUN_FIELDS, RUN_TIMES, FieldKind, Fields, Placeholder, Template, run_text, to_text
from receiver.handler import SettledRun, storable_text

VALUE_BYTES = 8 * 1024
METADATA_BYTES = 64 * 1024
"""Longer values, and metadata beyond this in all, stand in the JSON alone: a system takes only so much environment."""

_FIELDS: Fields = {**RUN_FIELDS, "run_file": FieldKind.TEXT, "outputs_dir": FieldKind.TEXT}


class ArgumentTemplate:
    """A parsed argument, such as `--market={metadata[market]}`. ValueError if it is wrong."""

    def __init__(self, text: str) -> None:
        if "\x00" in text:
            raise ValueError("an argument cannot hold a NUL character")
        self._template = Template(text, _FIELDS)

    def render(self, run: SettledRun, paths: Mapping[str, str]) -> str:
        """Return the argument for a run; `paths` holds `run_file` and `outputs_dir`."""
        text = self._template.fill(
            lambda field: paths[field.name] if field.name in paths else run_text(run, field, to_file_name)
        )
        starts_with_value = isinstance(next(iter(self._template.parts), ""), Placeholder)
        return f"_{text}" if starts_with_value and text.startswith("-") else text


def variables(document: Mapping[str, Any]) -> dict[str, str]:
    """Return the fields of a run's JSON form as `RUN_…`; what is null is empty, so that `set -u` is no trap."""
    error = document["error"] or {"code": None, "message": None}
    found = {
        "RUN_ID": document["run_id"],
        "RUN_TYPE": document["run_type"],
        **{f"RUN_{name.upper()}": document[name] for name in (*_NAMES, *sorted(RUN_TIMES))},
        "RUN_ERROR_CODE": error["code"],
        "RUN_ERROR_MESSAGE": error["message"],
    }
    fields = {name: to_text(value)[:VALUE_BYTES] for name, value in found.items()}
    return {name: storable_text(value) for name, value in {**_metadata(document["metadata"]), **fields}.items()}


_NAMES = (
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


def _metadata(metadata: Mapping[str, Any]) -> dict[str, str]:
    """Name each value `RUN_METADATA_<KEY>`; keys that would share a name are left out, as is what is too long."""
    named: dict[str, list[str]] = {}
    for key, value in metadata.items():
        name = "RUN_METADATA_" + re.sub(r"[^A-Za-z0-9]", "_", key).upper()
        named.setdefault(name, []).append(to_text(value))
    found, room = {}, METADATA_BYTES
    for name, values in sorted(named.items()):
        size = len(name) + len(values[0].encode(errors="replace"))
        if len(values) == 1 and size <= min(VALUE_BYTES, room):
            found[name] = values[0]
            room -= size
    return found
