"""A worker ticks until it is stopped; waits end at once with what they wait for."""

import asyncio

import pytest

from receiver.errors import StoreUnavailableError
from receiver.workers.loop import run_loop, run_until, wait_for_any
from tests.support.patience import PATIENCE_SECONDS


async def test_a_worker_ticks_until_it_is_stopped() -> None:
    """The pause ends early when it is woken, and the loop ends although its pause has not."""
    stopping, wake, ticks = asyncio.Event(), asyncio.Event(), 0

    async def tick() -> float:
        nonlocal ticks
        ticks += 1
        (wake if ticks < 3 else stopping).set()
        return 3600.0

    async with asyncio.timeout(PATIENCE_SECONDS):
        await run_loop("test", tick, stopping, wake=wake)
    assert ticks == 3


async def test_a_database_that_is_unavailable_is_tried_again() -> None:
    stopping, ticks = asyncio.Event(), 0

    async def tick() -> float:
        nonlocal ticks
        ticks += 1
        if ticks < 3:
            raise StoreUnavailableError("read-only")
        stopping.set()
        return 0.0

    async with asyncio.timeout(PATIENCE_SECONDS):
        await run_loop("test", tick, stopping, retry_seconds=0.0)
    assert ticks == 3


async def test_a_bug_ends_the_loop() -> None:
    async def tick() -> float:
        raise KeyError("mine")

    with pytest.raises(KeyError):
        await run_loop("test", tick, asyncio.Event())


async def test_a_wait_ends_with_its_first_event_and_cancels_no_future() -> None:
    future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    event = asyncio.Event()
    event.set()
    async with asyncio.timeout(PATIENCE_SECONDS):
        await wait_for_any(future, event)
        await wait_for_any(future, timeout=0.0)
        assert not future.done()
        future.set_result(None)
        await wait_for_any(future, asyncio.Event())


async def test_work_is_cancelled_when_the_service_stops() -> None:
    """It has ended by the time that its caller goes on."""
    stopping, has_ended = asyncio.Event(), False

    async def work() -> int:
        nonlocal has_ended
        stopping.set()
        try:
            await asyncio.Event().wait()
        finally:
            has_ended = True
        return 1

    assert await run_until(stopping, work()) is None
    assert has_ended


async def test_work_that_ends_in_time_gives_its_result() -> None:
    async def work() -> int:
        return 7

    assert await run_until(asyncio.Event(), work()) == 7
    assert await run_until(asyncio.Event(), asyncio.Event().wait(), timeout=0.0) is None
