"""Starts runs at FLORA, and takes up runs that were started elsewhere.

Called by the API; run by the service.

A start is committed before FLORA is requested to start it, and the response after that. Whatever
happens in between, the same bytes are sent again under the same idempotency key, and the token in
the callback URL identifies the start even if no response ever arrives.

`start` commits and sends at once. `recover` sends again what has no response: starts of this
process that failed, and those of a process that is gone. Where several processes share a database,
one of them recovers, and the others only finish what they have sent (`finish_own`).
"""

import asyncio
import json
import random
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial

import structlog
from msgspec.structs import replace
from sqlalchemy import Connection
from sqlalchemy.exc import IntegrityError

from receiver.decide import Listing, Scope
from receiver.decide.starts import (
    Reply,
    candidates,
    defer_start,
    give_up_on,
    give_up_on_used_key,
    is_key_of_another,
    may_repeat,
    refuse_start,
    reply_of,
    retry_refused,
    search_later,
    to_registration,
    window_of,
)
from receiver.errors import FloraError, StoreUnavailableError
from receiver.flora.client import FloraClient
from receiver.flora.messages import StartedRun, Technique
from receiver.flora.start_request import StartRequest
from receiver.intake.callbacks import Intake
from receiver.model import Operation, Run, RunRegistered, Snapshot, Start, StartState
from receiver.store import Database, ledger, starts
from receiver.store.changes import Change, Signals
from receiver.store.rows import from_ms
from receiver.workers.loop import idle_seconds, run_loop

log = structlog.get_logger("receiver.starter")

_BATCH = 64
_MAX_PAGES = 20
"""Pages that are searched for the run of a start without a response: the newest two thousand."""
_OPEN = (StartState.ASKING, StartState.UNKNOWN)
_RETRY_COMMIT_SECONDS = 1.0
_AFTER_BUG_SECONDS = 5.0
_GRACE_SECONDS = 5.0
"""How long requests in flight may take to get a response once the service stops."""


@dataclass(frozen=True, slots=True)
class Committed:
    """The start is in the database. `is_repeat`: it was before, and nothing new is started."""

    start: Start
    is_repeat: bool


@dataclass(frozen=True, slots=True)
class Conflict:
    """The idempotency key was used before, for another request: that of `start`."""

    start: Start


def new_key() -> str:
    """Return an idempotency key for a start whose caller has none."""
    return f"auto-{secrets.token_hex(16)}"


