"""Retries of calls to the running service, which may restart in the middle of a batch."""

import time
from collections.abc import Callable
from http import HTTPStatus
from typing import TypeVar

from receiver.errors import ReceiverApiError

T = TypeVar("T")

_PAUSES_SECONDS = (0.2, 0.5, 1.0, 2.0)
"""Pauses before the retries of a call; the last one repeats."""


def is_transient(error: ReceiverApiError) -> bool:
    """Return whether the same call may succeed later, once the service or its database is back."""
    if error.status == HTTPStatus.BAD_GATEWAY:
        # The service passes on a refusal by FLORA that a caller cannot fix; others are a proxy's.
        return error.code == "not_a_receiver"
    return error.status is None or error.status == HTTPStatus.TOO_MANY_REQUESTS or error.status >= 500


def call_with_retries(call: Callable[[], T], *, seconds: float) -> T:
    """Return the result of `call`; retry transient errors for `seconds`, then raise the last."""
    until, failures = time.monotonic() + seconds, 0
    while True:
        try:
            return call()
        except ReceiverApiError as error:
            if not is_transient(error) or time.monotonic() >= until:
                raise
        time.sleep(pause_seconds(failures))
        failures += 1


def pause_seconds(failures: int) -> float:
    """Return the pause before the next retry, after this many failures."""
    return _PAUSES_SECONDS[min(failures, len(_PAUSES_SECONDS) - 1)]
