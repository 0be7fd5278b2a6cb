"""Keeps the ledger tidy and honest: writes callbacks off, keeps the ring of rejections, lets old rows go, mends clocks.

It works in pieces of at most 100 rows, each in its own transaction: the door shares the writer and must not wait for it.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import structlog

from receiver.errors import StoreUnavailableError
from receiver.intake.callbacks import Intake
from receiver.model import CallbackExpired
from receiver.store import Database, ledger
from receiver.store import retention as upkeep
from receiver.workers.loop import run_loop

log = structlog.get_logger("receiver.janitor")

_PIECE = 100
_NEXT_PIECE_SECONDS = 0.05
"""Pause before the next piece: callbacks share the writer and go first."""
_FAR = timedelta(days=2)
"""Further ahead than anything is ever put off: only a clock that was wrong does that."""

_QUIET = timedelta(days=7)
"""How long the ledger may have heard nothing before its own newest row, not the clock, says what is old."""


@dataclass(frozen=True, slots=True)
class Retention:
    """How long things are kept."""

    bodies: timedelta
    ledger: timedelta
    rejections: int
    """How many of the newest ones."""


class Janitor:
    """Runs `tick` every few seconds; each tick does at most one piece of each kind of work."""

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
            has_more = await self.tick(self._clock()) >= _PIECE
            return _NEXT_PIECE_SECONDS if has_more else self._pause_seconds

        await run_loop("janitor", tick, stopping, retry_seconds=self._pause_seconds)
        await self._write_last_rejections()

    async def keep_rejections(self, stopping: asyncio.Event) -> None:
        """Store what this process has rejected until `stopping` is set; another process does the other work."""

        async def tick() -> float:
            await self._write_rejections()
            return self._pause_seconds

        await run_loop("rejections", tick, stopping, retry_seconds=self._pause_seconds)
        await self._write_last_rejections()

    async def tick(self, now: datetime) -> int:
        """Do one piece of each kind of work; return the size of the largest."""
        sizes = [await self._write_rejections(), await self._write_off(now)]
        keep, present = self._retention, await self._present(now)
        for job in (
            lambda tx: upkeep.delete_bodies(tx, before=present - keep.bodies, limit=_PIECE),
            lambda tx: upkeep.delete_ledger(tx, before=present - keep.ledger, limit=_PIECE),
        ):
            deleted = await self._database.write(job)
            sizes.append(deleted)
            if deleted:
                log.info("janitor.deleted", rows=deleted)
        pulled = await self._database.write(lambda tx: upkeep.make_due_by(tx, now=now, latest=now + _FAR))
        if pulled:
            log.warning("janitor.clock_mended", rows=pulled)
        return max(sizes)

    async def _present(self, now: datetime) -> datetime:
        """Return the time by which things are old: a clock that is years ahead must not delete what is not."""
        newest = await self._database.read(upkeep.newest_record_at)
        return now if newest is None else min(now, newest + _QUIET)

    async def _write_off(self, now: datetime) -> int:
        """Tell the door which callbacks have not come in time."""
        runs = await self._database.read(lambda tx: ledger.runs_past_callback(tx, now=now, limit=_PIECE))
        if runs:
            await asyncio.gather(*(self._intake.apply(CallbackExpired(run.run_id)) for run in runs))
            log.warning(
                "callbacks.missed", runs=[run.run_id for run in runs[:20]], count=len(runs),
                cure="their callbacks were expected and never came: see rejections, the tunnel, TLS",
            )  # fmt: skip
        return len(runs)

    async def _write_last_rejections(self) -> None:
        try:
            await self._write_rejections()
        except StoreUnavailableError as error:
            log.warning("janitor.rejections_dropped", reason=str(error))

    async def _write_rejections(self) -> int:
        waiting = self._intake.rejections
        rows = [waiting.popleft() for _ in range(len(waiting))]
        if rows:
            try:
                await self._database.write(lambda tx: upkeep.add_rejections(tx, rows, keep=self._retention.rejections))
            except StoreUnavailableError:
                waiting.extendleft(reversed(rows[-(waiting.maxlen or len(rows)) :]))  # for the next tick
                raise
        return 0
