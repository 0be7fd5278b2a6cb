"""How many rows of a batch are in progress at once: halved by a 429, grown again by successes."""

import threading
import time
from collections.abc import Callable

from receiver.flora.rate_limit import AdaptiveLimit

_GROW_AFTER = 10
"""Rows that start without a 429 before the limit grows by one."""
_BURST_SECONDS = 5.0
"""Responses 429 within this time count as one."""


class ConcurrencyLimit:
    """A semaphore of at most `maximum` slots that adapts to FLORA's rate limit. Thread-safe.

    The service itself obeys FLORA's 429: the rate limit of an API key, shared by all its starts and
    polls, delays each call and reduces their number. A batch only has to avoid piling up rows
    behind it. So the limit halves when a start still waits behind a 429 after several seconds, or
    when the operations API itself responds with 429.
    """

    def __init__(self, maximum: int, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._limit = AdaptiveLimit(maximum, grow_after=_GROW_AFTER)
        self._used = 0
        self._halved_at: float | None = None
        self._clock = clock
        self._changed = threading.Condition()

    @property
    def limit(self) -> int:
        return self._limit.allowed

    def acquire(self) -> None:
        """Acquire a slot, waiting until one is free."""
        with self._changed:
            self._changed.wait_for(lambda: self._used < self._limit.allowed)
            self._used += 1

    def release(self) -> None:
        with self._changed:
            self._used -= 1
            self._changed.notify_all()

    def halve(self) -> None:
        """Halve the limit after a 429, once for each burst."""
        with self._changed:
            now = self._clock()
            is_repeat = self._halved_at is not None and now - self._halved_at < _BURST_SECONDS
            if not is_repeat:
                self._halved_at = now
            self._limit.count_refusal(is_repeat=is_repeat)

    def record_success(self) -> None:
        """Count a row that started without a 429; ten in a row raise the limit by one."""
        with self._changed:
            self._limit.count_success()
            self._changed.notify_all()
