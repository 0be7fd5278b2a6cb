"""Tells the other processes what was committed here, and this one what was committed there. Only ever a hint to look.

Changes that come within a moment share one NOTIFY, sent in a transaction of its own: a callback never waits for it.
"""

import asyncio
import json
import secrets

import structlog

from receiver.store import Database
from receiver.store.changes import Change, Listener, Signals
from receiver.workers.loop import run_loop, run_until

log = structlog.get_logger("receiver.herald")

_GATHER_SECONDS = 0.02
_MOST = 40
"""Changes of one NOTIFY; PostgreSQL takes 8,000 bytes. Of a longer list the others hear that there is one."""
_MOST_BYTES = 7_500
_AGAIN_SECONDS = 1.0


class ChangeNotifier:
    """`run` sends, `listen` hears; both until told to stop."""

    def __init__(self, database: Database, signals: Signals) -> None:
        self._database = database
        self._signals = signals
        self._me = secrets.token_hex(4)

    async def run(self, stopping: asyncio.Event) -> None:
        """Tell others of every change."""
        with self._signals.changes.subscribe(own_only=True) as listener:
            while not stopping.is_set():
                changes = await self._gathered(listener, stopping)
                if changes:
                    await self._database.notify(_written(self._me, changes))

    async def listen(self, stopping: asyncio.Event) -> None:
        """Receive the changes of other processes until `stopping` is set; a lost connection is opened again."""

        async def tick() -> float:
            await run_until(stopping, self._hear())
            return _AGAIN_SECONDS

        await run_loop("listener", tick, stopping, retry_seconds=_AGAIN_SECONDS)

    async def _hear(self) -> None:
        async for notice in self._database.notices():
            self._heard(notice)

    def _heard(self, notice: str) -> None:
        try:
            told = json.loads(notice) if notice else {"by": "", "changes": []}
            if told["by"] == self._me:
                return
            changes = [Change(*row) for row in told["changes"]]
        except (ValueError, TypeError, KeyError):
            return  # another version's, or not ours at all
        self._signals.poll.set()
        self._signals.dispatch.set()
        for change in changes:
            self._signals.changes.publish(change, remote=True)

    async def _gathered(self, listener: Listener, stopping: asyncio.Event) -> list[Change]:
        first = await run_until(stopping, listener.next())
        if first is None:
            return []
        changes = [first]
        await asyncio.sleep(_GATHER_SECONDS)
        while not listener.changes.empty():
            changes.append(listener.changes.get_nowait())
        return changes


def _written(by: str, changes: list[Change]) -> str:
    rows = [[each.kind, each.run_id, each.state, each.detail] for each in changes[:_MOST]]
    while len(text := json.dumps({"by": by, "changes": rows})) > _MOST_BYTES:
        rows = rows[: len(rows) // 2]
    return text
