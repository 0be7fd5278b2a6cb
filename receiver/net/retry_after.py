"""`Retry-After`: the pause that a server asks for, read the same way wherever it is met. Pure.

For the API client, downloads and posts. The pause is capped here, so that no log line, response or
row ever has an absurd one.
"""

import re
from collections.abc import Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

__all__ = ["LONGEST_SECONDS", "growing_pause", "parse_retry_after"]

LONGEST_SECONDS = 3600.0
"""A longer pause is read as this one."""
_SECONDS = re.compile(r"\d{1,4000}(\.\d{1,4000})?", re.ASCII)


def parse_retry_after(headers: Mapping[str, str], now: datetime) -> float | None:
    """Return the seconds that a response asks to wait, at most `LONGEST_SECONDS`.

    The header has seconds, also with a fraction, or an HTTP date. A date counts from the `Date` of
    the same response where it has one, so that it does not matter whose clock is wrong. None stands
    for no header, a malformed one, or a date that is over.
    """
    value = headers.get("retry-after", "").strip()
    if _SECONDS.fullmatch(value):
        return min(float(value), LONGEST_SECONDS)
    until = _parse_date(value)
    if until is None:
        return None
    seconds = (until - (_parse_date(headers.get("date", "")) or now)).total_seconds()
    return min(seconds, LONGEST_SECONDS) if seconds > 0 else None


def growing_pause(retry_after_seconds: float | None, attempt: int) -> float | None:
    """Return the pause after attempt number `attempt` that a server asked for, in seconds.

    It is at least 1, 2, 4 … seconds, so that a server which always asks for a short one does not
    use up the attempts. None, or 0, is returned as None: the pauses of the settings apply.
    """
    if not retry_after_seconds:
        return None
    return min(max(retry_after_seconds, 2.0 ** min(max(attempt - 1, 0), 11)), LONGEST_SECONDS)


def _parse_date(text: str) -> datetime | None:
    try:
        parsed = parsedate_to_datetime(text)
        return parsed.replace(tzinfo=UTC) if parsed.tzinfo is None else parsed.astimezone(UTC)
    except (ValueError, TypeError, IndexError, OverflowError):
        return None
