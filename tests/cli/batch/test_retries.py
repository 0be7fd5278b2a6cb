"""Retries of calls to the service: transient errors only, and only for a while."""

import pytest

from receiver.cli.batch.retries import call_with_retries, is_transient
from receiver.errors import ReceiverApiError


@pytest.mark.parametrize(
    ("status", "code", "expected"),
    [
        (None, "unreachable", True),
        (503, "flora_rate_limited", True),
        (500, "internal_error", True),
        (429, "rate_limited", True),
        (502, "not_a_receiver", True),
        (502, "flora_unauthorized", False),
        (401, "unauthorized", False),
        (404, "not_found", False),
        (409, "unknown_outcome", False),
    ],
)
def test_transient_errors_are_retried(status: int | None, code: str, expected: bool) -> None:
    assert is_transient(ReceiverApiError("x", status=status, code=code)) is expected


def test_a_lasting_error_is_not_retried() -> None:
    def refuse() -> None:
        raise ReceiverApiError("no", status=404, code="not_found")

    with pytest.raises(ReceiverApiError):
        call_with_retries(refuse, seconds=60)
    results = iter([ReceiverApiError("gone", code="unreachable"), None])

    def succeed_later() -> str:
        if (error := next(results)) is not None:
            raise error
        return "here"

    assert call_with_retries(succeed_later, seconds=60) == "here"
