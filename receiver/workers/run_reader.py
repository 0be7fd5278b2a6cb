"""Asks FLORA about runs with one API key, and says what the answers mean. Called by the poller and the sweeper.

Every call goes through the key's budget, is counted, and teaches the budget; a refused key is told once, and loudly.
"""

from collections.abc import Awaitable, Callable, Mapping
from datetime import UTC, datetime, timedelta
from typing import TypeVar

import structlog

from receiver.decide import Listing, Route, Scope, right_route, route
from receiver.errors import FloraError
from receiver.flora.client import FloraClient
from receiver.flora.messages import Page
from receiver.flora.rate_limit import RateLimit
from receiver.model import ReadFailed, Report, Run, RunNotFound, RunRead, Snapshot
from receiver.telemetry import Metrics

log = structlog.get_logger("receiver.reading")
T = TypeVar("T")

_RATE_LIMIT_SECONDS = 5.0
"""How long to hold still after a 429 that names no time (FLORA contract, section 4)."""
_KEY_REFUSED_SECONDS = 60.0
_LONGEST_HOLD = timedelta(hours=1)


class Reader:
    """One API key's eyes. `key` is the workspace it is configured for; None: every other one."""

    def __init__(
        self,
        key: str | None,
        client: FloraClient,
        budget: RateLimit,
        *,
        metrics: Metrics,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self.key = key
        self.budget = budget
        self._client = client
        self._metrics = metrics
        self._clock = clock
        self._held_until: datetime | None = None
        self._refused = False

    def held_seconds(self) -> float:
        """Return for how long to ask nothing: FLORA limits the rate, refuses the key, or the ledger cannot be written."""
        return max(self._own_hold(), self.budget.held_seconds)

    def _own_hold(self) -> float:
        if self._held_until is None:
            return 0.0
        left = self._held_until - self._clock()
        # A clock that jumped back must not hold us for longer than anything ever is.
        return max(left.total_seconds(), 0.0) if left <= _LONGEST_HOLD else 0.0

    def hold(self, seconds: float) -> None:
        """Ask nothing for `seconds`. Starts go on: they have their own answers to hear."""
        if self._own_hold() < seconds:
            self._held_until = self._clock() + timedelta(seconds=min(seconds, _LONGEST_HOLD.total_seconds()))

    async def read(self, run: Run) -> Report:
        """Read one run on its own route and return what FLORA answers."""
        asked_at = self._clock()
        try:
            snapshot = await self._ask(lambda client: _single(client, run))
        except FloraError as error:
            return self._report_of(error, run, asked_at)
        self.polled(snapshot)
        log.info("poll.read", run_id=run.run_id, status=snapshot.status, progress=snapshot.progress)
        return RunRead(snapshot, asked_at)

    async def page(self, scope: Scope, cursor: str | None) -> Page:
        """Return a page of a list. Raises FloraError, after whatever follows from it for this key."""
        try:
            return await self._ask(lambda client: _page(client, scope, cursor))
        except FloraError as error:
            self._heed(error, listing=scope.listing.value, workspace_id=scope.workspace_id)
            raise

    def polled(self, snapshot: Snapshot) -> None:
        """Count a run that was read, by whatever call."""
        self._metrics.count_poll("terminal" if snapshot.status in {"completed", "failed"} else "running")

    def unlisted(self, run: Run, asked_at: datetime) -> Report:
        """Return what it means that a list does not show a run which nothing else can show: nothing."""
        self._metrics.count_poll("unlisted")
        log.info("poll.unlisted", run_id=run.run_id)
        return ReadFailed(run.run_id, asked_at)

    async def _ask(self, call: Callable[[FloraClient], Awaitable[T]]) -> T:
        async with self.budget.call():
            try:
                answer = await call(self._client)
            except FloraError as error:
                if error.status == 429:
                    self.budget.limited(_RATE_LIMIT_SECONDS if error.retry_after is None else error.retry_after)
                raise
        self.budget.went_well()
        self._accepted()
        return answer

    def _report_of(self, error: FloraError, run: Run, asked_at: datetime) -> Report:
        if error.status == 404 and error.code == "not_found":
            # FLORA's own 404; a proxy's, or a wrong base URL's, must lose no run
            self._accepted()
            self._metrics.count_poll("missing")
            log.info("poll.missing", run_id=run.run_id, request_id=error.request_id, right_route=right_route(run))
            return RunNotFound(run.run_id, asked_at, right_route=right_route(run))
        self._metrics.count_poll("unanswered")
        return ReadFailed(run.run_id, asked_at, retry_after=self._heed(error, run_id=run.run_id))

    def _heed(self, error: FloraError, **about: str | None) -> float | None:
        """Hold still if the answer calls for it; return the seconds after which to ask about the same again."""
        known = {**about, "status": error.status, "code": error.code, "request_id": error.request_id}
        match error.status:
            case 401 | 403:
                self.hold(_KEY_REFUSED_SECONDS)
                if not self._refused:  # once, and loudly: callbacks keep coming in, but nothing can be read
                    self._refused = True
                    log.critical("flora.key_refused", **known, cure="check FLORA_API_KEY: polling waits until it works")
                return _KEY_REFUSED_SECONDS
            case 429:
                pause = _RATE_LIMIT_SECONDS if error.retry_after is None else error.retry_after
                log.warning("flora.rate_limited", **known, pause_seconds=pause, at_once=self.budget.allowed)
                return pause
            case _:
                log.warning("poll.unanswered", **known, reason=str(error))
                return error.retry_after

    def _accepted(self) -> None:
        if self._refused:
            self._refused = False
            log.warning("flora.key_accepted", workspace_id=self.key)


def readers(
    clients: Mapping[str | None, FloraClient],
    budgets: Mapping[str | None, RateLimit],
    *,
    metrics: Metrics,
    clock: Callable[[], datetime],
) -> dict[str | None, Reader]:
    """Return a reader for each client, with its budget."""
    return {key: Reader(key, client, budgets[key], metrics=metrics, clock=clock) for key, client in clients.items()}


async def _single(client: FloraClient, run: Run) -> Snapshot:
    # A run of Route.LISTED is in lists alone; that route's own single read would need the technique.
    if route(run) is Route.TECHNIQUE_RUN:
        return await client.technique_run(run.technique_id or "", run.run_id)
    return await client.run(run.run_id)


async def _page(client: FloraClient, scope: Scope, cursor: str | None) -> Page:
    match scope.listing:
        case Listing.TECHNIQUE_RUNS:
            return await client.technique_runs(
                cursor=cursor,
                workspace_id=scope.workspace_id,
                project_id=scope.project_id,
                technique_id=scope.technique_id,
            )
        case Listing.GENERATIONS:
            return await client.generations(cursor=cursor, workspace_id=scope.workspace_id, project_id=scope.project_id)
