"""Searches FLORA's lists for runs that were never registered, and takes them up.

Run by the service if so configured.

A sweep pages from the newest run down to its watermark: the creation time, by FLORA's clock, of the
newest run that the last whole sweep saw, less an overlap. The first tick of a process always
sweeps: it may have been down for long.
"""

import asyncio
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from itertools import product

import structlog
from sqlalchemy import Connection

from receiver.decide import Listing, Scope, is_news
from receiver.decide.starts import may_be_of_start, young_since
from receiver.intake.callbacks import Intake
from receiver.model import Origin, RunRead, Snapshot
from receiver.store import Database, ledger, starts, sweeps
from receiver.workers.loop import run_loop, run_until
from receiver.workers.run_reader import PageFailed, PageRead, RunReader

log = structlog.get_logger("receiver.sweeper")

_MAX_PAGES = 1000
"""Pages of one sweep: a hundred thousand runs."""
_RETRY_SECONDS = 30.0
"""Pause after a sweep that was cut short, unless the API key is held for longer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Discovery:
    """What to sweep, and how often. An empty filter means everything that the API keys show."""

    every: timedelta
    overlap: timedelta
    first: timedelta
    """How far back the first sweep of a list goes."""
    workspace_ids: tuple[str, ...]
    project_ids: tuple[str, ...]
    technique_ids: tuple[str, ...]
    """With this filter, generations are left out: they have no technique."""
    run_types: tuple[str, ...]


class Sweeper:
    """Sweeps one list after the other.

    `readers` maps a workspace id to the reader of its API key; None is the reader for every other
    workspace.
    """

    def __init__(
        self,
        database: Database,
        intake: Intake,
        readers: Mapping[str | None, RunReader],
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

    def set_readers(self, readers: Mapping[str | None, RunReader]) -> None:
        """Search with these from now on: the lists of a workspace with a new key are due at once."""
        self._readers = readers

    async def run(self, stopping: asyncio.Event) -> None:
        """Tick until `stopping` is set.

        A sweep in progress is dropped, and the next process starts it again.
        """
        loop = run_loop("sweeper", lambda: self.tick(self._clock()), stopping, retry_seconds=_RETRY_SECONDS)
        await run_until(stopping, loop)

    async def tick(self, now: datetime) -> float:
        """Sweep the lists that are due; return the seconds until the next tick."""
        current = scopes(self._discovery, self._readers)
        self._due_at = {scope: due_at for scope, due_at in self._due_at.items() if scope in current}
        for scope in current:
            if self._due_at.get(scope, now) <= now:
                pause = await self._sweep(scope, now)
                self._due_at[scope] = now + pause
        next_at = min(self._due_at.values(), default=now + self._discovery.every)
        return max(1.0, (next_at - now).total_seconds())

    async def _sweep(self, scope: Scope, now: datetime) -> timedelta:
        """Sweep one list; return the pause until it is swept again."""
        reader = self._readers.get(scope.workspace_id) or self._readers.get(None)
        if reader is None:
            log.error("sweep.no_key", workspace_id=scope.workspace_id, fix="set FLORA_API_KEY")
            return self._discovery.every
        if (held := reader.held_seconds) > 0:
            return timedelta(seconds=max(held, 1.0))
        mark = await self._database.read(lambda tx: sweeps.watermark(tx, _name(scope)))
        since = now - self._discovery.first if mark is None else mark - self._discovery.overlap
        newest, discovered, pages = mark, 0, 0
        async for page in reader.pages(scope):
            if isinstance(page, PageFailed):
                log.warning("sweep.cut_short", listing=scope.listing.value, reason=str(page.error))
                return timedelta(seconds=max(_RETRY_SECONDS, reader.held_seconds))
            rows = [row for row in page.snapshots if not _is_older(row, since)]
            discovered += await self._apply(scope, rows, page)
            times = [row.created_at for row in page.snapshots if row.created_at is not None]
            newest = max([*times, *([newest] if newest else [])], default=None)
            pages += 1
            if pages == _MAX_PAGES or (times and min(times) < since):
                break
        reached = newest or since
        await self._database.write(lambda tx: sweeps.set_watermark(tx, _name(scope), reached, swept_at=now))
        log.info(
            "sweep.done",
            listing=scope.listing.value,
            workspace_id=scope.workspace_id,
            discovered=discovered,
        )
        return self._discovery.every

    async def _apply(self, scope: Scope, rows: Sequence[Snapshot], page: PageRead) -> int:
        """Report the rows that are news to the database; return how many runs are new."""
        reports, unknown = await self._database.read(
            partial(_reports_of, scope=scope, rows=rows, page=page)
        )
        await asyncio.gather(*map(self._intake.apply, reports))
        return unknown


def scopes(discovery: Discovery, keys: Collection[str | None]) -> tuple[Scope, ...]:
    """Return the lists to sweep: every combination of the filters.

    Without workspaces, those of every API key.
    """
    listings: list[tuple[Listing, str | None]] = []
    workspaces: Collection[str | None] = discovery.workspace_ids or keys
    if "technique" in discovery.run_types:
        listings += [
            (Listing.TECHNIQUE_RUNS, technique) for technique in discovery.technique_ids or (None,)
        ]
    if "generation" in discovery.run_types and not discovery.technique_ids:
        listings.append((Listing.GENERATIONS, None))
    return tuple(
        Scope(listing, workspace, technique, project)
        for workspace, project, (listing, technique) in product(
            workspaces, discovery.project_ids or (None,), listings
        )
    )


def _reports_of(
    tx: Connection, *, scope: Scope, rows: Sequence[Snapshot], page: PageRead
) -> tuple[list[RunRead], int]:
    """Return what to report of listed rows, and how many of them are unknown. Reads only."""
    listed = {row.run_id: row for row in rows}
    known = ledger.runs_by_id(tx, listed.keys()) if listed else {}
    reports = [page.report(listed[run_id]) for run_id, run in known.items() if is_news(run, listed[run_id])]
    unknown = [row for row in listed.values() if row.run_id not in known]
    since = young_since(page.requested_at)
    if (
        unknown
        and starts.oldest_unanswered_at(tx, workspace_id=scope.workspace_id, since=since) is not None
    ):
        # A row may be the run of a start without a response yet. It is left to the next sweep, by
        # way of the overlap.
        unknown = [row for row in unknown if not may_be_of_start(row.created_at, since)]
    return [*reports, *(page.report(row, origin=Origin.DISCOVERED) for row in unknown)], len(unknown)


def _is_older(row: Snapshot, than: datetime) -> bool:
    return row.created_at is not None and row.created_at < than


def _name(scope: Scope) -> str:
    return "|".join(
        (scope.listing.value, scope.workspace_id or "", scope.project_id or "", scope.technique_id or "")
    )
