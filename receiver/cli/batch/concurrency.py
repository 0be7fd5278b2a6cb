"""How many rows are in hand at once: halved when FLORA limits us, one more again after a row of good answers."""

import threading
import time
from collections.abc import Callable

_GROW_AFTER = 10
"""Good rows in a row after which one more may be in hand."""
_ONE_BURST_SECONDS = 5.0
"""Refusals this close together are one burst, and count once."""


class ConcurrencyLimit:
    """Room for at most `limit` rows at once. For several threads.

    FLORA's 429 is obeyed by the service: its budget, shared by all starts and polls of an API key, holds every call and
    halves how many run at once. What is left for a batch is not to pile up rows in front of that budget. So rows in hand
    halve when a start is still waiting behind a 429 after several seconds, or when the operations API itself says 429.
    """

    def __init__(self, limit: int, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._limit = limit
        self._allowed = limit
        self._taken = 0
        self._good = 0
        self._limited_at: float | None = None
        self._clock = clock
        self._freed = threading.Condition()

    @property
    def allowed(self) -> int:
        return self._allowed

    @property
    def taken(self) -> int:
        return self._taken

    def enter(self) -> None:
        """Wait for room and take it."""
        with self._freed:
            self._freed.wait_for(lambda: self._taken < self._allowed)
            self._taken += 1

    def leave(self) -> None:
        with self._freed:
            self._taken -= 1
            self._freed.notify_all()

    def limited(self) -> None:
        """Halve the room, once for each burst."""
        with self._freed:
            now = self._clock()
            if self._limited_at is None or now - self._limited_at >= _ONE_BURST_SECONDS:
                self._limited_at = now
                self._allowed = max(1, self._allowed // 2)
            self._good = 0

    def went_well(self) -> None:
        """Count a row that was started without trouble; after ten of them, make room for one more."""
        with self._freed:
            self._good += 1
            if self._good >= _GROW_AFTER and self._allowed < self._limit:
                self._good = 0
                self._allowed += 1
                self._freed.notify_all()
