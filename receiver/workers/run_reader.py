"""Reads runs from FLORA with one API key and turns responses into reports.

Called by the poller and the sweeper.
"""

from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import structlog

from receiver.decide import Route, Scope, is_404_conclusive, route
from receiver.errors import FloraError
from receiver.flora.client import Exchange, FloraClient, Observe
from receiver.flora.rate_limit import Hold, pause_after
from receiver.model import (
    Origin,
    ReadAttempt,
    ReadFailed,
    ReadOutcome,
    Report,
    Run,
    RunNotFound,
    RunRead,
    Snapshot,
    storable_text,
)
from receiver.telemetry import Metrics

log = structlog.get_logger("receiver.reader")

_KEY_REFUSED_SECONDS = 60.0
_MAX_PROBLEM = 500
"""Characters of a read's problem that are kept."""


@dataclass(frozen=True, slots=True)
class PageRead:
    """One page of a list, and when it was requested."""

    snapshots: tuple[Snapshot, ...]
    requested_at: datetime
    exchange: Exchange

    def report(self, snapshot: Snapshot, *, origin: Origin | None = None) -> RunRead:
        """Return what the page says about one of its runs."""
        attempt = _describe_snapshot(snapshot, self.requested_at, "list", self.exchange)
        return RunRead(snapshot, self.requested_at, origin=origin, attempt=attempt)


@dataclass(frozen=True, slots=True)
class PageFailed:
    """The page that was requested at `requested_at` did not come; no further one follows."""

    error: FloraError
    requested_at: datetime
    exchange: Exchange

    def report(self, run: Run, *, stays_due: bool) -> ReadFailed:
        """Return that a run was looked for in vain."""
        attempt = _describe_error(self.error, self.requested_at, "list", self.exchange)
        retry_after = self.error.retry_after
        return ReadFailed(
            run.run_id, self.requested_at, retry_after=retry_after, attempt=attempt, stays_due=stays_due
        )


@dataclass(frozen=True, slots=True)
class Held:
    """Why no run is read with an API key, and until when."""

    reason: str
    until: datetime


