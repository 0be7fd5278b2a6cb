"""Looks through FLORA's lists for runs that nobody registered, and takes them up. `tick` works, `run` only waits.

A sweep pages from the newest run down to its watermark: the creation time, by FLORA's clock, of the newest run that the
last whole sweep saw, less an overlap. The first tick of a process sweeps at once: it may have been down for long.
"""

import asyncio
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import product

import structlog
from sqlalchemy import Connection

from receiver.decide import Listing, Scope, worth_telling
from receiver.decide.starts import may_be_of_start, young_since
from receiver.errors import FloraError
from receiver.intake.callbacks import Intake
from receiver.model import Origin, RunRead, Snapshot
from receiver.store import Database, ledger, starts, sweeps
from receiver.workers.loop import run_loop, run_until
from receiver.workers.run_reader import Reader

log = structlog.get_logger("receiver.sweeper")

_PAGES = 1000
"""Pages of one sweep, at most: a hundred thousand runs."""
_AGAIN_SECONDS = 30.0
"""When to go on after a sweep that was cut short, unless FLORA names a later time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Discovery:
    """What to look through, and how often; an empty filter means everything that the API keys show."""

    every: timedelta = timedelta(minutes=15)
    overlap: timedelta = timedelta(minutes=10)
    first: timedelta = timedelta(hours=24)
    """How far back the first sweep of a list goes."""
    workspace_ids: tuple[str, ...] = ()
    project_ids: tuple[str, ...] = ()
    technique_ids: tuple[str, ...] = ()
    """With this filter, generations are left out: they have no technique."""
    run_types: tuple[str, ...] = ("technique", "generation")


class Sweeper:
    """Sweeps one list after the other. `readers` maps workspace id to its API key's reader; None is for every other one."""

    def __init__(
        self,
        database: Database,
        intake: Intake,
        readers: Mapping[str | None, Reader],
        *,
        discovery: Discovery,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._database = database
        self._intake = intake
        self._readers = readers
        self._discovery = discovery
        self._clock = clock
        self._due_at: dict[Scope, datetime] = {}

    async def run(self, stopping: asyncio.Event) -> None:
        """Tick until `stopping` is set; a sweep in progress is dropped, and the next process starts it again."""
        loop = run_loop("sweeper", lambda: self.tick(self._clock()), stopping, retry_seconds=_AGAIN_SECONDS)
        await run_until(stopping, loop)

    async def tick(self, now: datetime) -> float:
        """Sweep what is due and return in how many seconds to look again."""
        for scope in scopes(self._discovery, self._readers):
            if self._due_at.get(scope, now) <= now:
                pause = await self._sweep(scope, now)
                self._due_at[scope] = now + pause
        next_at = min(self._due_at.values(), default=now + self._discovery.every)
        return max(1.0, (next_at - now).total_seconds())

    async def _sweep(self, scope: Scope, now: datetime) -> timedelta:
        """Page through one list and return when to do it again."""
        reader = self._reader(scope)
        if reader is None:
            log.error("sweep.no_key", workspace_id=scope.workspace_id, cure="set FLORA_API_KEY")
            return self._discovery.every
        if (held := reader.held_seconds()) > 0:
            return timedelta(seconds=max(held, 1.0))
        mark = await self._database.read(lambda tx: sweeps.watermark(tx, _name(scope)))
        since = now - self._discovery.first if mark is None else mark - self._discovery.overlap
        newest, taken_up, cursor, seen = mark, 0, None, set[str]()
        for _ in range(_PAGES):
            asked_at = self._clock()
            try:
                page = await reader.page(scope, cursor)
            except FloraError as error:
                log.warning("sweep.cut_short", listing=scope.listing.value, reason=str(error))
                return timedelta(seconds=max(_AGAIN_SECONDS, reader.held_seconds()))
            taken_up += await self._tell(scope, [row for row in page.snapshots if not _older(row, since)], asked_at)
            times = [row.created_at for row in page.snapshots if row.created_at is not None]
            newest = max([*times, *([newest] if newest else [])], default=None)
            cursor = page.next_cursor
            # A cursor that repeats leads nowhere.
            if cursor is None or cursor in seen or (times and min(times) < since):
                break
            seen.add(cursor)
        reached = newest or since
        await self._database.write(lambda tx: sweeps.set_watermark(tx, _name(scope), reached, swept_at=now))
        log.info("sweep.done", listing=scope.listing.value, workspace_id=scope.workspace_id, discovered=taken_up)
        return self._discovery.every

    async def _tell(self, scope: Scope, rows: Sequence[Snapshot], asked_at: datetime) -> int:
        """Report what the ledger does not know yet; return how many runs it had never heard of."""
        reports, unknown = await self._database.read(lambda tx: _news(tx, scope, rows, asked_at))
        await asyncio.gather(*map(self._intake.apply, reports))
        return unknown

    def _reader(self, scope: Scope) -> Reader | None:
        return self._readers.get(scope.workspace_id) or self._readers.get(None)


def scopes(discovery: Discovery, keys: Collection[str | None]) -> tuple[Scope, ...]:
    """Return the lists to sweep: every combination of the filters, for every API key where no workspace is named."""
    listings: list[tuple[Listing, str | None]] = []
    workspaces: Collection[str | None] = discovery.workspace_ids or keys
    if "technique" in discovery.run_types:
        listings += [(Listing.TECHNIQUE_RUNS, technique) for technique in discovery.technique_ids or (None,)]
    if "generation" in discovery.run_types and not discovery.technique_ids:
        listings.append((Listing.GENERATIONS, None))
    return tuple(
        Scope(listing, workspace, technique, project)
        for workspace, project, (listing, technique) in product(workspaces, discovery.project_ids or (None,), listings)
    )


def _news(tx: Connection, scope: Scope, rows: Sequence[Snapshot], asked_at: datetime) -> tuple[list[RunRead], int]:
    """Return what to report of listed rows, and how many of them are unknown. Reads only."""
    shown = {row.run_id: row for row in rows}
    known = ledger.runs_by_id(tx, shown.keys()) if shown else {}
    news = [RunRead(shown[run_id], asked_at) for run_id, run in known.items() if worth_telling(run, shown[run_id])]
    unknown = [row for row in shown.values() if row.run_id not in known]
    since = young_since(asked_at)
    if unknown and starts.oldest_unanswered_at(tx, workspace_id=scope.workspace_id, since=since) is not None:
        # FLORA's clock dates the rows: allow for all the time that a start is young. The overlap shows them again.
        unknown = [row for row in unknown if not may_be_of_start(row.created_at, since)]
    return [*news, *(RunRead(row, asked_at, origin=Origin.DISCOVERED) for row in unknown)], len(unknown)


def _older(row: Snapshot, than: datetime) -> bool:
    return row.created_at is not None and row.created_at < than


def _name(scope: Scope) -> str:
    return "|".join((scope.listing.value, scope.workspace_id or "", scope.project_id or "", scope.technique_id or ""))
