"""How a worker runs: call `tick`, wait, call it again.

Used by every loop of the service, and by waits elsewhere.
"""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

import structlog

from receiver.errors import StoreUnavailableError

log = structlog.get_logger("receiver.workers")
T = TypeVar("T")

_IDLE_SECONDS = 5.0
_SHARED_IDLE_SECONDS = 1.0
"""Another process may commit work without waking this one."""


def idle_seconds(*, shared: bool) -> float:
    """Return the longest wait between two ticks.

    `shared`: other processes write to the database, too.
    """
    return _SHARED_IDLE_SECONDS if shared else _IDLE_SECONDS


async def run_loop(
    name: str,
    tick: Callable[[], Awaitable[float]],
    stopping: asyncio.Event,
    *,
    wake: asyncio.Event | None = None,
    retry_seconds: float = _IDLE_SECONDS,
) -> None:
    """Call `tick` until `stopping` is set.

    It returns the seconds until the next call; `wake` cuts the wait short.

    While the database is unavailable, `tick` is called every `retry_seconds`. Any other exception
    ends the loop.
    """
    wake = wake or asyncio.Event()
    while not stopping.is_set():
        wake.clear()
        try:
            pause = await tick()
        except StoreUnavailableError as error:
            log.error("worker.store_unavailable", worker=name, reason=str(error))
            pause = retry_seconds
        await wait_for_any(wake, stopping, timeout=max(pause, 0.0))


async def wait_for_any(*waits: asyncio.Event | asyncio.Future[Any], timeout: float | None = None) -> None:
    """Wait for an event to be set or a future to be done, at most `timeout` seconds.

    Cancels none of the futures.
    """
    events = [asyncio.create_task(wait.wait()) for wait in waits if isinstance(wait, asyncio.Event)]
    futures = [wait for wait in waits if not isinstance(wait, asyncio.Event)]
    try:
        await asyncio.wait([*events, *futures], timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for event in events:
            event.cancel()


async def run_until(
    stopping: asyncio.Event, work: Coroutine[Any, Any, T], *, timeout: float | None = None
) -> T | None:
    """Return the result of `work`, or None once `stopping` is set or `timeout` seconds have passed.

    Work that is unfinished by then is cancelled, and has ended when this returns.
    """
    task = asyncio.create_task(work)
    try:
        await wait_for_any(task, stopping, timeout=timeout)
        return task.result() if task.done() else None
    finally:
        if not task.done():
            task.cancel()
            await asyncio.wait({task})
