"""How many calls run at once: halved by a 429, slowly more after good answers, none during a hold."""

import asyncio
import contextlib
from datetime import timedelta

import pytest

from receiver.flora.rate_limit import RateLimit
from tests.support.core import Clock


@pytest.fixture
def budget(clock: Clock) -> RateLimit:
    return RateLimit(8, clock=clock)


async def turn() -> None:
    """Let everything that can go on go on."""
    for _ in range(20):
        await asyncio.sleep(0)


class Callers:
    """Calls that are begun and wait to be told to end."""

    def __init__(self, budget: RateLimit) -> None:
        self._budget = budget
        self.running: list[asyncio.Event] = []
        self.tasks: list[asyncio.Task[None]] = []

    async def _call(self) -> None:
        async with self._budget.call():
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


async def test_no_more_calls_run_at_once_than_allowed(budget: RateLimit) -> None:
    callers = Callers(budget)
    await callers.begin(12)
    assert (len(callers.running), budget.free) == (8, 0)
    await callers.end(3)
    assert len(callers.running) == 8
    await callers.end(8)
    assert len(callers.running) == 1
    assert budget.free == 7
    await callers.stop()
    assert budget.free == 8


async def test_a_call_that_fails_gives_its_place_back(budget: RateLimit) -> None:
    with contextlib.suppress(ZeroDivisionError):
        async with budget.call():
            raise ZeroDivisionError
    assert budget.free == 8


async def test_a_caller_that_leaves_while_waiting_takes_no_place(budget: RateLimit) -> None:
    callers = Callers(budget)
    await callers.begin(9)
    callers.tasks[-1].cancel()
    await turn()
    await callers.end(8)
    assert budget.free == 8
    await callers.stop()


def test_a_429_halves_and_holds(budget: RateLimit, clock: Clock) -> None:
    budget.limited(7)
    assert (budget.allowed, budget.free, budget.held_seconds) == (4, 0, 7.0)
    clock.forward(7)
    assert (budget.allowed, budget.free, budget.held_seconds) == (4, 4, 0.0)


def test_a_burst_of_429s_counts_once_and_the_longest_hold_stands(budget: RateLimit) -> None:
    """Eight calls were on their way when the limit struck: all of them are refused."""
    for seconds in (5, 9, 2, 5):
        budget.limited(seconds)
    assert (budget.allowed, budget.held_seconds) == (4, 9.0)


def test_there_is_always_one_call_left(budget: RateLimit, clock: Clock) -> None:
    for _ in range(6):
        budget.limited(1)
        clock.forward(2)
    assert budget.allowed == 1


def test_recovery_is_slow_and_ends_at_the_limit(budget: RateLimit, clock: Clock) -> None:
    """Twenty good answers for each call more; a 429 in between starts the count anew."""
    budget.limited(1)
    clock.forward(2)
    for _ in range(19):
        budget.went_well()
    assert budget.allowed == 4
    budget.went_well()
    assert budget.allowed == 5
    for _ in range(15):
        budget.went_well()
    budget.limited(1)
    clock.forward(2)
    assert budget.allowed == 2
    for _ in range(19):
        budget.went_well()
    assert budget.allowed == 2
    for _ in range(1000):
        budget.went_well()
    assert budget.allowed == 8


def test_a_hold_alone_halves_nothing(budget: RateLimit, clock: Clock) -> None:
    budget.hold(60)
    assert (budget.allowed, budget.free) == (8, 0)
    clock.forward(61)
    assert budget.free == 8


def test_no_hold_is_longer_than_an_hour(budget: RateLimit) -> None:
    """FLORA's `retry-after` may be anything."""
    budget.limited(10**8)
    assert budget.held_seconds == 3600


def test_a_clock_that_jumps_back_ends_a_hold(budget: RateLimit, clock: Clock) -> None:
    budget.hold(60)
    clock.now -= timedelta(days=1)
    assert budget.held_seconds == 0