class RunReader:
    """Reads runs with one API key.

    `key` is the workspace it is configured for, or None for all others.
    """

    def __init__(
        self,
        key: str | None,
        client: FloraClient,
        *,
        metrics: Metrics,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self.key = key
        self.rate_limit = client.rate_limit
        self.client = client
        self._metrics = metrics
        self._clock = clock
        self._hold = Hold(clock)
        self._refusal: str | None = None
        """Why FLORA refuses the key, until it accepts it again."""

    @property
    def held(self) -> Held | None:
        """Why runs are not read now, or None."""
        until = self._clock() + timedelta(seconds=self.held_seconds)
        if self._refusal is not None:
            reason = f"FLORA does not accept this service's API key ({self._refusal}): check FLORA_API_KEY"
            return Held(reason, until)
        if self.rate_limit.held_seconds > 0:
            return Held("FLORA limits the rate of this API key", until)
        return (
            None if self._hold.seconds_left <= 0 else Held("the database does not take what is read", until)
        )

    @property
    def is_refused(self) -> bool:
        """Whether FLORA refused the API key at the last read."""
        return self._refusal is not None

    @property
    def held_seconds(self) -> float:
        """Seconds until runs may be read.

        FLORA limits the rate or refuses the key, or the database takes no writes.
        """
        return max(self._hold.seconds_left, self.rate_limit.held_seconds)

    def hold(self, seconds: float) -> None:
        """Read nothing for `seconds`.

        Starts are not held: each of them waits for its own response.
        """
        self._hold.extend(seconds)

    async def read(self, run: Run) -> Report:
        """Read one run on its own route and return what FLORA's response means."""
        requested_at = self._clock()
        exchanges: list[Exchange] = []
        try:
            snapshot = await self._read(run, exchanges.append)
        except FloraError as error:
            return self._to_report(error, run, requested_at, exchanges[-1])
        self._note_key_accepted()
        self.count(snapshot)
        log.info("poll.read", run_id=run.run_id, status=snapshot.status, progress=snapshot.progress)
        attempt = _describe_snapshot(snapshot, requested_at, "run", exchanges[-1])
        return RunRead(snapshot, requested_at, attempt=attempt)

    async def pages(self, scope: Scope) -> AsyncIterator[PageRead | PageFailed]:
        """Yield the pages of a list, newest run first; a page that fails is the last one."""
        requested_at = self._clock()
        exchanges: list[Exchange] = []
        try:
            async for page in self.client.pages(scope, observe=exchanges.append):
                self._note_key_accepted()
                yield PageRead(page.snapshots, requested_at, exchanges.pop())
                requested_at = self._clock()
        except FloraError as error:
            self._react_to(error, listing=scope.listing.value, workspace_id=scope.workspace_id)
            yield PageFailed(error, requested_at, exchanges.pop())

    def count(self, snapshot: Snapshot) -> None:
        """Count a run that was read, alone or in a list."""
        self._metrics.count_poll("terminal" if snapshot.status in {"completed", "failed"} else "running")

    def report_unlisted(self, run: Run, requested_at: datetime) -> Report:
        """Return the report of a run that only its list can show, and that it did not show."""
        self._metrics.count_poll("unlisted")
        log.info("poll.unlisted", run_id=run.run_id)
        problem = "the list of runs does not have it, or not among its newest"
        attempt = ReadAttempt(requested_at, "list", ReadOutcome.FAILED, problem=problem)
        return ReadFailed(run.run_id, requested_at, attempt=attempt)

    async def _read(self, run: Run, observe: Observe) -> Snapshot:
        # A run of Route.LISTED is in lists alone; that route's own single read would need the
        # technique.
        if route(run) is Route.TECHNIQUE_RUN:
            return await self.client.technique_run(run.technique_id or "", run.run_id, observe=observe)
        return await self.client.run(run.run_id, observe=observe)

    def _to_report(self, error: FloraError, run: Run, requested_at: datetime, exchange: Exchange) -> Report:
        attempt = _describe_error(error, requested_at, "run", exchange)
        if error.status == 404 and error.code == "not_found":
            # FLORA's own 404. One of a proxy, or of a wrong base URL, must not lose a run.
            self._note_key_accepted()
            self._metrics.count_poll("missing")
            log.info(
                "poll.missing",
                run_id=run.run_id,
                request_id=error.request_id,
                conclusive=is_404_conclusive(run),
            )
            return RunNotFound(run.run_id, requested_at, conclusive=is_404_conclusive(run), attempt=attempt)
        self._metrics.count_poll("unanswered")
        retry_after = self._react_to(error, run_id=run.run_id)
        return ReadFailed(run.run_id, requested_at, retry_after=retry_after, attempt=attempt)

    def _react_to(self, error: FloraError, **about: str | None) -> float | None:
        """Hold the reads if the error calls for it; return the pause before the next try."""
        known = {**about, "status": error.status, "code": error.code, "request_id": error.request_id}
        match error.status:
            case 401 | 403:
                self.hold(_KEY_REFUSED_SECONDS)
                # Logged once: callbacks are still accepted, but no run can be read.
                is_news, self._refusal = self._refusal is None, str(error)
                if is_news:
                    log.critical(
                        "flora.key_refused",
                        **known,
                        fix="check FLORA_API_KEY; polling waits until it works",
                    )
                return _KEY_REFUSED_SECONDS
            case 429:
                pause = pause_after(error)
                log.warning(
                    "flora.rate_limited", **known, pause_seconds=pause, requests=self.rate_limit.allowed
                )
                return pause
            case _:
                log.warning("poll.unanswered", **known, reason=str(error))
                return error.retry_after

    def _note_key_accepted(self) -> None:
        if self._refusal is not None:
            self._refusal = None
            log.warning("flora.key_accepted", workspace_id=self.key)


def _describe_snapshot(
    snapshot: Snapshot, requested_at: datetime, source: str, exchange: Exchange
) -> ReadAttempt:
    empty = snapshot.status == "completed" and not snapshot.outputs
    return ReadAttempt(
        requested_at,
        source,
        ReadOutcome.RETURNED,
        run_status=snapshot.status,
        http_status=exchange.status,
        problem="it has no outputs that can be fetched yet" if empty else None,
        request_id=_to_request_id(exchange.request_id),
        seconds=exchange.seconds,
    )


def _describe_error(
    error: FloraError, requested_at: datetime, source: str, exchange: Exchange
) -> ReadAttempt:
    is_unknown = error.status == 404 and error.code == "not_found"
    return ReadAttempt(
        requested_at,
        source,
        ReadOutcome.NOT_FOUND if is_unknown else ReadOutcome.FAILED,
        http_status=exchange.status,
        problem=storable_text(str(error))[:_MAX_PROBLEM],
        request_id=_to_request_id(exchange.request_id),
        seconds=exchange.seconds,
    )


def _to_request_id(text: str | None) -> str | None:
    return None if text is None else storable_text(text)[:200]
