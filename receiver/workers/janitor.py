"""Keeps the database tidy: expires callbacks, deletes old rows, repairs due times.

Each step handles at most 100 rows in a transaction of its own: callbacks share the writer, and must
not wait for it.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import structlog

from receiver.errors import StoreUnavailableError
from receiver.intake.callbacks import Intake
from receiver.model import CallbackExpired
from receiver.store import Database, ledger, retention
from receiver.workers.loop import run_loop

log = structlog.get_logger("receiver.janitor")

_BATCH = 100
_NEXT_BATCH_SECONDS = 0.05
_LATEST_DUE = timedelta(days=2)
"""Further ahead than any work is ever postponed: only a wrong clock does that."""
_LONGEST_QUIET = timedelta(days=7)
"""How far ahead of the newest row the clock may be before that row decides what is old."""


@dataclass(frozen=True, slots=True)
class Retention:
    """How long rows are kept, and how many of the newest rejections."""

    bodies: timedelta
    ledger: timedelta
    rejections: int


class Janitor:
    """Ticks every few seconds; a tick handles at most one batch of each kind of work."""

    def __init__(
        self,
        database: Database,
        intake: Intake,
        *,
        retention: Retention,
        pause_seconds: float = 5.0,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._database = database
        self._intake = intake
        self._retention = retention
        self._pause_seconds = pause_seconds
        self._clock = clock

    async def run(self, stopping: asyncio.Event) -> None:
        """Tick until `stopping` is set; then store the last rejections."""

        async def tick() -> float:
            has_more = await self.tick(self._clock()) >= _BATCH
            return _NEXT_BATCH_SECONDS if has_more else self._pause_seconds

        await run_loop("janitor", tick, stopping, retry_seconds=self._pause_seconds)
        await self._store_last_rejections()

    async def keep_rejections(self, stopping: asyncio.Event) -> None:
        """Store the rejections of this process until `stopping` is set; another one does `run`."""

        async def tick() -> float:
            await self._store_rejections()
            return self._pause_seconds

        await run_loop("rejections", tick, stopping, retry_seconds=self._pause_seconds)
        await self._store_last_rejections()

    async def tick(self, now: datetime) -> int:
        """Do one batch of each kind of work; return the size of the largest."""
        await self._store_rejections()
        sizes = [await self._expire_callbacks(now)]
        keep, present = self._retention, await self._present(now)
        for delete in (
            lambda tx: retention.delete_bodies(tx, before=present - keep.bodies, limit=_BATCH),
            lambda tx: retention.delete_ledger(tx, before=present - keep.ledger, limit=_BATCH),
        ):
            rows = await self._database.write(delete)
            sizes.append(rows)
            if rows:
                log.info("janitor.deleted", rows=rows)
        repaired = await self._database.write(
            lambda tx: retention.make_due_by(tx, now=now, latest=now + _LATEST_DUE)
        )
        if repaired:
            log.warning("janitor.due_times_repaired", rows=repaired)
        return max(sizes)

    async def _present(self, now: datetime) -> datetime:
        """Return the time for the age of rows: a clock years ahead must not delete new ones."""
        newest = await self._database.read(retention.newest_record_at)
        return now if newest is None else min(now, newest + _LONGEST_QUIET)

    async def _expire_callbacks(self, now: datetime) -> int:
        """Report callbacks that have not come in time."""
        runs = await self._database.read(lambda tx: ledger.runs_past_callback(tx, now=now, limit=_BATCH))
        if runs:
            await asyncio.gather(*(self._intake.apply(CallbackExpired(run.run_id)) for run in runs))
            log.warning(
                "callbacks.missed", runs=[run.run_id for run in runs[:20]], count=len(runs),
                fix="check the rejections, the tunnel and TLS: these callbacks were expected and did not arrive",
            )  # fmt: skip
        return len(runs)

    async def _store_last_rejections(self) -> None:
        try:
            await self._store_rejections()
        except StoreUnavailableError as error:
            log.warning("janitor.rejections_dropped", reason=str(error))

    async def _store_rejections(self) -> None:
        queue = self._intake.rejections
        rows = [queue.popleft() for _ in range(len(queue))]
        if rows:
            try:
                await self._database.write(
                    lambda tx: retention.add_rejections(tx, rows, keep=self._retention.rejections)
                )
            except StoreUnavailableError:
                # For the next tick.
                queue.extendleft(reversed(rows[-(queue.maxlen or len(rows)) :]))
                raise
