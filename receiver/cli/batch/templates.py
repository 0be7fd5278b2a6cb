"""Templates over a row: `{column}` is the row's field, `{{` and `}}` are braces."""

import json
import re
from collections.abc import Mapping
from typing import Any

_PIECE = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]|[^{}]+")


class Template:
    """A parsed template. Raises ValueError if the text is not one.

    A column's name is taken literally: dots, colons and brackets belong to it, nothing is looked up
    inside a value, and a value is never formatted.
    """

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
                escaped = piece * 2
                raise ValueError(f"{text!r} has a single {piece!r}; write {escaped!r} for a brace")
            else:
                self._pieces.append((piece[0] if piece in ("{{", "}}") else piece, None))

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns in the template, each once."""
        return tuple(dict.fromkeys(column for _, column in self._pieces if column is not None))

    def find_missing(self, values: Mapping[str, Any]) -> tuple[str, ...]:
        """Return the columns that a row lacks."""
        return tuple(column for column in self.columns if column not in values)

    def fill(self, values: Mapping[str, Any]) -> str:
        """Return the text for a row that has every column."""
        return "".join(
            literal if column is None else to_text(values[column]) for literal, column in self._pieces
        )


def to_text(value: Any) -> str:
    """Return a field as text: empty for null, JSON for anything but text."""
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
