"""Lets one process at a time run a loop, by a lease in the shared database.

The lease ends by the database's clock. A holder that cannot renew it stops its work well before
that, by its own clock. So two processes never work at the same time, unless one is frozen for
longer than its lease: then the guarded writes of the database keep the results right.
"""

import asyncio
import math
import os
import secrets
import socket
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta

import structlog
from sqlalchemy import Connection

from receiver.errors import StoreUnavailableError
from receiver.store import Database, leases
from receiver.workers.loop import run_loop, wait_for_any

log = structlog.get_logger("receiver.leader")

LEASE = timedelta(seconds=15)
_MARGIN_SECONDS = 0.05
"""How long after the end of another process's lease the next attempt is made."""
_GRACE_SECONDS = 2.0
"""How long the work may take to end once the lease is lost."""


class LeaderLease:
    """Runs `work` in the process that holds the lease `name`."""

    def __init__(
        self,
        database: Database,
        name: str,
        work: Callable[[asyncio.Event], Awaitable[None]],
        *,
        lease: timedelta = LEASE,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._database = database
        self._name = name
        self._work = work
        self._lease = lease
        self._clock = clock
        self._owner = f"{socket.gethostname()}:{os.getpid()}"
        self._token = secrets.token_hex(16)
        self._free_in = math.inf
        """Seconds until the lease of another process ends, as far as is known."""

    async def run(self, stopping: asyncio.Event) -> None:
        """Try to acquire the lease until `stopping` is set; while it is held, run `work`."""

        async def tick() -> float:
            requested_at = asyncio.get_running_loop().time()
            if not await self.acquire():
                return min(self._lease.total_seconds() / 3, self._free_in)
            await self._serve(stopping, since=requested_at)
            await self._release()
            return 0.0

        await run_loop(f"lease {self._name}", tick, stopping)

    async def acquire(self, *, within: float | None = None) -> bool:
        """Acquire or extend the lease.

        False: another process holds it, or the database did not respond `within` seconds.
        """

        def job(tx: Connection) -> bool:
            now = self._database.now(tx, self._clock())
            until = now + self._lease
            is_ours = leases.claim(
                tx, self._name, owner=self._owner, token=self._token, now=now, until=until
            )
            ends = None if is_ours else leases.held_until(tx, self._name)
            self._free_in = (
                math.inf if ends is None else max((ends - now).total_seconds(), 0.0) + _MARGIN_SECONDS
            )
            return is_ours

        self._free_in = math.inf
        try:
            async with asyncio.timeout(self._lease.total_seconds() / 2 if within is None else within):
                return await self._database.write(job)
        except (StoreUnavailableError, TimeoutError) as error:
            log.warning("lease.unavailable", name=self._name, reason=str(error))
            return False

    async def _serve(self, stopping: asyncio.Event, *, since: float) -> None:
        """Run `work` until `stopping` is set or the lease, which began at `since`, may end."""
        loop = asyncio.get_running_loop()
        log.info("lease.acquired", name=self._name)
        stop_work = asyncio.Event()
        working = asyncio.ensure_future(self._work(stop_work))
        third = self._lease.total_seconds() / 3
        held_until = since + 2 * third
        try:
            while not stopping.is_set() and not working.done():
                pause = min(third, max((held_until - loop.time()) / 2, third / 5))
                await wait_for_any(stopping, working, timeout=pause)
                requested_at = loop.time()
                if stopping.is_set() or working.done():
                    break
                if await self.acquire(within=held_until - requested_at):
                    held_until = requested_at + 2 * third
                elif loop.time() >= held_until:
                    log.warning("lease.lost", name=self._name)
                    break
        finally:
            stop_work.set()
            await asyncio.wait({working}, timeout=_GRACE_SECONDS)
            if not working.done():
                working.cancel()
                await asyncio.wait({working}, timeout=_GRACE_SECONDS)
        if working.done() and not working.cancelled():
            working.result()  # raises the exception of a bug in it

    async def _release(self) -> None:
        """Release the lease, so that another process can begin at once."""
        try:
            await self._database.write(lambda tx: leases.release(tx, self._name, token=self._token))
        except StoreUnavailableError as error:
            log.warning("lease.not_released", name=self._name, reason=str(error))
