"""When a body that was cut may be continued, and by which answer. Pure; for `receiver.download`."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from email.utils import parsedate_to_datetime

_PARTIAL = 206
_STRONG = re.compile(r'"[\x21\x23-\x7e]*"')
_CONTENT_RANGE = re.compile(r"bytes (\d{1,19})-(\d{1,19})/(\d{1,19})", re.IGNORECASE)
_SETTLED = timedelta(seconds=60)


@dataclass(frozen=True, slots=True)
class ResumableBody:
    """A body that its server would send in parts: its length in bytes, and what tells that it is still the same one."""

    length: int
    validator: str

    def range_headers(self, offset: int) -> dict[str, str]:
        """Return the headers that ask for the rest."""
        return {"Range": f"bytes={offset}-", "If-Range": self.validator}

    def is_continued_by(self, status: int, headers: Mapping[str, str], offset: int) -> bool:
        """Whether an answer is exactly the rest of this body."""
        told = _CONTENT_RANGE.fullmatch(headers.get("content-range", "").strip())
        if status != _PARTIAL or told is None:
            return False
        first, last, length = (int(number) for number in told.groups())
        etag = headers.get("etag", "").strip()
        same = not self.validator.startswith('"') or etag in {"", self.validator}
        return same and (first, last, length) == (offset, self.length - 1, self.length)


def parse_resumable(headers: Mapping[str, str]) -> ResumableBody | None:
    """Read from a complete answer how it may be continued; None where it may not."""
    units = {unit.strip().lower() for unit in headers.get("accept-ranges", "").split(",")}
    length = headers.get("content-length", "")
    validator = _validator(headers)
    if "bytes" not in units or not length.isdecimal() or "transfer-encoding" in headers or validator is None:
        return None
    return ResumableBody(int(length), validator)


def _validator(headers: Mapping[str, str]) -> str | None:
    """Choose a strong validator: such an ETag, or a date of change that was long past when it was sent."""
    etag = headers.get("etag", "").strip()
    if etag:
        return etag if _STRONG.fullmatch(etag) else None
    modified = headers.get("last-modified", "").strip()
    try:
        settled = parsedate_to_datetime(headers.get("date", "")) - parsedate_to_datetime(modified) >= _SETTLED
    except (ValueError, TypeError):
        return None
    return modified if settled else None
