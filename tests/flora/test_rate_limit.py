"""The limit of requests in flight.

Half as many after a 429, slowly more after successes, none during a hold.
"""

import asyncio
import contextlib
from datetime import timedelta

import pytest

from receiver.errors import FloraError
from receiver.flora.rate_limit import Hold, RateLimit
from tests.support.core import Clock


@pytest.fixture
def limit(clock: Clock) -> RateLimit:
    return RateLimit(8, clock=clock)


async def turn() -> None:
    """Let everything that can go on go on."""
    for _ in range(20):
        await asyncio.sleep(0)


class Callers:
    """Calls that are begun and wait to be told to end."""

    def __init__(self, limit: RateLimit) -> None:
        self._limit = limit
        self.running: list[asyncio.Event] = []
        self.tasks: list[asyncio.Task[None]] = []

    async def _call(self) -> None:
        async with self._limit.request():
            ended = asyncio.Event()
            self.running.append(ended)
            await ended.wait()
            self.running.remove(ended)

    async def begin(self, count: int) -> None:
        self.tasks += [asyncio.create_task(self._call()) for _ in range(count)]
        await turn()

    async def end(self, count: int) -> None:
        for ended in self.running[:count]:
            ended.set()
        await turn()

    async def stop(self) -> None:
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)


async def test_no_more_calls_run_at_once_than_allowed(limit: RateLimit) -> None:
    callers = Callers(limit)
    await callers.begin(12)
    assert (len(callers.running), limit.free_slots) == (8, 0)
    await callers.end(3)
    assert len(callers.running) == 8
    await callers.end(8)
    assert len(callers.running) == 1
    assert limit.free_slots == 7
    await callers.stop()
    assert limit.free_slots == 8


async def test_a_request_that_fails_frees_its_slot(limit: RateLimit) -> None:
    with contextlib.suppress(ZeroDivisionError):
        async with limit.request():
            raise ZeroDivisionError
    assert limit.free_slots == 8


@pytest.mark.parametrize(("retry_after", "seconds"), [(None, 5.0), (7.0, 7.0), (0.0, 0.0)])
async def test_a_429_of_a_request_halves_and_holds(
    limit: RateLimit, retry_after: float | None, seconds: float
) -> None:
    """For as long as FLORA names, else for five seconds; the error goes on to the caller."""
    with pytest.raises(FloraError):
        async with limit.request():
            raise FloraError("slow down", status=429, retry_after=retry_after)
    assert (limit.allowed, limit.held_seconds) == (4, seconds)


async def test_another_error_of_a_request_is_no_reason_to_slow_down(limit: RateLimit) -> None:
    with pytest.raises(FloraError):
        async with limit.request():
            raise FloraError("broken", status=500, retry_after=9)
    assert (limit.allowed, limit.held_seconds) == (8, 0.0)


async def test_a_caller_that_leaves_while_waiting_takes_no_place(limit: RateLimit) -> None:
    callers = Callers(limit)
    await callers.begin(9)
    callers.tasks[-1].cancel()
    await turn()
    await callers.end(8)
    assert limit.free_slots == 8
    await callers.stop()


def test_a_429_halves_and_holds(limit: RateLimit, clock: Clock) -> None:
    limit.slow_down(7)
    assert (limit.allowed, limit.free_slots, limit.held_seconds) == (4, 0, 7.0)
    clock.forward(7)
    assert (limit.allowed, limit.free_slots, limit.held_seconds) == (4, 4, 0.0)


def test_a_burst_of_429s_counts_once_and_the_longest_hold_stands(limit: RateLimit) -> None:
    """Eight calls were on their way when the limit struck: all of them are refused."""
    for seconds in (5, 9, 2, 5):
        limit.slow_down(seconds)
    assert (limit.allowed, limit.held_seconds) == (4, 9.0)


def test_there_is_always_one_call_left(limit: RateLimit, clock: Clock) -> None:
    for _ in range(6):
        limit.slow_down(1)
        clock.forward(2)
    assert limit.allowed == 1


async def test_recovery_is_slow_and_ends_at_the_limit(limit: RateLimit, clock: Clock) -> None:
    """Twenty successes for each further request; a 429 in between starts the count anew."""

    async def succeed(times: int) -> None:
        for _ in range(times):
            async with limit.request():
                pass

    limit.slow_down(1)
    clock.forward(2)
    await succeed(19)
    assert limit.allowed == 4
    await succeed(1)
    assert limit.allowed == 5
    await succeed(15)
    limit.slow_down(1)
    clock.forward(2)
    assert limit.allowed == 2
    await succeed(19)
    assert limit.allowed == 2
    await succeed(1000)
    assert limit.allowed == 8


def test_no_hold_is_longer_than_an_hour(limit: RateLimit) -> None:
    """FLORA's `retry-after` may be anything."""
    limit.slow_down(10**8)
    assert limit.held_seconds == 3600


def test_the_longer_hold_stands(clock: Clock) -> None:
    hold = Hold(clock)
    for seconds in (5, 9, 2):
        hold.extend(seconds)
    assert hold.seconds_left == 9
    clock.forward(9)
    assert hold.seconds_left == 0


def test_a_clock_that_jumps_back_ends_a_hold(clock: Clock) -> None:
    """Then a new hold counts from the time that it is now."""
    hold = Hold(clock)
    hold.extend(60)
    clock.now -= timedelta(days=1)
    assert hold.seconds_left == 0
    hold.extend(7)
    assert hold.seconds_left == 7
