"""Templates over a row: `{column}` is the row's field, `{{` and `}}` are braces. Nothing else means anything."""

import json
import re
from collections.abc import Mapping
from typing import Any

_PIECE = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]|[^{}]+")


class Template:
    """A parsed template; ValueError where it is wrong. A column's name is taken as it is: dots and colons are its own."""

    def __init__(self, text: str) -> None:
        self.text = text
        self._pieces: list[tuple[str, str | None]] = []
        for found in _PIECE.finditer(text):
            piece, column = found[0], found[1]
            if column is not None:
                if not column.strip():
                    raise ValueError(f"{text!r}: {{}} names no column")
                self._pieces.append(("", column.strip()))
            elif piece in ("{", "}"):
                raise ValueError(f"{text!r}: a single {piece!r}; write {piece * 2!r} for the character itself")
            else:
                self._pieces.append(("{" if piece == "{{" else "}" if piece == "}}" else piece, None))

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns it names, each once."""
        return tuple(dict.fromkeys(column for _, column in self._pieces if column is not None))

    def missing(self, values: Mapping[str, Any]) -> tuple[str, ...]:
        """Return the columns that a row lacks."""
        return tuple(column for column in self.columns if column not in values)

    def fill(self, values: Mapping[str, Any]) -> str:
        """Return the text for a row that has every column."""
        return "".join(literal if column is None else as_text(values[column]) for literal, column in self._pieces)


def as_text(value: Any) -> str:
    """Return a field as text: nothing for null, JSON for what is not text."""
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
