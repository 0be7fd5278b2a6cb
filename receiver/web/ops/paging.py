"""Lists that are paged by a row's own sequence, newest first."""

from collections.abc import Mapping, Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from receiver.web.ops import requests as bodies
from receiver.web.ops.responses import answered


def sequence_of(request: Request) -> int | None:
    """Return the sequence in `?cursor=`."""
    before = bodies.cursor_of(request)
    if before is None:
        return None
    number, identifier = before
    if identifier:
        raise bodies.wrong("cursor", "is a cursor of another list")
    return number


def page_of(name: str, rows: Sequence[tuple[int, Mapping[str, Any]]], limit: int) -> Response:
    """Answer a page; a full one has a cursor to the next."""
    cursor = bodies.cursor(rows[-1][0]) if len(rows) == limit else None
    return answered({name: [row for _, row in rows], "next_cursor": cursor})
