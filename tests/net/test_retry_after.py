"""`Retry-After` in every form that servers send, and what becomes of it."""

from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import httpx
import pytest

from receiver.net.retry_after import LONGEST_SECONDS, growing_pause, parse_retry_after

NOW = datetime(2026, 11, 24, 12, 0, tzinfo=UTC)


def http_date(**ahead: float) -> str:
    return format_datetime(NOW + timedelta(**ahead), usegmt=True)


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("7", 7.0),
        (" 120 ", 120.0),
        ("0", 0.0),
        ("0.5", 0.5),
        ("3601", LONGEST_SECONDS),
        ("9" * 5000, None),
        ("9" * 400, LONGEST_SECONDS),
        ("-5", None),
        ("1e4", None),
        ("nan", None),
        ("inf", None),
        ("1_0", None),
        ("\u0667", None),
        ("soon", None),
        ("", None),
        (http_date(seconds=90), 90.0),
        ("Tue, 24 Nov 2026 12:00:30 -0000", 30.0),
        ("Tuesday, 24-Nov-26 12:00:30 GMT", 30.0),
        ("Tue Nov 24 12:00:30 2026", 30.0),
        (http_date(days=400), LONGEST_SECONDS),
        (http_date(seconds=0), None),
        (http_date(days=-1), None),
        ("Tue, 99 Nov 2026 99:00:00 GMT", None),
        ("Fri, 31 Dec 9999 23:59:59 -2359", None),
    ],
)
def test_seconds_and_dates_are_read_and_capped(value: str, seconds: float | None) -> None:
    """Malformed and past values count as none, and nothing is longer than an hour."""
    assert parse_retry_after({"retry-after": value}, NOW) == seconds
    assert parse_retry_after(httpx.Headers([(b"Retry-After", value.encode())]), NOW) == seconds


def test_no_header_names_no_pause() -> None:
    assert parse_retry_after({}, NOW) is None


@pytest.mark.parametrize("skew", [{"days": 3}, {"days": -3}])
def test_a_date_counts_from_the_date_of_the_response(skew: dict[str, float]) -> None:
    """Where the server's clock or ours is wrong, both of its dates are wrong alike."""
    until = format_datetime(NOW + timedelta(**skew) + timedelta(seconds=40), usegmt=True)
    headers = {"retry-after": until, "date": http_date(**skew)}
    assert parse_retry_after(headers, NOW) == 40.0
    assert parse_retry_after({**headers, "retry-after": "40"}, NOW) == 40.0


@pytest.mark.parametrize(
    ("asked", "attempt", "pause"),
    [
        (None, 5, None),
        (0.0, 5, None),
        (30.0, 1, 30.0),
        (1.0, 1, 1.0),
        (1.0, 9, 256.0),
        (1.0, 99, 2048.0),
        (9e9, 1, 3600.0),
    ],
)
def test_short_pauses_grow_with_the_attempts(
    asked: float | None, attempt: int, pause: float | None
) -> None:
    """A server that always asks for a second must not use up twelve attempts in twelve seconds."""
    assert growing_pause(asked, attempt) == pause
