"""Lets one process at a time do what only one may do. `run` is a loop around the loop that is elected.

The lease ends by the database's clock; its holder stops well before, by its own, if it cannot renew it. So two never work
at the same time, unless a process is frozen for longer than its lease: then the ledger's guarded writes stand in between.
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

log = structlog.get_logger("receiver.election")

LEASE = timedelta(seconds=15)
_AFTER_SECONDS = 0.05
"""How long after another's lease has ended we try to take it."""
_GRACE_SECONDS = 2.0
"""How long the loop may take to end once the lease is lost."""


class LeaderLease:
    """Runs `work` in whichever process holds the lease `name`."""

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
        """Seconds until another's lease ends, as far as we know: the next try is then."""

    async def run(self, stopping: asyncio.Event) -> None:
        """Try to acquire the lease until `stopping` is set; while it is held, run `work`."""

        async def tick() -> float:
            requested_at = asyncio.get_running_loop().time()
            if not await self.take():
                return min(self._lease.total_seconds() / 3, self._free_in)
            await self._serve(stopping, since=requested_at)
            await self._resign()
            return 0.0

        await run_loop(f"lease {self._name}", tick, stopping)

    async def take(self, *, within: float | None = None) -> bool:
        """Take the lease, or extend it; False if another process has it, or nobody can tell within that many seconds."""

        def job(tx: Connection) -> bool:
            now = self._database.now(tx, self._clock())
            until = now + self._lease
            taken = leases.claim(tx, self._name, owner=self._owner, token=self._token, now=now, until=until)
            ends = None if taken else leases.held_until(tx, self._name)
            self._free_in = math.inf if ends is None else max((ends - now).total_seconds(), 0.0) + _AFTER_SECONDS
            return taken

        self._free_in = math.inf
        try:
            async with asyncio.timeout(self._lease.total_seconds() / 2 if within is None else within):
                return await self._database.write(job)
        except (StoreUnavailableError, TimeoutError) as error:
            log.warning("election.unavailable", name=self._name, reason=str(error))
            return False

    async def _serve(self, stopping: asyncio.Event, *, since: float) -> None:
        """Work until told to stop, or until the lease may be another's. It was asked for at `since`: it runs from then on."""
        loop = asyncio.get_running_loop()
        log.info("election.won", name=self._name)
        resigned = asyncio.Event()
        working = asyncio.ensure_future(self._work(resigned))
        third = self._lease.total_seconds() / 3
        held_until = since + 2 * third
        try:
            while not stopping.is_set() and not working.done():
                pause = min(third, max((held_until - loop.time()) / 2, third / 5))
                await wait_for_any(stopping, working, timeout=pause)
                asked = loop.time()
                if stopping.is_set() or working.done():
                    break
                if await self.take(within=held_until - asked):
                    held_until = asked + 2 * third
                elif loop.time() >= held_until:
                    log.warning("election.lost", name=self._name)
                    break
        finally:
            resigned.set()
            await asyncio.wait({working}, timeout=_GRACE_SECONDS)
            if not working.done():
                working.cancel()
                await asyncio.wait({working}, timeout=_GRACE_SECONDS)
        if working.done() and not working.cancelled():
            working.result()  # its own bug is told by whoever runs us

    async def _resign(self) -> None:
        """Let the next one begin at once."""
        try:
            await self._database.write(lambda tx: leases.release(tx, self._name, token=self._token))
        except StoreUnavailableError as error:
            log.warning("election.not_released", name=self._name, reason=str(error))
