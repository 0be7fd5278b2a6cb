"""The polling fallback: reads the runs that are due and reports what FLORA shows. `tick` works, `run` only waits."""

import asyncio
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from typing import assert_never

import structlog
from sqlalchemy import Connection

from receiver.decide import (
    LOOKAHEAD,
    Depth,
    Plan,
    Policy,
    Progress,
    Route,
    Scan,
    Scope,
    Single,
    home,
    plan_polls,
    route,
    worth_another_page,
    worth_telling,
)
from receiver.errors import FloraError, StoreUnavailableError
from receiver.flora.client import FloraClient
from receiver.flora.rate_limit import RateLimit
from receiver.intake.callbacks import Intake
from receiver.model import ReadFailed, ReadRequested, Report, Run, RunRead, RunState, Snapshot
from receiver.store import Database, ledger
from receiver.store.changes import Signals
from receiver.store.rows import from_ms
from receiver.telemetry import Metrics
from receiver.workers.loop import idle_seconds, run_loop
from receiver.workers.run_reader import Reader, readers

log = structlog.get_logger("receiver.poller")

_AT_ONCE = 2000
"""Due runs of one API key that are planned together."""
_NO_KEY_SECONDS = 60.0
_NOT_COMMITTED_SECONDS = 1.0


@dataclass(slots=True)
class _Desk:
    """One API key's work: what is being read, and what its last scans have shown."""

    reader: Reader
    tasks: set[asyncio.Task[None]] = field(default_factory=set)
    alone: set[str] = field(default_factory=set)
    """Runs being read one by one."""
    scanned: dict[str, int] = field(default_factory=dict)
    """Runs that a scan looks for, with the version that it was planned for."""
    busy: set[Scope] = field(default_factory=set)
    passed: set[str] = field(default_factory=set)
    """Runs that a scan has passed without seeing: they are read alone next."""
    depths: dict[Scope, Depth] = field(default_factory=dict)

    @property
    def room(self) -> int:
        return 0 if self.reader.held_seconds() > 0 else max(0, self.reader.budget.allowed - len(self.tasks))

    def in_hand(self, run: Run) -> bool:
        """Whether a run is being read. A callback that came since its scan was planned wants an answer at once."""
        if run.run_id in self.alone:
            return True
        planned = self.scanned.get(run.run_id)
        return planned is not None and (planned == run.version or run.state is not RunState.REPORTED)

    def take(self, plan: Plan) -> None:
        match plan:
            case Single(run):
                self.alone.add(run.run_id)
            case Scan(place=place):
                self.busy.add(place)
                self.scanned.update((run.run_id, run.version) for run in (*plan.due, *plan.soon))
            case _:
                assert_never(plan)

    def let_go(self, plan: Plan) -> None:
        match plan:
            case Single(run):
                self.alone.discard(run.run_id)
                self.passed.discard(run.run_id)
            case Scan(place=place):
                self.busy.discard(place)
                for run in (*plan.due, *plan.soon):
                    self.scanned.pop(run.run_id, None)
            case _:
                assert_never(plan)


