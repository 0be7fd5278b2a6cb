"""Waits inside a request, for a run or for the next change. They end when the service stops."""

import asyncio
from collections.abc import AsyncIterator, Collection

from receiver.store import Database, queries
from receiver.store.changes import Change, Changes, Listener
from receiver.workers.loop import run_until

_READ_AGAIN_SECONDS = 5.0
"""Another process may commit a change that is not published here: the ledger is read this often."""


async def until_finished(
    database: Database,
    changes: Changes,
    stopping: asyncio.Event,
    run_id: str,
    *,
    handlers: Collection[str],
    timeout_seconds: float,
) -> bool | None:
    """Return True once the run is over and these handlers have no work left to do on it.

    Returns False if the time is over or the service stops, and None if there is no such run.
    """
    loop = asyncio.get_running_loop()
    deadline = loop.time() + timeout_seconds
    with changes.subscribe(run_id) as listener:
        while True:
            finished = await database.read(lambda tx: queries.is_finished(tx, run_id, handlers))
            left = deadline - loop.time()
            if finished is not False or left <= 0 or stopping.is_set():
                return finished
            await run_until(stopping, listener.next(), timeout=min(left, _READ_AGAIN_SECONDS))
            while not listener.changes.empty():
                listener.changes.get_nowait()


async def next_changes(
    listener: Listener, stopping: asyncio.Event, *, heartbeat_seconds: float
) -> AsyncIterator[Change | None]:
    """Yield changes in order, and None after each `heartbeat_seconds` without one."""
    while not stopping.is_set():
        yield await run_until(stopping, listener.next(), timeout=heartbeat_seconds)
