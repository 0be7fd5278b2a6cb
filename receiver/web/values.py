"""What a value of a request may be: paths, queries and bodies of both listeners are checked here. Pure.

A value that no database stores, or that nothing of ours is as long as, is found before a statement or
another server gets it.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

from receiver.model import is_storable

LONGEST_ID = 200
LONGEST_KEY = 255
"""Characters of an idempotency key, as FLORA limits them."""
MOST_LEVELS = 100
"""Levels of arrays and objects in a body."""
_MOST = 2**63
_TOKEN = re.compile("[0-9a-f]{32}")


def find_problem(
    value: Any, name: str, *, longest: int | None = None, level: int = 0
) -> tuple[str, str] | None:
    """Return what makes a value unusable, as the name of the part at fault and a message; else None.

    `value` is a text or what JSON holds. A text has at most `longest` characters, if that is given.
    """
    match value:
        case str():
            problem = _problem_of_text(value, longest)
        case float() if not math.isfinite(value):
            problem = "is a number that is too large"
        case int() if not -_MOST <= value < _MOST:
            problem = "is an integer beyond 64 bits"
        case Mapping() | list() if level == MOST_LEVELS:
            problem = f"is nested deeper than {MOST_LEVELS} levels"
        case Mapping():
            if not all(map(is_storable, value)):
                problem = "has a key with NUL or half a surrogate pair in it"
            else:
                return _first_problem(value.items(), name, level)
        case list():
            return _first_problem(enumerate(value), name, level)
        case _:
            problem = None
    return None if problem is None else (name[:LONGEST_ID], problem)


def find_start_token(text: str | None) -> str | None:
    """Return the token of a start, or None for what is not one: the query of a callback is not signed."""
    return text if text is not None and _TOKEN.fullmatch(text) else None


def _first_problem(parts: Any, name: str, level: int) -> tuple[str, str] | None:
    for key, part in parts:
        inner = f"{name}.{key}" if name else str(key)
        if (found := find_problem(part, inner, level=level + 1)) is not None:
            return found
    return None


def _problem_of_text(text: str, longest: int | None) -> str | None:
    if not is_storable(text):
        return "has NUL or half a surrogate pair in it"
    if longest is not None and len(text) > longest:
        return f"has more than {longest} characters"
    return None
