"""Exchanges changes between the processes that share a database, by PostgreSQL's LISTEN and NOTIFY.

A notification only says where to look: the database itself is the truth. Changes that follow each
other closely share one NOTIFY, in a transaction of its own, so that no callback waits for it.
"""

import asyncio
import json
import secrets

import structlog

from receiver.store import Database
from receiver.store.changes import Change, Listener, Signals
from receiver.workers.loop import run_loop, run_until

log = structlog.get_logger("receiver.notifier")

_GATHER_SECONDS = 0.02
_MAX_CHANGES = 40
"""Changes in one NOTIFY. Of a longer list, the other processes learn only that there is one."""
_MAX_BYTES = 7_500
"""Of one NOTIFY; PostgreSQL accepts 8,000."""
_RETRY_SECONDS = 1.0


class ChangeNotifier:
    """Sends the changes of this process (`run`) and receives those of others (`listen`)."""

    def __init__(self, database: Database, signals: Signals) -> None:
        self._database = database
        self._signals = signals
        self._process_id = secrets.token_hex(4)

    async def run(self, stopping: asyncio.Event) -> None:
        """Send every change of this process until `stopping` is set."""
        with self._signals.changes.subscribe(own_only=True) as listener:
            while not stopping.is_set():
                changes = await _gather(listener, stopping)
                if changes:
                    await self._database.notify(_to_notice(self._process_id, changes))

    async def listen(self, stopping: asyncio.Event) -> None:
        """Receive changes of other processes until `stopping` is set, over any reconnects."""

        async def tick() -> float:
            await run_until(stopping, self._receive())
            return _RETRY_SECONDS

        await run_loop("listener", tick, stopping, retry_seconds=_RETRY_SECONDS)

    async def _receive(self) -> None:
        async for notice in self._database.notices():
            self._apply(notice)

    def _apply(self, notice: str) -> None:
        """Wake the loops and publish the changes of a notice.

        The empty one after a reconnect only wakes.
        """
        try:
            message = json.loads(notice) if notice else {"by": "", "changes": []}
            if message["by"] == self._process_id:
                return
            changes = [Change(*row) for row in message["changes"]]
        except (ValueError, TypeError, KeyError):
            return  # sent by another version or another program
        self._signals.poll.set()
        self._signals.dispatch.set()
        for change in changes:
            self._signals.changes.publish(change, remote=True)


async def _gather(listener: Listener, stopping: asyncio.Event) -> list[Change]:
    """Wait for a change; return it with those that follow closely, none when stopping."""
    first = await run_until(stopping, listener.next())
    if first is None:
        return []
    changes = [first]
    await asyncio.sleep(_GATHER_SECONDS)
    while not listener.changes.empty():
        changes.append(listener.changes.get_nowait())
    return changes


def _to_notice(process_id: str, changes: list[Change]) -> str:
    rows = [[each.kind, each.run_id, each.state, each.detail] for each in changes[:_MAX_CHANGES]]
    while len(text := json.dumps({"by": process_id, "changes": rows})) > _MAX_BYTES:
        rows = rows[: len(rows) // 2]
    return text
