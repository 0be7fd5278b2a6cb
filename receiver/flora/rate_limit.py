"""How many calls to FLORA may run at once. One budget per API key, shared by starts and polls; it obeys 429."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta

_GROW_AFTER = 20
"""Good answers in a row after which one more call may run at once: halving is quick, recovery slow."""
_LONGEST_HOLD = timedelta(hours=1)


class RateLimit:
    """At most `limit` calls at once, fewer after a 429; none at all until a hold is over."""

    def __init__(self, limit: int = 8, *, clock: Callable[[], datetime] = lambda: datetime.now(UTC)) -> None:
        self._limit = limit
        self._allowed = limit
        self._running = 0
        self._good = 0
        self._held_until: datetime | None = None
        self._clock = clock
        self._freed = asyncio.Condition()

    @property
    def allowed(self) -> int:
        """Calls that may run at once now."""
        return self._allowed

    @property
    def free(self) -> int:
        """Calls that could begin now."""
        return 0 if self.held_seconds > 0 else max(0, self._allowed - self._running)

    @property
    def held_seconds(self) -> float:
        """How long no call may begin; 0 when calls may."""
        if self._held_until is None:
            return 0.0
        left = self._held_until - self._clock()
        # A clock that jumped back must not hold us for longer than anything ever is.
        return max(0.0, left.total_seconds()) if left <= _LONGEST_HOLD else 0.0

    @asynccontextmanager
    async def call(self) -> AsyncIterator[None]:
        """Wait for room, then hold it inside the block."""
        while True:
            if (hold := self.held_seconds) > 0:
                await asyncio.sleep(hold)
                continue
            async with self._freed:
                if self._running < self._allowed:
                    self._running += 1
                    break
                await self._freed.wait()
        try:
            yield
        finally:
            async with self._freed:
                self._running -= 1
                self._freed.notify_all()

    def went_well(self) -> None:
        """FLORA answered: after a while, allow one call more."""
        self._good += 1
        if self._good >= _GROW_AFTER and self._allowed < self._limit:
            self._good = 0
            self._allowed += 1

    def limited(self, seconds: float) -> None:
        """FLORA said 429: hold still for `seconds`, then go on with half as many calls at once."""
        if self.held_seconds <= 0:  # one burst is answered with many 429s: it counts once
            self._allowed = max(1, self._allowed // 2)
        self._good = 0
        self.hold(seconds)

    def hold(self, seconds: float) -> None:
        """Let no call begin for `seconds`."""
        if self.held_seconds < seconds:  # what a clock that jumped back has left behind counts for nothing there
            self._held_until = self._clock() + timedelta(seconds=min(seconds, _LONGEST_HOLD.total_seconds()))
