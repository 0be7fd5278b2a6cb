"""The polling fallback: reads due runs from FLORA and reports them. Run by the service.

Each tick reads from the database which runs are due, lets `decide.plans` choose how to read them
with the fewest requests, and starts one task for each plan, as far as the API key has free slots.
A plan is either

  * a single read: one request for one run on its own route; or
  * a scan: pages of a list, newest run first, until the due runs have been seen or another page
    costs more than reading the rest one by one.

Three sets keep the plans of one API key apart (`_KeyState`). `single_ids` are runs being read
alone. `scanned` are runs that a scan is looking for, with the row version that it was planned for:
a callback that arrives during the scan makes a newer version, and that run may be read at once,
beside the scan. `passed_ids` are runs that a scan has passed without seeing: they are read alone
next, and never lost between two scans.

A run stays due in the database until a report about it is committed, so a crash or a cancelled task
costs one more read.
"""

import asyncio
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
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
    is_news,
    is_worth_another_page,
    list_of,
    plan_polls,
    route,
)
from receiver.errors import StoreUnavailableError
from receiver.intake.callbacks import Intake
from receiver.model import ReadAttempt, ReadFailed, ReadOutcome, ReadRequested, Report, Run, RunState
from receiver.store import Database, ledger
from receiver.store.changes import Signals
from receiver.store.rows import from_ms
from receiver.workers.loop import idle_seconds, run_loop
from receiver.workers.run_reader import Held, PageFailed, PageRead, RunReader

log = structlog.get_logger("receiver.poller")

_BATCH = 2000
"""Due runs of one API key that are planned together."""
_NO_KEY_SECONDS = 60.0
_NO_KEY = "there is no API key for its workspace: set FLORA_API_KEY"
_NOT_COMMITTED_SECONDS = 1.0


@dataclass(slots=True)
class _KeyState:
    """What is being read with one API key, and what its last scans have shown."""

    reader: RunReader
    tasks: set[asyncio.Task[None]] = field(default_factory=set)
    single_ids: set[str] = field(default_factory=set)
    """Runs being read one by one."""
    scanned: dict[str, int] = field(default_factory=dict)
    """Runs that a scan looks for, with the version that it was planned for."""
    scanned_scopes: set[Scope] = field(default_factory=set)
    passed_ids: set[str] = field(default_factory=set)
    """Runs that a scan has passed without seeing: they are read alone next."""
    depths: dict[Scope, Depth] = field(default_factory=dict)

    @property
    def free_slots(self) -> int:
        return (
            0 if self.reader.held_seconds > 0 else max(0, self.reader.rate_limit.allowed - len(self.tasks))
        )

    def is_being_read(self, run: Run) -> bool:
        """Return whether a read in progress covers the run.

        A scan planned before its callback came does not.
        """
        if run.run_id in self.single_ids:
            return True
        planned = self.scanned.get(run.run_id)
        return planned is not None and (planned == run.version or run.state is not RunState.REPORTED)

    def claim(self, plan: Plan) -> None:
        match plan:
            case Single(run):
                self.single_ids.add(run.run_id)
            case Scan(place=place):
                self.scanned_scopes.add(place)
                self.scanned.update((run.run_id, run.version) for run in (*plan.due, *plan.soon))
            case _:
                assert_never(plan)

    def release(self, plan: Plan) -> None:
        match plan:
            case Single(run):
                self.single_ids.discard(run.run_id)
                self.passed_ids.discard(run.run_id)
            case Scan(place=place):
                self.scanned_scopes.discard(place)
                for run in (*plan.due, *plan.soon):
                    self.scanned.pop(run.run_id, None)
            case _:
                assert_never(plan)


