"""Starts runs at FLORA and takes up runs that others started. `start` and `track` are called by the API; `run` recovers.

The intent is committed before FLORA is asked, the answer after it. Whatever happens in between, the same bytes are asked
again under the same key, and the token in the callback's URL names the run even if no answer is ever heard.
"""

import asyncio
import json
import random
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

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

_AT_ONCE = 64
_MAX_PAGES = 20
"""Pages that are searched for the run of a start without a response: the newest two thousand."""
_OPEN = (StartState.ASKING, StartState.UNKNOWN)
_PAUSE_SECONDS = 1.0
"""Between two tries to commit what FLORA answered."""
_AFTER_BUG_SECONDS = 5.0
_GRACE_SECONDS = 5.0
"""How long a question that is on its way may take to be answered once we stop."""


@dataclass(frozen=True, slots=True)
class Intended:
    """The intent is committed; `repeated`: it was before, and nothing is started now."""

    start: Start
    repeated: bool


@dataclass(frozen=True, slots=True)
class Conflict:
    """The key was used before, for something else."""

    start: Start


class Starter:
    """Starts and tracks. `callback_url` is ours as FLORA must call it; None: there is none, and runs are polled.

    Whoever commits an intent asks FLORA at once. `head_start` is how long it has for that before the process that recovers
    starts asks too; none is needed where there is one process.
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
        """May change while we run: what is started from then on is told the new one."""
        self._head_start = head_start
        self._clock = clock
        self._jitter = jitter
        self._asking: dict[str, asyncio.Task[None]] = {}
        self._wake = asyncio.Event()
        self._stopped = False

    async def start(self, request: StartRequest) -> Intended | Conflict:
        """Commit the intent and return it; FLORA is asked at once, see `settled` for its answer.

        The same key for the same request returns what became of it, and starts nothing; a refused one is asked again.
        """
        now = self._clock()
        key = request.idempotency_key or f"auto-{secrets.token_hex(16)}"

        def commit(tx: Connection) -> Intended | Conflict | None:
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
                return Intended(before, repeated=True)
            token = secrets.token_hex(16)
            body, expected = request.body(key, token, ours=self.callback_url)
            if before is not None:
                again = retry_refused(before, token=token, request=body, now=now)
                again = replace(again, metadata=request.metadata, due_at=now + self._head_start)
                replaced = starts.replace_refused(tx, before.token, again)
                return Intended(again, repeated=False) if replaced else None
            new = Start(
                token=token,
                workspace_id=request.workspace_id,
                operation=request.operation,
                technique_id=request.technique_id,
                idempotency_key=key,
                request=body,
                request_hash=request.hash,
                metadata=request.metadata,
                callback_expected=expected,
                state=StartState.ASKING,
                created_at=now,
                due_at=now + self._head_start,
            )
            starts.add_start(tx, new)
            return Intended(new, repeated=False)

        answer = None
        while answer is None:
            try:
                answer = await self._database.write(commit)
            except IntegrityError:  # another process has just used the key: now its start is seen
                answer = await self._database.write(commit)
        if isinstance(answer, Conflict) or answer.start.state is not StartState.ASKING:
            return answer
        if not answer.repeated or answer.start.due_at <= now:
            self._ask_soon(answer.start)
        return answer

    async def settled(self, token: str, *, timeout_seconds: float) -> Start | None:
        """Return a start as soon as FLORA has answered it, or as it stands when the time is over."""
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

    async def technique(self, technique_id: str, *, workspace_id: str = "") -> Technique:
        """Return what FLORA says about a technique. Raises FloraError."""
        return await self._client(workspace_id).technique(technique_id)

    async def track(self, registration: RunRegistered) -> Run:
        """Take up a run that someone else started, before or after its callback came."""
        await self._intake.apply(registration)
        run_id = registration.run_id
        return (await self._database.read(lambda tx: ledger.runs_by_id(tx, [run_id])))[run_id]

    async def resolve(self, token: str, run_id: str | None) -> Start | None:
        """Take an operator's word for what became of a start: this run, or (None) no run at all."""
        start = await self.find(token)
        if start is None or start.state is StartState.STARTED:
            return start
        if run_id is not None:
            await self._link(start, run_id)
        else:
            gone = replace(
                start, state=StartState.REFUSED, error_code="resolved", error_message="no run, says an operator"
            )
            await self._database.write(lambda tx: starts.update_start(tx, gone, only_in=_OPEN))
        self._signals.changes.publish(Change("start", token, StartState.STARTED.value if run_id else "refused"))
        return await self.find(token)

    async def run(self, stopping: asyncio.Event) -> None:
        """Ask again about what was not answered, until told to stop; then ask nothing more."""
        await self.recover(stopping)
        await self.stop()

    async def recover(self, stopping: asyncio.Event) -> None:
        """Ask again about what was not answered, by this process or by one that is gone, until told to stop."""
        await run_loop(
            "starter",
            lambda: self.tick(self._clock()),
            stopping,
            wake=self._wake,
            retry_seconds=self._idle_seconds,
        )

    async def ask_own(self, stopping: asyncio.Event) -> None:
        """Ask about what is started here, until told to stop: where another process recovers."""
        await stopping.wait()
        await self.stop()

    async def stop(self) -> None:
        """Ask nothing more: what is asked for from here on is committed, and asked by the next process."""
        self._stopped = True
        if self._asking:
            await asyncio.wait(set(self._asking.values()), timeout=_GRACE_SECONDS)
        for task in self._asking.values():
            task.cancel()
        await self.drain()

    async def tick(self, now: datetime) -> float:
        """Ask about every start that is due, and return in how many seconds to look again."""
        busy = set(self._asking)  # what these are answered while we read, the read may not show
        for start in await self._database.read(lambda tx: starts.due_starts(tx, now=now, limit=_AT_ONCE + len(busy))):
            if start.token not in busy:
                self._ask_soon(start)
        next_ms = await self._database.read(starts.next_attempt_due_ms)
        until = self._idle_seconds if next_ms is None else (from_ms(next_ms) - now).total_seconds()
        return min(self._idle_seconds, until) if until > 0 else self._idle_seconds

    async def drain(self) -> None:
        """Wait until FLORA is being asked nothing."""
        while self._asking:
            await asyncio.wait(set(self._asking.values()))
            await asyncio.sleep(0)

    def _ask_soon(self, start: Start) -> None:
        if start.token in self._asking or self._stopped:
            return
        task = asyncio.create_task(self._ask(start), name=f"start {start.idempotency_key}")
        self._asking[start.token] = task
        task.add_done_callback(lambda _: self._asked(start.token))

    def _asked(self, token: str) -> None:
        self._asking.pop(token, None)
        self._wake.set()

    async def _ask(self, start: Start) -> None:
        """Ask FLORA once and commit what it answered."""
        try:
            try:
                answer = await self._post(start)
            except FloraError as error:
                await self._refused(start, error)
                return
            if answer is None:
                await self._look_for(start)
                return
            await self._link_surely(start, answer)
        except StoreUnavailableError as error:
            log.error("start.not_committed", key=start.idempotency_key, reason=str(error))
            await asyncio.sleep(_PAUSE_SECONDS)  # it stays due: do not ask FLORA in circles
        except Exception:
            log.exception("start.broken", key=start.idempotency_key)
            await asyncio.sleep(_AFTER_BUG_SECONDS)

    async def _post(self, start: Start) -> StartedRun | None:
        """Ask, or return None if asking again could start a second run by now."""
        client, body = self._client(start.workspace_id), json.loads(start.request)

        def may_send() -> bool:  # the request may have waited long for a free slot
            return may_repeat(start, now=self._clock())

        if start.operation is Operation.TECHNIQUE_RUN:
            return await client.start_technique_run(start.technique_id, body, may_send=may_send)
        return await client.generate(body, idempotency_key=start.idempotency_key, may_send=may_send)

    async def _link_surely(self, start: Start, answer: StartedRun) -> None:
        """Commit the answer however long that takes: once forgotten, it has to be guessed from a list."""
        while True:
            try:
                await self._link(start, answer.snapshot.run_id, answer)
            except StoreUnavailableError as error:
                log.error("start.not_committed", key=start.idempotency_key, reason=str(error))
                await asyncio.sleep(_PAUSE_SECONDS)
            else:
                return

    async def _refused(self, start: Start, error: FloraError) -> None:
        now = self._clock()
        known = {
            "key": start.idempotency_key, "status": error.status, "code": error.code, "request_id": error.request_id,
        }  # fmt: skip
        reply = reply_of(error)
        if reply is Reply.EXISTS:
            log.warning("start.exists", **known)
            await self._look_for(start)
            return
        if reply is Reply.DENIED:
            log.error("start.refused", **known, reason=str(error))
            after = refuse_start(start, error)
        else:
            log.warning("start.unanswered", **known, reason=str(error))
            after = defer_start(start, error, now=now, jitter=self._jitter())
        await self._database.write(lambda tx: starts.update_start(tx, after, only_in=_OPEN))
        if after.state is not StartState.ASKING:
            self._signals.changes.publish(Change("start", start.token, after.state.value))

    async def _link(self, start: Start, run_id: str, answer: StartedRun | None = None) -> None:
        """Commit that this run is this start's, in the run's own transaction."""
        now = self._clock()
        report = to_registration(start, run_id, now)
        if answer is not None:
            report = replace(
                report,
                project_id=answer.snapshot.project_id,
                poll_url=answer.snapshot.poll_url,
                quoted_cost=answer.quoted_cost,
                estimated_seconds=answer.estimated_seconds,
            )
        await self._intake.apply(report, start=start.token)
        log.info("start.started", key=start.idempotency_key, run_id=run_id, technique_id=start.technique_id or None)
        self._signals.changes.publish(Change("start", start.token, StartState.STARTED.value, run_id))

    async def _look_for(self, start: Start) -> None:
        """FLORA has a run of this key and did not name it: link it if exactly one run and one start fit."""
        now = self._clock()
        fitting: tuple[Snapshot, ...] = ()
        try:
            fitting = await self._fitting(start, now)
        except FloraError as error:
            if reply_of(error) is Reply.UNCLEAR and may_repeat(start, now=now):
                await self._refused(start, error)
                return
            log.warning("start.not_searched", key=start.idempotency_key, reason=str(error))
        window = window_of(start, now=now)
        alike = await self._database.read(
            lambda tx: starts.count_unresolved_alike(tx, start, since=window.since, until=window.until)
        )
        current = await self.find(start.token)
        if current is None or current.state not in _OPEN:
            return  # its callback named its run meanwhile
        if len(fitting) == 1 and alike == 1:
            await self._link(start, fitting[0].run_id)
            return
        if (later := search_later(start, now=now, jitter=self._jitter())) is not None:
            log.warning("start.not_found_yet", key=start.idempotency_key, candidates=len(fitting), alike=alike)
            await self._database.write(lambda tx: starts.update_start(tx, later, only_in=_OPEN))
            return
        after = give_up_on(start)
        log.error("start.unknown", key=start.idempotency_key, candidates=len(fitting), cure=after.error_message)
        await self._database.write(lambda tx: starts.update_start(tx, after, only_in=_OPEN))
        self._signals.changes.publish(Change("start", start.token, after.state.value))

    async def _fitting(self, start: Start, now: datetime) -> tuple[Snapshot, ...]:
        """Return the listed runs that could be this start's and that the ledger does not know."""
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
        return tuple({snapshot.run_id: snapshot for snapshot in found if snapshot.run_id in unknown}.values())

    def _client(self, workspace_id: str) -> FloraClient:
        key = workspace_id if workspace_id in self._clients else None
        client = self._clients.get(key)
        if client is None:
            raise FloraError("there is no API key for this workspace", status=401, code="unauthorized")
        return client
