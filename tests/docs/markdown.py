"""Pieces of Markdown."""

import re
from collections.abc import Iterable


def to_table(head: str, rows: Iterable[Iterable[str]]) -> str:
    """Return a table of Markdown. `head` names its columns, separated by ` | `."""
    columns = head.split(" | ")
    lines = [f"| {head} |", f"|{'---|' * len(columns)}"]
    lines += ["| " + " | ".join(_cell(each) for each in row) + " |" for row in rows]
    return "\n".join(line.replace("|  |", "| |").replace("|  |", "| |") for line in lines)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", r"\|")


def to_code(text: str) -> str:
    return f"`{text}`" if text else "–"


def to_anchor(heading: str) -> str:
    """Return a heading's anchor as GitHub makes it."""
    return re.sub(r"[^a-z0-9 _-]", "", heading.lower()).replace(" ", "-")