class Poller:
    """Reads due runs with as few requests as it can; the work of each API key goes on by itself.

    `clients` maps workspace id to its client, None being the one for every other workspace; so does `budgets`.
    """

    def __init__(
        self,
        database: Database,
        intake: Intake,
        clients: Mapping[str | None, FloraClient],
        *,
        signals: Signals,
        metrics: Metrics,
        budgets: Mapping[str | None, RateLimit] | None = None,
        policy: Policy,
        concurrency: int = 8,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._database = database
        self._idle_seconds = idle_seconds(shared=database.shared)
        self._intake = intake
        self._signals = signals
        self._metrics = metrics
        self._policy = policy
        self._clock = clock
        if budgets is None:
            budgets = {key: RateLimit(concurrency, clock=clock) for key in clients}
        self.readers = readers(clients, budgets, metrics=metrics, clock=clock)
        self._desks = {key: _Desk(reader) for key, reader in self.readers.items()}
        self._own = frozenset(key for key in clients if key is not None)

    async def run(self, stopping: asyncio.Event) -> None:
        """Tick until `stopping` is set; then cancel the reads in progress."""
        await run_loop(
            "poller",
            lambda: self.tick(self._clock()),
            stopping,
            wake=self._signals.poll,
            retry_seconds=self._idle_seconds,
        )
        for desk in self._desks.values():
            for task in desk.tasks:
                task.cancel()
        await self.drain()

    async def tick(self, now: datetime) -> float:
        """Start reading what is due and return in how many seconds to look again."""
        # What is in hand is still due. Each key has its own share: one that is held starves no other.
        shares = {key: _AT_ONCE + len(desk.alone) + len(desk.scanned) for key, desk in self._desks.items() if desk.room}
        due = await self._database.read(lambda tx: {key: self._due(tx, key, now, n) for key, n in shares.items()})
        for key, runs in due.items():
            desk = self._desks[key]
            desk.passed &= {run.run_id for run in runs}
            await self._begin(key, [run for run in runs if not desk.in_hand(run)], now)
        if None not in self._desks:
            await self._without_key(now)
        next_ms = await self._database.read(lambda tx: ledger.next_read_due_ms(tx, after=now))
        waits = [
            self._idle_seconds,
            *(held for desk in self._desks.values() if (held := desk.reader.held_seconds()) > 0),
        ]
        if next_ms is not None:
            waits.append((from_ms(next_ms) - now).total_seconds())
        return min(waits)  # whatever is due by now is in hand or held: the ones in hand wake us when they are done

    async def read_now(self, only: Collection[str] | None = None) -> frozenset[str]:
        """Have every unsettled run, or those of `only`, read now, and return them: their callbacks may not have found us."""
        found = await self._database.read(ledger.unsettled_ids)
        ids = found if only is None else found & frozenset(only)
        await asyncio.gather(*(self._intake.apply(ReadRequested(run_id, self._clock())) for run_id in sorted(ids)))
        return ids

    async def drain(self) -> None:
        """Wait until nothing is being read."""
        while tasks := {task for desk in self._desks.values() for task in desk.tasks}:
            await asyncio.wait(tasks)
            await asyncio.sleep(0)

    def _due(
        self, tx: Connection, key: str | None, now: datetime, limit: int, after: datetime | None = None
    ) -> tuple[Run, ...]:
        return ledger.due_runs(tx, now=now, limit=limit, after=after, only=key, without=self._own)

    async def _begin(self, key: str | None, due: Sequence[Run], now: datetime) -> None:
        """Plan the due runs of one API key and begin with the most urgent plans, as far as there is room."""
        desk = self._desks[key]
        soon: Sequence[Run] = ()
        if any(run.state is not RunState.REPORTED and home(run) is not None for run in due):
            until = now + LOOKAHEAD
            soon = await self._database.read(lambda tx: self._due(tx, key, until, _AT_ONCE, after=now))
        plans = plan_polls(
            due,
            now=now,
            policy=self._policy,
            soon=[run for run in soon if not desk.in_hand(run)],
            alone=desk.passed,
            busy=desk.busy,
            depths=desk.depths,
        )
        for plan in plans[: desk.room]:
            desk.take(plan)
            task = asyncio.create_task(self._carry_out(desk, plan), name=f"poll {key or ''}")
            desk.tasks.add(task)
            task.add_done_callback(partial(self._finished, desk, plan))

    def _finished(self, desk: _Desk, plan: Plan, task: asyncio.Task[None]) -> None:
        desk.tasks.discard(task)
        desk.let_go(plan)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("poll.failed", exc_info=error)
            desk.reader.hold(_NOT_COMMITTED_SECONDS)
        self._signals.poll.set()

    async def _carry_out(self, desk: _Desk, plan: Plan) -> None:
        match plan:
            case Single(run):
                await self._learn(desk, [await desk.reader.read(run)])
            case Scan():
                await self._scan(desk, plan)
            case _:
                assert_never(plan)

    async def _scan(self, desk: _Desk, scan: Scan) -> None:
        """Page through a list until no page is worth asking for; what it has not shown by then is read alone."""
        left = {run.run_id for run in (*scan.due, *scan.soon)}
        progress, cursor, cursors, more = Progress(), None, set[str](), True
        asked_at = self._clock()
        while progress.pages == 0 or worth_another_page(scan, left, progress, now=asked_at, more=more):
            asked_at = self._clock()
            try:
                page = await desk.reader.page(scan.scope, cursor)
            except FloraError as error:
                await self._give_up(desk, scan, left, error, asked_at)
                return
            told = await self._tell(desk, page.snapshots, asked_at, {run.run_id for run in scan.due})
            for snapshot in page.snapshots:
                left.discard(snapshot.run_id)
                desk.scanned.pop(snapshot.run_id, None)
            progress = progress.turned(page.snapshots, useful=told)
            log.info(
                "poll.listed", listing=scan.scope.listing.value, rows=len(page.snapshots), told=told, left=len(left)
            )
            cursor = page.next_cursor
            more = cursor is not None and cursor not in cursors  # a cursor that repeats leads nowhere
            cursors.add(cursor or "")
        if (depth := progress.depth(self._clock())) is not None:
            desk.depths[scan.scope] = depth
        absent = [run for run in scan.due if run.run_id in left]
        desk.passed.update(run.run_id for run in absent if route(run) is not Route.LISTED)
        await self._learn(desk, [desk.reader.unlisted(run, asked_at) for run in absent if route(run) is Route.LISTED])

    async def _tell(self, desk: _Desk, snapshots: Sequence[Snapshot], asked_at: datetime, due: Collection[str]) -> int:
        """Report every row of a page that says something new about a run of the ledger; return how many did.

        A run that was due is told of in any case: without a report it would be due again at once.
        """
        shown = {snapshot.run_id: snapshot for snapshot in snapshots}
        known = await self._database.read(lambda tx: ledger.runs_by_id(tx, shown.keys())) if shown else {}
        news = [shown[key] for key, run in known.items() if key in due or worth_telling(run, shown[key])]
        for snapshot in news:
            desk.reader.polled(snapshot)
        await self._learn(desk, [RunRead(snapshot, asked_at) for snapshot in news])
        return len(news)

    async def _give_up(
        self, desk: _Desk, scan: Scan, left: Collection[str], error: FloraError, asked_at: datetime
    ) -> None:
        """A page did not come. If nothing may be asked for now, the runs stay due; else they back off."""
        if desk.reader.held_seconds() > 0:
            return
        runs = [run for run in scan.due if run.run_id in left]
        await self._learn(desk, [ReadFailed(run.run_id, asked_at, retry_after=error.retry_after) for run in runs])

    async def _learn(self, desk: _Desk, reports: Sequence[Report]) -> None:
        """Commit reports together: what arrives at the door at once shares a commit."""
        answers = await asyncio.gather(*map(self._intake.apply, reports), return_exceptions=True)
        for answer in answers:
            if isinstance(answer, StoreUnavailableError):
                log.error("poll.not_committed", runs=len(reports), reason=str(answer))
                desk.reader.hold(_NOT_COMMITTED_SECONDS)  # the runs stay due: do not spin on them
                return
            if isinstance(answer, BaseException):
                raise answer

    async def _without_key(self, now: datetime) -> None:
        """Runs of workspaces without an API key cannot be read: say so, and look again in a while."""
        runs = await self._database.read(lambda tx: self._due(tx, None, now, _AT_ONCE))
        if runs:
            workspaces = sorted({run.workspace_id or "" for run in runs})
            log.error("poll.no_key", runs=len(runs), workspaces=workspaces[:20], cure="set FLORA_API_KEY")
            reports = [ReadFailed(run.run_id, now, retry_after=_NO_KEY_SECONDS) for run in runs]
            await asyncio.gather(*map(self._intake.apply, reports))
