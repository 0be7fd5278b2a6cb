"""Templates such as `{completed_at:%Y-%m-%d}/{run_id}`: parsed once, filled for each run. Pure.

Keys, labels, messages, arguments and subjects are templates. Each use has its own table of fields,
and its own way to make a value harmless where the text goes.
"""

import json
import re
import string
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import Enum, auto
from typing import Any

from receiver.handler import SettledRun


class FieldKind(Enum):
    """How a field is written."""

    TEXT = auto()
    """`{name}`"""
    TIME = auto()
    """`{name}` or `{name:%Y-%m-%d}`"""
    NUMBER = auto()
    """`{name}` or `{name:03d}`"""
    MAPPING = auto()
    """`{name[key]}`"""


Fields = Mapping[str, FieldKind]

RUN_IDS = ("run_id", "run_type", "status", "technique_id", "workspace_id", "project_id")
RUN_TIMES = ("created_at", "started_at", "completed_at", "settled_at")
RUN_FIELDS: Fields = {
    **dict.fromkeys(RUN_IDS, FieldKind.TEXT),
    **dict.fromkeys(RUN_TIMES, FieldKind.TIME),
    "metadata": FieldKind.MAPPING,
}

_FIELD = re.compile(r"(?P<name>\w+)(?:\[(?P<key>[^\[\]]+)\])?")
_NO_FORMAT = (re.compile(""), "no format and no conversion")
_FORMATS = {
    FieldKind.TEXT: _NO_FORMAT,
    FieldKind.MAPPING: _NO_FORMAT,
    FieldKind.TIME: (re.compile("[^{]*"), "a time format only, such as %Y-%m-%d"),
    # Of what `format` would take: no fill characters, and no megabytes.
    FieldKind.NUMBER: (re.compile(r"(0?\d{1,2})?d?"), "a width only, such as 03d"),
}
_DEFAULT_TIME = "%Y%m%dT%H%M%SZ"
_BRACES = "a literal brace is written twice, {{ or }}"


@dataclass(frozen=True, slots=True)
class Placeholder:
    """One `{name[key]:spec}` of a template; `key` and `spec` are empty where not given."""

    name: str
    kind: FieldKind
    key: str
    spec: str


class Template:
    """A parsed template. ValueError if its syntax is wrong or a field is not in `fields`."""

    def __init__(self, text: str, fields: Fields) -> None:
        self.text = text
        self.parts: tuple[str | Placeholder, ...] = tuple(_parse(text, fields))
        """Literal text, never empty, and placeholders, in order."""

    def fill(self, to_text: Callable[[Placeholder], str]) -> str:
        """Return the text with every placeholder replaced by what `to_text` makes of it."""
        return "".join(part if isinstance(part, str) else to_text(part) for part in self.parts)


def run_text(run: SettledRun, field: Placeholder, escape: Callable[[str], str]) -> str:
    """Return the text of one of RUN_FIELDS, escaped. Times are in UTC, `_` if unknown."""
    if field.kind is FieldKind.TIME:
        at: datetime | None = getattr(run, field.name)
        return "_" if at is None else at.astimezone(UTC).strftime(field.spec or _DEFAULT_TIME)
    is_metadata = field.kind is FieldKind.MAPPING
    return escape(to_text(run.metadata.get(field.key) if is_metadata else getattr(run, field.name)))


def to_text(value: Any) -> str:
    """Return a value as text: nothing for None, JSON for what is not a string."""
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    return json.dumps(value, sort_keys=True, ensure_ascii=False, default=str)


def _parse(text: str, fields: Fields) -> Iterator[str | Placeholder]:
    try:
        pieces = list(string.Formatter().parse(text))
    except ValueError as error:
        raise ValueError(f"{text!r}: {error}; {_BRACES}") from None
    for literal, field, spec, conversion in pieces:
        if literal:
            yield literal
        if field is not None:
            yield _parse_field(field, spec or "", conversion, fields)


def _parse_field(field: str, spec: str, conversion: str | None, fields: Fields) -> Placeholder:
    match = _FIELD.fullmatch(field)
    kind = fields.get(match["name"]) if match else None
    if match is None or kind is None or (kind is FieldKind.MAPPING) != (match["key"] is not None):
        names = (f"{name}[…]" if kind is FieldKind.MAPPING else name for name, kind in fields.items())
        raise ValueError(f"unknown field {{{field}}}; there are {', '.join(sorted(names))}; {_BRACES}")
    pattern, allowed = _FORMATS[kind]
    if conversion or not pattern.fullmatch(spec):
        raise ValueError(f"{{{field}}} takes {allowed}")
    return Placeholder(match["name"], kind, match["key"] or "", spec)
