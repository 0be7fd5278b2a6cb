"""Waiting inside a request: for a run, for an answer of FLORA, for the next change. Every wait ends with the service."""

import asyncio
from collections.abc import AsyncIterator, Collection, Coroutine
from typing import Any, TypeVar

from receiver.store import Database, queries
from receiver.store.changes import Change, Changes, Listener
from receiver.workers.loop import run_until

T = TypeVar("T")

_LOOK_AGAIN_SECONDS = 5.0
"""A change that another process committed is not told here: look at the ledger now and then."""


async def unless_stopped(
    work: Coroutine[Any, Any, T], stopping: asyncio.Event, *, seconds: float | None = None
) -> T | None:
    """Return what `work` returns, or None once the service stops or the time is over."""
    return await run_until(stopping, work, timeout=seconds)


async def until_finished(
    database: Database,
    changes: Changes,
    stopping: asyncio.Event,
    run_id: str,
    *,
    handlers: Collection[str],
    timeout_seconds: float,
) -> bool | None:
    """Return True once the run and these handlers' work on it are over, False when time or service ended first.

    None: there is no such run.
    """
    loop = asyncio.get_running_loop()
    deadline = loop.time() + timeout_seconds
    with changes.listening(run_id) as listener:
        while True:
            finished = await database.read(lambda tx: queries.is_finished(tx, run_id, handlers))
            left = deadline - loop.time()
            if finished is not False or left <= 0 or stopping.is_set():
                return finished
            await unless_stopped(listener.next(), stopping, seconds=min(left, _LOOK_AGAIN_SECONDS))
            _skip(listener)


async def changes_of(
    listener: Listener, stopping: asyncio.Event, *, heartbeat_seconds: float
) -> AsyncIterator[Change | None]:
    """Give changes in order, None where nothing happened for a while; ends when the service stops."""
    while not stopping.is_set():
        yield await unless_stopped(listener.next(), stopping, seconds=heartbeat_seconds)


def _skip(listener: Listener) -> None:
    while not listener.changes.empty():
        listener.changes.get_nowait()
