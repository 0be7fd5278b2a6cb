"""How many requests one API key may have in flight, and when the next may start.

Owned by `FloraClient`.

A 429 halves the number of requests in flight and holds all of them for a while; successes raise it
again, one by one.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta

from receiver.errors import FloraError

_GROW_AFTER = 20
_DEFAULT_PAUSE_SECONDS = 5.0
"""Pause after a 429 that names none (FLORA contract, section 4)."""
_LONGEST_HOLD = timedelta(hours=1)


class AdaptiveLimit:
    """A number of slots that each refusal halves.

    `grow_after` successes in a row raise it by one.
    """

    def __init__(self, maximum: int, *, grow_after: int) -> None:
        self._maximum = maximum
        self._grow_after = grow_after
        self._successes = 0
        self.allowed = maximum

    def count_success(self) -> None:
        self._successes += 1
        if self._successes >= self._grow_after and self.allowed < self._maximum:
            self._successes = 0
            self.allowed += 1

    def count_refusal(self, *, is_repeat: bool) -> None:
        """Halve the limit.

        `is_repeat`: the refusal belongs to a burst that has halved it already.
        """
        self._successes = 0
        if not is_repeat:
            self.allowed = max(1, self.allowed // 2)


class Hold:
    """A pause of at most an hour. It is over at once if the clock jumps back by more than that."""

    def __init__(self, clock: Callable[[], datetime]) -> None:
        self._clock = clock
        self._until: datetime | None = None

    @property
    def seconds_left(self) -> float:
        if self._until is None:
            return 0.0
        left = self._until - self._clock()
        return max(0.0, left.total_seconds()) if left <= _LONGEST_HOLD else 0.0

    def extend(self, seconds: float) -> None:
        """Pause for `seconds` from now, unless the current pause is longer."""
        if self.seconds_left < seconds:
            self._until = self._clock() + timedelta(seconds=min(seconds, _LONGEST_HOLD.total_seconds()))


class RateLimit:
    """The requests of one API key: `limit` in flight, fewer after a 429, none during its pause."""

    def __init__(self, limit: int, *, clock: Callable[[], datetime] = lambda: datetime.now(UTC)) -> None:
        self._limit = AdaptiveLimit(limit, grow_after=_GROW_AFTER)
        self._hold = Hold(clock)
        self._in_flight = 0
        self._freed = asyncio.Condition()

    @property
    def allowed(self) -> int:
        """How many requests may be in flight now."""
        return self._limit.allowed

    @property
    def free_slots(self) -> int:
        """How many requests could start now."""
        return 0 if self.held_seconds > 0 else max(0, self.allowed - self._in_flight)

    @property
    def held_seconds(self) -> float:
        """Seconds until a request may start; 0 if one may now."""
        return self._hold.seconds_left

    @asynccontextmanager
    async def request(self) -> AsyncIterator[None]:
        """Wait for a slot and hold it inside the block.

        A FloraError that leaves it with status 429 slows down.
        """
        await self._acquire()
        try:
            yield
            self._limit.count_success()
        except FloraError as error:
            if error.status == 429:
                self.slow_down(pause_after(error))
            raise
        finally:
            async with self._freed:
                self._in_flight -= 1
                self._freed.notify_all()

    def slow_down(self, seconds: float) -> None:
        """Start no request for `seconds`, and then half as many at once.

        A burst of 429s counts once.
        """
        self._limit.count_refusal(is_repeat=self.held_seconds > 0)
        self._hold.extend(seconds)

    async def _acquire(self) -> None:
        while True:
            if (seconds := self.held_seconds) > 0:
                await asyncio.sleep(seconds)
                continue
            async with self._freed:
                if self._in_flight < self.allowed:
                    self._in_flight += 1
                    return
                await self._freed.wait()


def pause_after(error: FloraError) -> float:
    """Return for how many seconds to send nothing after a 429."""
    return _DEFAULT_PAUSE_SECONDS if error.retry_after is None else error.retry_after
