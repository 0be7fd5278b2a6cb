"""When a body that was cut may be resumed, and by which response.

Pure; for `receiver.net.download`.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from email.utils import parsedate_to_datetime
from http import HTTPStatus

_STRONG = re.compile(r'"[\x21\x23-\x7e]*"')
_CONTENT_RANGE = re.compile(r"bytes (\d{1,19})-(\d{1,19})/(\d{1,19})", re.IGNORECASE)
_MIN_AGE = timedelta(seconds=60)
"""A younger date of change may stand for two versions: dates have whole seconds."""


@dataclass(frozen=True, slots=True)
class ResumableBody:
    """A body that its server also sends in parts."""

    length: int
    """In bytes."""
    validator: str
    """The ETag or the date of change that identifies this body."""
    coding: str = ""
    """Its `Content-Encoding`."""

    def range_headers(self, offset: int) -> dict[str, str]:
        """Return the headers of a request for the rest from `offset`."""
        return {"Range": f"bytes={offset}-", "If-Range": self.validator}

    def is_continued_by(self, status: int, headers: Mapping[str, str], offset: int) -> bool:
        """Return whether a response is exactly the rest of this body from `offset`."""
        content_range = _CONTENT_RANGE.fullmatch(headers.get("content-range", "").strip())
        if status != HTTPStatus.PARTIAL_CONTENT or content_range is None:
            return False
        first, last, length = (int(number) for number in content_range.groups())
        etag = headers.get("etag", "").strip()
        is_same = not self.validator.startswith('"') or etag in {"", self.validator}
        is_same = is_same and headers.get("content-encoding", "") in {"", self.coding}
        return is_same and (first, last, length) == (offset, self.length - 1, self.length)


def parse_resumable(headers: Mapping[str, str]) -> ResumableBody | None:
    """Return how the body of a complete response can be resumed, or None where it cannot."""
    units = {unit.strip().lower() for unit in headers.get("accept-ranges", "").split(",")}
    length = headers.get("content-length", "")
    validator = _validator(headers)
    if (
        "bytes" not in units
        or not length.isdecimal()
        or "transfer-encoding" in headers
        or validator is None
    ):
        return None
    return ResumableBody(int(length), validator, headers.get("content-encoding", ""))


def _validator(headers: Mapping[str, str]) -> str | None:
    """Return a strong validator, or None.

    It is a strong ETag, or a date of change at least a minute before the response.
    """
    etag = headers.get("etag", "").strip()
    if etag:
        return etag if _STRONG.fullmatch(etag) else None
    modified = headers.get("last-modified", "").strip()
    try:
        age = parsedate_to_datetime(headers.get("date", "")) - parsedate_to_datetime(modified)
    except (ValueError, TypeError):
        return None
    return modified if age >= _MIN_AGE else None
