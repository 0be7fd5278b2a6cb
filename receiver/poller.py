"""The polling fallback: reads the runs that are due and reports what FLORA shows. `tick` works, `run` only waits."""

import asyncio
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta

import structlog

from receiver.decide import Route, right_route, route
from receiver.errors import FloraError, StoreUnavailableError
from receiver.flora.client import FloraClient
from receiver.intake import Intake, Signals
from receiver.model import Missing, Read, Report, Run, Snapshot, Unanswered
from receiver.store import Database, ledger
from receiver.store.rows import moment
from receiver.telemetry import Metrics
from receiver.waiting import either

log = structlog.get_logger("receiver.poller")

_PAGES = 10
"""Pages of a list that are searched for one run, at most: the newest thousand."""
_IDLE_SECONDS = 5.0
_RATE_LIMIT_SECONDS = 5.0
"""How long to hold still after a 429 that names no time (FLORA contract, section 4)."""
_KEY_REFUSED_SECONDS = 60.0


class Poller:
    """Reads due runs, each on its own route, up to `concurrency` at once.

    `clients` maps workspace id to its client; None is the one for every other workspace.
    """

    def __init__(
        self,
        database: Database,
        intake: Intake,
        clients: Mapping[str | None, FloraClient],
        *,
        signals: Signals,
        metrics: Metrics,
        concurrency: int = 8,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._database = database
        self._intake = intake
        self._clients = clients
        self._signals = signals
        self._metrics = metrics
        self._concurrency = concurrency
        self._clock = clock
        self._reading: dict[str, asyncio.Task[None]] = {}
        self._held: dict[str | None, datetime] = {}
        """Until when a client makes no calls: FLORA limits the rate, or refuses the key."""
        self._refused: set[str | None] = set()

    async def run(self, stopping: asyncio.Event) -> None:
        """Tick until told to stop; then let go of what is being read."""
        while not stopping.is_set():
            self._signals.poll.clear()
            try:
                pause = await self.tick(self._clock())
            except StoreUnavailableError as error:
                log.error("poller.unavailable", reason=str(error))
                pause = _IDLE_SECONDS
            await either(self._signals.poll, stopping, pause)
        for task in self._reading.values():
            task.cancel()
        await self.drain()

    async def tick(self, now: datetime) -> float:
        """Start reading what is due and return in how many seconds to look again."""
        free = self._concurrency - len(self._reading)
        if free <= 0:
            return _IDLE_SECONDS  # whoever finishes wakes us
        limit = self._concurrency + free  # what is being read is still due
        due = await self._database.read(lambda tx: ledger.due_runs(tx, now=now, limit=limit))
        waiting = [run for run in due if run.run_id not in self._reading and not self._is_held(run, now)]
        for run in waiting[:free]:
            task = asyncio.create_task(self._read(run), name=f"poll {run.run_id}")
            self._reading[run.run_id] = task
            task.add_done_callback(lambda _, run_id=run.run_id: self._finished(run_id))  # type: ignore[misc]
        next_ms = await self._database.read(ledger.next_due_ms)
        if next_ms is None:
            return _IDLE_SECONDS
        until = (moment(next_ms) - now).total_seconds()
        # Everything due is in hand or held: the ones in hand wake us when they are done.
        return min(_IDLE_SECONDS, until) if until > 0 else self._patience(now)

    async def drain(self) -> None:
        """Wait until nothing is being read."""
        while self._reading:
            await asyncio.wait(set(self._reading.values()))
            await asyncio.sleep(0)

    def _finished(self, run_id: str) -> None:
        self._reading.pop(run_id, None)
        self._signals.poll.set()

    def _client_key(self, run: Run) -> str | None:
        return run.workspace_id if run.workspace_id in self._clients else None

    def _is_held(self, run: Run, now: datetime) -> bool:
        until = self._held.get(self._client_key(run))
        return until is not None and now < until

    def _patience(self, now: datetime) -> float:
        held = [(until - now).total_seconds() for until in self._held.values() if until > now]
        return min([_IDLE_SECONDS, *held])

    async def _read(self, run: Run) -> None:
        key = self._client_key(run)
        client = self._clients.get(key)
        asked_at = self._clock()
        if client is None:
            log.error("poll.no_key", run_id=run.run_id, workspace_id=run.workspace_id)
            report: Report = Unanswered(run.run_id, asked_at, retry_after=_KEY_REFUSED_SECONDS)
        else:
            report = await self._ask(client, key, run, asked_at)
        try:
            await self._intake.learn(report)
        except StoreUnavailableError as error:
            log.error("poll.not_committed", run_id=run.run_id, reason=str(error))
            self._held[key] = self._clock() + timedelta(seconds=1)  # the run stays due: do not spin on it

    async def _ask(self, client: FloraClient, key: str | None, run: Run, asked_at: datetime) -> Report:
        """Return what FLORA answers about a run, as a report."""
        try:
            snapshot = await _fetch(client, run)
        except FloraError as error:
            self._metrics.polled("missing" if error.code == "not_found" else "unanswered")
            return self._report_of(error, key, run, asked_at)
        self._answered(key)
        if snapshot is None:
            self._metrics.polled("unlisted")
            log.info("poll.unlisted", run_id=run.run_id)
            return Unanswered(run.run_id, asked_at)
        self._metrics.polled("terminal" if snapshot.status in {"completed", "failed"} else "running")
        log.info("poll.read", run_id=run.run_id, status=snapshot.status, progress=snapshot.progress)
        return Read(snapshot, asked_at)

    def _report_of(self, error: FloraError, key: str | None, run: Run, asked_at: datetime) -> Report:
        known = {"run_id": run.run_id, "status": error.status, "code": error.code, "request_id": error.request_id}
        match error.status, error.code:
            case 404, "not_found":  # FLORA's own 404; a proxy's, or a wrong base URL's, must lose no run
                self._answered(key)
                log.info("poll.missing", **known, right_route=right_route(run))
                return Missing(run.run_id, asked_at, right_route=right_route(run))
            case 401 | 403, _:
                self._hold(key, _KEY_REFUSED_SECONDS)
                if key not in self._refused:  # once, and loudly: callbacks keep coming in, but nothing can be read
                    self._refused.add(key)
                    log.critical("flora.key_refused", **known, cure="check FLORA_API_KEY: polling waits until it works")
                return Unanswered(run.run_id, asked_at, retry_after=_KEY_REFUSED_SECONDS)
            case 429, _:
                pause = _RATE_LIMIT_SECONDS if error.retry_after is None else error.retry_after
                self._hold(key, pause)
                log.warning("flora.rate_limited", **known, pause_seconds=pause)
                return Unanswered(run.run_id, asked_at, retry_after=pause)
            case _:
                log.warning("poll.unanswered", **known, reason=str(error))
                return Unanswered(run.run_id, asked_at, retry_after=error.retry_after)

    def _hold(self, key: str | None, seconds: float) -> None:
        until = self._clock() + timedelta(seconds=min(seconds, 3600))
        self._held[key] = max(until, self._held.get(key, until))

    def _answered(self, key: str | None) -> None:
        if key in self._refused:
            self._refused.discard(key)
            log.warning("flora.key_accepted", workspace_id=key)


async def _fetch(client: FloraClient, run: Run) -> Snapshot | None:
    """Ask on the run's own route; None means that a list does not show it, which says nothing."""
    match route(run):
        case Route.TECHNIQUE_RUN:
            return await client.technique_run(run.technique_id or "", run.run_id)
        case Route.RUN:
            return await client.run(run.run_id)
        case Route.LISTED:
            cursor = None
            for _ in range(_PAGES):
                page = await client.technique_runs(cursor=cursor, workspace_id=run.workspace_id)
                for snapshot in page.snapshots:
                    if snapshot.run_id == run.run_id:
                        return snapshot
                if page.next_cursor is None or page.next_cursor == cursor:
                    return None
                cursor = page.next_cursor
            return None