class Starter:
    """Starts and tracks runs.

    `callback_url` is the receiver's own, as FLORA must call it; without one, runs are polled. The
    process that commits a start sends it. It has `head_start` to do so before the process that
    recovers starts sends it too; a single process needs none.
    """

    def __init__(
        self,
        database: Database,
        intake: Intake,
        clients: Mapping[str | None, FloraClient],
        *,
        signals: Signals,
        callback_url: str | None,
        head_start: timedelta = timedelta(0),
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
        jitter: Callable[[], float] = random.random,
    ) -> None:
        self._database = database
        self._idle_seconds = idle_seconds(shared=database.shared)
        self._intake = intake
        self._clients = clients
        self._signals = signals
        self.callback_url = callback_url
        """May change at any time, for the starts that follow."""
        self._head_start = head_start
        self._clock = clock
        self._jitter = jitter
        self._requests: dict[str, asyncio.Task[None]] = {}
        """Requests in flight, by the token of their start."""
        self._wake = asyncio.Event()
        self._stopped = False

    def set_clients(self, clients: Mapping[str | None, FloraClient]) -> None:
        """Send the requests that follow with these clients."""
        self._clients = clients

    async def start(self, request: StartRequest) -> Committed | Conflict:
        """Commit a start and send it to FLORA; see `wait_for_response` for the result.

        The same key with the same request returns the start of before, and starts nothing. One that
        FLORA has refused is sent again.
        """
        now = self._clock()
        key = request.idempotency_key or new_key()
        commit = partial(self._commit, request=request, key=key, now=now)
        result = None
        while result is None:
            try:
                result = await self._database.write(commit)
            except IntegrityError:  # another process has just used the key: now its start is seen
                result = await self._database.write(commit)
        if isinstance(result, Conflict) or result.start.state is not StartState.ASKING:
            return result
        if not result.is_repeat or result.start.due_at <= now:
            self._send_soon(result.start, is_first=not result.is_repeat)
        return result

    async def wait_for_response(self, token: str, *, timeout_seconds: float) -> Start | None:
        """Return a start once FLORA has responded to it, or as it is when the time is over."""
        with self._signals.changes.subscribe(token) as listener:
            try:
                async with asyncio.timeout(timeout_seconds):
                    while True:
                        found = await self.find(token)
                        if found is None or found.state is not StartState.ASKING:
                            return found
                        await listener.next()
            except TimeoutError:
                return await self.find(token)

    async def find(self, token: str) -> Start | None:
        return (await self._database.read(lambda tx: starts.by_token(tx, [token]))).get(token)

    async def find_technique(self, technique_id: str, *, workspace_id: str = "") -> Technique:
        """Return a technique as FLORA describes it. Raises FloraError."""
        return await self._client(workspace_id).technique(technique_id)

    async def track(self, registration: RunRegistered) -> Run:
        """Take up a run that was started elsewhere, before or after its callback came."""
        await self._intake.apply(registration)
        run_id = registration.run_id
        return (await self._database.read(lambda tx: ledger.runs_by_id(tx, [run_id])))[run_id]

    async def resolve(self, token: str, run_id: str | None) -> Start | None:
        """Set what an operator says became of a start: this run, or (None) no run at all."""
        start = await self.find(token)
        if start is None or start.state is StartState.STARTED:
            return start
        if run_id is not None:
            await self._link(start, run_id)
        else:
            refused = replace(
                start,
                state=StartState.REFUSED,
                error_code="resolved",
                error_message="no run, says an operator",
            )
            await self._database.write(lambda tx: starts.update_start(tx, refused, only_in=_OPEN))
        self._signals.changes.publish(
            Change("start", token, StartState.STARTED.value if run_id else "refused")
        )
        return await self.find(token)

    async def run(self, stopping: asyncio.Event) -> None:
        """Recover starts until `stopping` is set; then finish."""
        await self.recover(stopping)
        await self.stop()

    async def recover(self, stopping: asyncio.Event) -> None:
        """Send the starts that have no response again, until `stopping` is set."""
        await run_loop(
            "starter",
            lambda: self.tick(self._clock()),
            stopping,
            wake=self._wake,
            retry_seconds=self._idle_seconds,
        )

    async def finish_own(self, stopping: asyncio.Event) -> None:
        """Wait for `stopping`, then finish: where another process recovers starts."""
        await stopping.wait()
        await self.stop()

    async def stop(self) -> None:
        """Wait a little for the requests in flight and send no further ones.

        Starts from here on are committed, and sent by the next process.
        """
        self._stopped = True
        if self._requests:
            await asyncio.wait(set(self._requests.values()), timeout=_GRACE_SECONDS)
        for task in self._requests.values():
            task.cancel()
        await self.drain()

    async def tick(self, now: datetime) -> float:
        """Send every start that is due; return the seconds until the next tick."""
        # The read below may not show yet what these get as a response.
        in_flight = set(self._requests)
        limit = _BATCH + len(in_flight)
        for start in await self._database.read(lambda tx: starts.due_starts(tx, now=now, limit=limit)):
            if start.token not in in_flight:
                self._send_soon(start)
        next_ms = await self._database.read(starts.next_attempt_due_ms)
        until = self._idle_seconds if next_ms is None else (from_ms(next_ms) - now).total_seconds()
        return min(self._idle_seconds, until) if until > 0 else self._idle_seconds

    async def drain(self) -> None:
        """Wait until no request is in flight."""
        while self._requests:
            await asyncio.wait(set(self._requests.values()))
            await asyncio.sleep(0)

    def _commit(
        self, tx: Connection, *, request: StartRequest, key: str, now: datetime
    ) -> Committed | Conflict | None:
        """Store a start, unless its key has one.

        None: another process has just replaced that one.
        """
        before = starts.by_key(
            tx,
            workspace_id=request.workspace_id,
            operation=request.operation,
            technique_id=request.technique_id,
            idempotency_key=key,
        )
        if before is not None and before.request_hash != request.hash:
            return Conflict(before)
        if before is not None and before.state is not StartState.REFUSED:
            return Committed(before, is_repeat=True)
        token = secrets.token_hex(16)
        due_at = now + self._head_start
        body, callback_expected = request.to_body(key, token, own_url=self.callback_url)
        if before is not None:
            start = retry_refused(before, token=token, request=body, now=now)
            start = replace(start, metadata=request.metadata, due_at=due_at)
            return (
                Committed(start, is_repeat=False)
                if starts.replace_refused(tx, before.token, start)
                else None
            )
        start = Start(
            token=token,
            workspace_id=request.workspace_id,
            operation=request.operation,
            technique_id=request.technique_id,
            idempotency_key=key,
            request=body,
            request_hash=request.hash,
            metadata=request.metadata,
            callback_expected=callback_expected,
            state=StartState.ASKING,
            created_at=now,
            due_at=due_at,
        )
        starts.add_start(tx, start)
        return Committed(start, is_repeat=False)

    def _send_soon(self, start: Start, *, is_first: bool = False) -> None:
        if start.token in self._requests or self._stopped:
            return
        name = f"start {start.idempotency_key}"
        task = asyncio.create_task(self._send(start, is_first=is_first), name=name)
        self._requests[start.token] = task
        task.add_done_callback(lambda _: self._finish(start.token))

    def _finish(self, token: str) -> None:
        self._requests.pop(token, None)
        self._wake.set()

    async def _send(self, start: Start, *, is_first: bool) -> None:
        """Send one request to FLORA and commit the response.

        `is_first`: no request of this start was sent before, unless another process takes it up.
        """
        try:
            try:
                response = await self._post(start)
            except FloraError as error:
                is_first = is_first and (not self._head_start or self._clock() < start.due_at)
                await self._commit_error(start, error, is_first=is_first)
                return
            if response is None:
                await self._search(start)
                return
            await self._link_until_committed(start, response)
        except StoreUnavailableError as error:
            log.error("start.not_committed", key=start.idempotency_key, reason=str(error))
            # It stays due: do not send it in a tight loop.
            await asyncio.sleep(_RETRY_COMMIT_SECONDS)
        except Exception:
            log.exception("start.broken", key=start.idempotency_key)
            await asyncio.sleep(_AFTER_BUG_SECONDS)

    async def _post(self, start: Start) -> StartedRun | None:
        """Send the request, or return None if by now it could start a second run."""
        client, body = self._client(start.workspace_id), json.loads(start.request)

        def may_send() -> bool:  # the request may have waited long for a free slot
            return may_repeat(start, now=self._clock())

        if start.operation is Operation.TECHNIQUE_RUN:
            return await client.start_technique_run(start.technique_id, body, may_send=may_send)
        return await client.generate(body, idempotency_key=start.idempotency_key, may_send=may_send)

    async def _link_until_committed(self, start: Start, response: StartedRun) -> None:
        """Commit the response however long it takes.

        Once it is lost, the run has to be guessed from a list.
        """
        while True:
            try:
                await self._link(start, response.snapshot.run_id, response)
            except StoreUnavailableError as error:
                log.error("start.not_committed", key=start.idempotency_key, reason=str(error))
                await asyncio.sleep(_RETRY_COMMIT_SECONDS)
            else:
                return

    async def _commit_error(self, start: Start, error: FloraError, *, is_first: bool = False) -> None:
        now = self._clock()
        known = {
            "key": start.idempotency_key,
            "status": error.status,
            "code": error.code,
            "request_id": error.request_id,
        }
        reply = reply_of(error)
        if is_key_of_another(start, error, is_first=is_first):
            after = give_up_on_used_key(start, error)
            log.error("start.unknown", **known, fix=after.error_message)
        elif reply is Reply.EXISTS:
            log.warning("start.exists", **known)
            await self._search(start)
            return
        elif reply is Reply.DENIED:
            log.error("start.refused", **known, reason=str(error))
            after = refuse_start(start, error)
        else:
            log.warning("start.unanswered", **known, reason=str(error))
            after = defer_start(start, error, now=now, jitter=self._jitter())
        await self._database.write(lambda tx: starts.update_start(tx, after, only_in=_OPEN))
        if after.state is not StartState.ASKING:
            self._signals.changes.publish(Change("start", start.token, after.state.value))

    async def _link(self, start: Start, run_id: str, response: StartedRun | None = None) -> None:
        """Commit that the run belongs to the start, in the transaction that stores the run."""
        report = to_registration(start, run_id, self._clock())
        if response is not None:
            report = replace(
                report,
                project_id=response.snapshot.project_id,
                poll_url=response.snapshot.poll_url,
                quoted_cost=response.quoted_cost,
                estimated_seconds=response.estimated_seconds,
            )
        await self._intake.apply(report, start=start.token)
        log.info(
            "start.started",
            key=start.idempotency_key,
            run_id=run_id,
            technique_id=start.technique_id or None,
        )
        self._signals.changes.publish(Change("start", start.token, StartState.STARTED.value, run_id))

    async def _search(self, start: Start) -> None:
        """Find the run of a start in a list, and link them if only this run and start fit."""
        now = self._clock()
        runs: tuple[Snapshot, ...] = ()
        try:
            runs = await self._list_candidates(start, now)
        except FloraError as error:
            if reply_of(error) is Reply.UNCLEAR and may_repeat(start, now=now):
                await self._commit_error(start, error)
                return
            log.warning("start.not_searched", key=start.idempotency_key, reason=str(error))
        window = window_of(start, now=now)
        alike = await self._database.read(
            lambda tx: starts.count_unresolved_alike(tx, start, since=window.since, until=window.until)
        )
        current = await self.find(start.token)
        if current is None or current.state not in _OPEN:
            return  # its callback has named the run meanwhile
        if len(runs) == 1 and alike == 1:
            await self._link(start, runs[0].run_id)
            return
        if (later := search_later(start, now=now, jitter=self._jitter())) is not None:
            log.warning("start.not_found_yet", key=start.idempotency_key, candidates=len(runs), alike=alike)
            await self._database.write(lambda tx: starts.update_start(tx, later, only_in=_OPEN))
            return
        after = give_up_on(start)
        log.error("start.unknown", key=start.idempotency_key, candidates=len(runs), fix=after.error_message)
        await self._database.write(lambda tx: starts.update_start(tx, after, only_in=_OPEN))
        self._signals.changes.publish(Change("start", start.token, after.state.value))

    async def _list_candidates(self, start: Start, now: datetime) -> tuple[Snapshot, ...]:
        """Return the listed runs that fit the start and that the database does not know."""
        if start.operation is Operation.TECHNIQUE_RUN:
            scope = Scope(Listing.TECHNIQUE_RUNS, start.workspace_id or None, start.technique_id)
        else:
            scope = Scope(Listing.GENERATIONS, start.workspace_id or None)
        since = window_of(start, now=now).since
        found: list[Snapshot] = []
        pages = 0
        async for page in self._client(start.workspace_id).pages(scope):
            found += candidates(page.snapshots, start, now=now)
            oldest = page.snapshots[-1].created_at if page.snapshots else None
            pages += 1
            if pages == _MAX_PAGES or (oldest is not None and oldest < since):
                break
        ids = [snapshot.run_id for snapshot in found]
        unknown = set(await self._database.read(lambda tx: starts.unknown_to_ledger(tx, ids)))
        return tuple(
            {snapshot.run_id: snapshot for snapshot in found if snapshot.run_id in unknown}.values()
        )

    def _client(self, workspace_id: str) -> FloraClient:
        key = workspace_id if workspace_id in self._clients else None
        client = self._clients.get(key)
        if client is None:
            raise FloraError("there is no API key for this workspace", status=401, code="unauthorized")
        return client
