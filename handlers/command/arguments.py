"""What a program is told besides the JSON form of its run: arguments from templates, and its environment. Pure.

For `handlers.command`. Values come from outside: in arguments they are made safe for file names, as in storage's keys,
and never begin one with a dash; in the environment they are whole, under names that mean nothing to any program.
"""

import json
import re
import string
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from handlers.keys import clean
from receiver.handler import SettledRun, storable_text

VALUE_BYTES = 8 * 1024
METADATA_BYTES = 64 * 1024
"""Longer values, and metadata beyond this in all, stand in the JSON alone: a system takes only so much environment."""

_IDS = frozenset({"run_id", "run_type", "status", "technique_id", "workspace_id", "project_id"})
_TIMES = frozenset({"created_at", "started_at", "completed_at", "settled_at"})
_PLACES = frozenset({"run_file", "outputs_dir"})
_FIELDS = _IDS | _TIMES | _PLACES
_FIELD = re.compile(r"(?P<name>\w+)(?:\[(?P<key>[^\[\]]+)\])?")
_DEFAULT_TIME = "%Y%m%dT%H%M%SZ"


@dataclass(frozen=True, slots=True)
class _Piece:
    literal: str
    name: str = ""
    key: str = ""
    spec: str = ""


class ArgumentTemplate:
    """A parsed argument, such as `--market={metadata[market]}`; ValueError when it is wrong."""

    def __init__(self, text: str) -> None:
        if "\x00" in text:
            raise ValueError("an argument cannot hold a NUL character")
        try:
            parsed = list(string.Formatter().parse(text))
        except ValueError as error:
            raise ValueError(f"{text!r}: {error}; a brace that is meant is written twice: {{{{ or }}}}") from None
        self._pieces = [_piece(*each) for each in parsed]

    def render(self, run: SettledRun, places: Mapping[str, str]) -> str:
        """Fill it in; `places` has the paths `run_file` and `outputs_dir`."""
        text = "".join(piece.literal + _value(piece, run, places) for piece in self._pieces)
        literal = self._pieces[0].literal if self._pieces else ""
        return f"_{text}" if text.startswith("-") and not literal else text


def _piece(literal: str, name: str | None, spec: str | None, conversion: str | None) -> _Piece:
    if name is None:
        return _Piece(literal)
    match = _FIELD.fullmatch(name)
    known = match and (match["name"] in _FIELDS if match["key"] is None else match["name"] == "metadata")
    if not match or not known:
        raise ValueError(
            f"unknown field {{{name}}}; there are {', '.join(sorted(_FIELDS))} and metadata[…]; "
            "a brace that is meant is written twice: {{ or }}"
        )
    if conversion or (spec and ("{" in spec or match["name"] not in _TIMES)):
        raise ValueError(f"{{{name}}} takes no conversion, and a format only if it is a time")
    return _Piece(literal, match["name"], match["key"] or "", spec or "")


def _value(piece: _Piece, run: SettledRun, places: Mapping[str, str]) -> str:
    if not piece.name:
        return ""
    if piece.name in places:
        return places[piece.name]
    if piece.name in _TIMES:
        at: datetime | None = getattr(run, piece.name)
        return "_" if at is None else at.astimezone(UTC).strftime(piece.spec or _DEFAULT_TIME)
    return clean(_text(run.metadata.get(piece.key) if piece.key else getattr(run, piece.name)))


def variables(document: Mapping[str, Any]) -> dict[str, str]:
    """Return the fields of a run's JSON form as `RUN_…`; what is null is empty, so that `set -u` is no trap."""
    error = document["error"] or {"code": None, "message": None}
    found = {
        "RUN_ID": document["run_id"],
        "RUN_TYPE": document["run_type"],
        **{f"RUN_{name.upper()}": document[name] for name in (*_NAMES, *sorted(_TIMES))},
        "RUN_ERROR_CODE": error["code"],
        "RUN_ERROR_MESSAGE": error["message"],
    }
    fields = {name: _text(value)[:VALUE_BYTES] for name, value in found.items()}
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
        named.setdefault(name, []).append(_text(value))
    found, room = {}, METADATA_BYTES
    for name, values in sorted(named.items()):
        size = len(name) + len(values[0].encode(errors="replace"))
        if len(values) == 1 and size <= min(VALUE_BYTES, room):
            found[name] = values[0]
            room -= size
    return found


def _text(value: Any) -> str:
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True, ensure_ascii=False, default=str)