class Poller:
    """Reads due runs with as few requests as it can; no API key waits for another.

    `readers` maps a workspace id to the reader of its API key; None is the reader for every other
    workspace.
    """

    def __init__(
        self,
        database: Database,
        intake: Intake,
        readers: Mapping[str | None, RunReader],
        *,
        signals: Signals,
        policy: Policy,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._database = database
        self._idle_seconds = idle_seconds(shared=database.shared)
        self._intake = intake
        self._signals = signals
        self._policy = policy
        self._clock = clock
        self._keys: Mapping[str | None, _KeyState] = {}
        self.set_readers(readers)

    def set_readers(self, readers: Mapping[str | None, RunReader]) -> None:
        """Read with these from now on. What another reader was reading is still due."""
        before = self._keys
        self._keys = {
            key: state if (state := before.get(key)) and state.reader is reader else _KeyState(reader)
            for key, reader in readers.items()
        }
        for key, state in before.items():
            if self._keys.get(key) is not state:
                for task in state.tasks:
                    task.cancel()
        self._signals.poll.set()

    @property
    def _workspaces(self) -> frozenset[str]:
        """Those with an API key of their own."""
        return frozenset(key for key in self._keys if key is not None)

    def find_hold(self, workspace_id: str | None) -> Held | None:
        """Return why no run of a workspace is read now, as far as this process reads any."""
        state = self._keys.get(workspace_id if workspace_id in self._workspaces else None)
        if state is None:
            until = self._clock() + timedelta(seconds=_NO_KEY_SECONDS)
            return Held(_NO_KEY, until)
        return state.reader.held

    async def run(self, stopping: asyncio.Event) -> None:
        """Tick until `stopping` is set; then cancel the reads in progress."""
        await run_loop(
            "poller",
            lambda: self.tick(self._clock()),
            stopping,
            wake=self._signals.poll,
            retry_seconds=self._idle_seconds,
        )
        for state in self._keys.values():
            for task in state.tasks:
                task.cancel()
        await self.drain()

    async def tick(self, now: datetime) -> float:
        """Start reading the runs that are due; return the seconds until the next tick."""
        # Runs being read are still due, and come on top. Each key has its own share: one that is
        # held starves no other.
        limits = {
            key: _BATCH + len(state.single_ids) + len(state.scanned)
            for key, state in self._keys.items()
            if state.free_slots
        }
        due = await self._database.read(
            lambda tx: {key: self._due(tx, key, now, n) for key, n in limits.items()}
        )
        for key, runs in due.items():
            if (state := self._keys.get(key)) is None:  # its key was removed meanwhile
                continue
            state.passed_ids &= {run.run_id for run in runs}
            await self._start_plans(key, state, [run for run in runs if not state.is_being_read(run)], now)
        if None not in self._keys:
            await self._report_missing_key(now)
        next_ms = await self._database.read(lambda tx: ledger.next_read_due_ms(tx, after=now))
        waits = [
            self._idle_seconds,
            *(held for state in self._keys.values() if (held := state.reader.held_seconds) > 0),
        ]
        if next_ms is not None:
            waits.append((from_ms(next_ms) - now).total_seconds())
        # What is due by now is being read, and wakes this loop when it ends, or its key is held.
        return min(waits)

    async def read_now(self, only: Collection[str] | None = None) -> frozenset[str]:
        """Make unsettled runs due, all or those of `only`; return their ids.

        Their callbacks may have been missed.
        """
        found = await self._database.read(ledger.unsettled_ids)
        ids = found if only is None else found & frozenset(only)
        await asyncio.gather(
            *(self._intake.apply(ReadRequested(run_id, self._clock())) for run_id in sorted(ids))
        )
        return ids

    async def drain(self) -> None:
        """Wait until nothing is being read."""
        while tasks := {task for state in self._keys.values() for task in state.tasks}:
            await asyncio.wait(tasks)
            await asyncio.sleep(0)

    def _due(
        self, tx: Connection, key: str | None, now: datetime, limit: int, after: datetime | None = None
    ) -> tuple[Run, ...]:
        return ledger.due_runs(tx, now=now, limit=limit, after=after, only=key, without=self._workspaces)

    async def _start_plans(
        self, key: str | None, state: _KeyState, due: Sequence[Run], now: datetime
    ) -> None:
        """Plan the due runs of one API key and start a plan for each free slot."""
        soon: Sequence[Run] = ()
        if any(run.state is not RunState.REPORTED and list_of(run) is not None for run in due):
            until = now + LOOKAHEAD
            soon = await self._database.read(lambda tx: self._due(tx, key, until, _BATCH, after=now))
        if self._keys.get(key) is not state:  # its key was removed meanwhile
            return
        plans = plan_polls(
            due,
            now=now,
            policy=self._policy,
            soon=[run for run in soon if not state.is_being_read(run)],
            alone=state.passed_ids,
            busy=state.scanned_scopes,
            depths=state.depths,
        )
        for plan in plans[: state.free_slots]:
            state.claim(plan)
            task = asyncio.create_task(self._carry_out(state, plan), name=f"poll {key or ''}")
            state.tasks.add(task)
            task.add_done_callback(partial(self._finish, state, plan))

    def _finish(self, state: _KeyState, plan: Plan, task: asyncio.Task[None]) -> None:
        state.tasks.discard(task)
        state.release(plan)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("poll.failed", exc_info=error)
            state.reader.hold(_NOT_COMMITTED_SECONDS)
        self._signals.poll.set()

    async def _carry_out(self, state: _KeyState, plan: Plan) -> None:
        match plan:
            case Single(run):
                await self._apply(state, [await state.reader.read(run)])
            case Scan():
                await self._scan(state, plan)
            case _:
                assert_never(plan)

    async def _scan(self, state: _KeyState, scan: Scan) -> None:
        """Read pages while they are worth their request; runs not seen then are read alone."""
        unseen = {run.run_id for run in (*scan.due, *scan.soon)}
        progress, requested_at = Progress(), self._clock()
        async for page in state.reader.pages(scan.scope):
            requested_at = page.requested_at
            if isinstance(page, PageFailed):
                await self._report_failed_page(
                    state, [run for run in scan.due if run.run_id in unseen], page
                )
                return
            useful = await self._apply_rows(state, page, {run.run_id for run in scan.due})
            for snapshot in page.snapshots:
                unseen.discard(snapshot.run_id)
                state.scanned.pop(snapshot.run_id, None)
            progress = progress.add_page(page.snapshots, useful=useful)
            listing, rows = scan.scope.listing.value, len(page.snapshots)
            log.info("poll.listed", listing=listing, rows=rows, useful=useful, unseen=len(unseen))
            if not is_worth_another_page(scan, unseen, progress, now=requested_at):
                break
        if (depth := progress.depth(self._clock())) is not None:
            state.depths[scan.scope] = depth
        absent = [run for run in scan.due if run.run_id in unseen]
        state.passed_ids.update(run.run_id for run in absent if route(run) is not Route.LISTED)
        only_listed = [run for run in absent if route(run) is Route.LISTED]
        await self._apply(state, [state.reader.report_unlisted(run, requested_at) for run in only_listed])

    async def _apply_rows(self, state: _KeyState, page: PageRead, due: Collection[str]) -> int:
        """Report each row that changes what is known of its run; return how many did.

        A run that was due is reported in any case: without a report it would be due again at once.
        """
        rows = {snapshot.run_id: snapshot for snapshot in page.snapshots}
        known = await self._database.read(lambda tx: ledger.runs_by_id(tx, rows.keys())) if rows else {}
        news = [rows[key] for key, run in known.items() if key in due or is_news(run, rows[key])]
        for snapshot in news:
            state.reader.count(snapshot)
        await self._apply(state, [page.report(snapshot) for snapshot in news])
        return len(news)

    async def _report_failed_page(self, state: _KeyState, runs: Sequence[Run], page: PageFailed) -> None:
        """Make the runs of a failed scan back off; if their key is held, they stay due instead.

        A 429 is not worth a write for each run: they are read in a few seconds.
        """
        is_held = state.reader.held_seconds > 0
        if is_held and page.error.status == 429:
            return
        await self._apply(state, [page.report(run, stays_due=is_held) for run in runs])

    async def _apply(self, state: _KeyState, reports: Sequence[Report]) -> None:
        """Apply reports together: those that arrive at once share a commit."""
        results = await asyncio.gather(*map(self._intake.apply, reports), return_exceptions=True)
        for result in results:
            if isinstance(result, StoreUnavailableError):
                log.error("poll.not_committed", runs=len(reports), reason=str(result))
                # The runs stay due: do not read them in a tight loop.
                state.reader.hold(_NOT_COMMITTED_SECONDS)
                return
            if isinstance(result, BaseException):
                raise result

    async def _report_missing_key(self, now: datetime) -> None:
        """Log the due runs of workspaces without an API key, and make them due again later."""
        runs = await self._database.read(lambda tx: self._due(tx, None, now, _BATCH))
        if runs:
            workspaces = sorted({run.workspace_id or "" for run in runs})
            log.error("poll.no_key", runs=len(runs), workspaces=workspaces[:20], fix="set FLORA_API_KEY")
            attempt = ReadAttempt(now, "run", ReadOutcome.FAILED, problem=_NO_KEY)
            reports = [
                ReadFailed(run.run_id, now, retry_after=_NO_KEY_SECONDS, attempt=attempt) for run in runs
            ]
            await asyncio.gather(*map(self._intake.apply, reports))
