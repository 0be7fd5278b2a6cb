"""One attempt of a handler: what it is given, how it is called, what its answer is worth. Called by the dispatcher."""

import asyncio
import json
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, assert_never

import structlog

from receiver.decide import Backoff
from receiver.handler import Answer, Done, Handler, Log, Reject, Retry, SettledRun
from receiver.model import Artifact, DispatchState, Output, Run, storable_text
from receiver.net.download import Download, Downloader, Saved, save
from receiver.net.media_urls import conceal_urls
from receiver.plugins.progress import TransferProgress
from receiver.plugins.threads import use_threads_of
from receiver.store import Database, queue, starts
from receiver.store.queue import Leased
from receiver.telemetry import scrub

_GRACE_SECONDS = 5.0
"""How long a handler may take to clean up once its attempt is cancelled."""
_MAX_REASON = 1000
_MAX_RESULT = 256 * 1024
"""Characters of JSON: room for what a program printed, not for a media file."""
_OURS = frozenset({"callback_url", "idempotency_key"})
"""Of the body of a start: between us and FLORA, the token of the start among it."""


@dataclass(frozen=True, slots=True)
class Registration:
    """A configured handler: the object, and its limits."""

    name: str
    handler: Handler
    max_attempts: int
    timeout_seconds: float
    concurrency: int
    backoff: Backoff


async def call_handler(handler: Handler, run: SettledRun, context: "AttemptContext", timeout_seconds: float) -> Answer:
    """Call a handler and return its answer, whatever it does: raising, hanging and answering rubbish mean Retry.

    It gets a task of its own, so that one which swallows its cancellation is left behind, not waited for.
    """
    task = asyncio.create_task(_guarded(handler, run, context))
    try:
        await asyncio.wait({task}, timeout=timeout_seconds)
        if not task.done():
            task.cancel()
            await asyncio.wait({task}, timeout=_GRACE_SECONDS)
            if not task.done():
                context.log.error("handler.ignores_cancellation")
            return Retry(f"it took longer than {timeout_seconds:g} s")
    except asyncio.CancelledError:
        task.cancel()
        await asyncio.wait({task}, timeout=_GRACE_SECONDS)
        raise
    if task.cancelled():
        return Retry("it cancelled itself")
    answer = task.result()
    if isinstance(answer, Done | Retry | Reject):
        return storable(answer, _media(run))
    return Retry(f"it returned {type(answer).__name__} instead of Done, Retry or Reject")


async def _guarded(handler: Handler, run: SettledRun, context: "AttemptContext") -> object:
    use_threads_of(context.handler)
    try:
        return await handler.handle(run, context)
    except asyncio.CancelledError:
        raise
    except BaseException as error:
        # Libraries quote the URL that failed, or its path, which only we can tell for a media URL.
        context.log.warning("handler.raised", exception=conceal_urls(_traced(error), _media(run)))
        return Retry(_described(error))


def storable(answer: Answer, media: Sequence[str] = ()) -> Answer:
    """Return an answer that the ledger can hold: a plug-in may put anything into it, and must not lose its lease so.

    What it says shows no secret and no media URL; `media` are those of the run.
    """
    try:
        match answer:
            case Done(result=result):
                return Done(_kept(result, media))
            case Retry(reason=reason, after_seconds=after, reread=reread):
                return Retry(_text(reason, media), None if after is None else float(after), reread is True)
            case Reject(reason=reason):
                return Reject(_text(reason, media))
    except Exception as error:
        what = f"what it answered cannot be kept: {type(error).__name__}"
        # The effect of Done is applied: only what it says about itself is lost.
        if isinstance(answer, Done):
            return Done({"result": what})
        return Reject(what) if isinstance(answer, Reject) else Retry(what)
    assert_never(answer)


def _kept(result: Mapping[str, Any], media: Sequence[str]) -> Mapping[str, Any]:
    """Return a result as strict JSON values, without media URLs."""
    text = json.dumps(dict(result), default=str, ensure_ascii=False)
    if len(text) > _MAX_RESULT:
        return {"result": f"what it answered is too long to be kept: {len(text)} characters"}
    text = storable_text(conceal_urls(text, media))
    kept: Mapping[str, Any] = json.loads(text, parse_constant=lambda _: None)
    return kept


def _text(value: object, media: Sequence[str]) -> str:
    return storable_text(scrub(conceal_urls(str(value), media)))[:_MAX_REASON]


def _media(run: SettledRun) -> list[str]:
    return [output.value for output in run.outputs if not output.is_text]


def _traced(error: BaseException) -> str:
    return "".join(traceback.format_exception(error)).rstrip()


def _described(error: BaseException) -> str:
    try:
        return f"{type(error).__name__}: {error}"
    except Exception:
        return type(error).__name__


def to_dispatch_state(answer: Answer) -> DispatchState:
    match answer:
        case Done():
            return DispatchState.DONE
        case Retry():
            return DispatchState.READY
        case Reject():
            return DispatchState.DEAD


def to_settled_run(run: Run, outputs: Sequence[Output]) -> SettledRun:
    """Return a run as its handlers see it."""
    settled_at = run.settled_at or run.first_seen_at
    called = run.reported_at is not None and run.reported_at <= settled_at
    return SettledRun(
        run_id=run.run_id,
        run_type=run.run_type or "unknown",
        status=run.state.value,
        technique_id=run.technique_id,
        workspace_id=run.workspace_id,
        project_id=run.project_id,
        outputs=tuple(outputs),
        metadata=run.metadata,
        charged_cost=run.charged_cost,
        error_code=run.error_code,
        error_message=run.error_message,
        created_at=run.created_at,
        started_at=run.started_at,
        completed_at=run.completed_at or settled_at,
        settled_at=settled_at,
        settled_by="callback" if called else "poll",
        verdict=run.verdict and run.verdict.value,
        version=run.version,
    )


class AttemptContext:
    """What one attempt gives its handler; see `receiver.handler.Context`."""

    def __init__(
        self,
        database: Database,
        downloader: Downloader,
        leased: Leased,
        registration: Registration,
        deadline_at: datetime,
        clock: Callable[[], datetime],
        progress: TransferProgress,
    ) -> None:
        self._progress = progress
        self._database = database
        self._downloader = downloader
        self._leased = leased
        self._clock = clock
        self.handler = registration.name
        self.idempotency_key = leased.dispatch.idempotency_key
        self.event = leased.dispatch.event
        self.attempt = leased.dispatch.attempts
        self.max_attempts = registration.max_attempts
        self.deadline_at = deadline_at
        self.artifacts: Sequence[Artifact] = leased.artifacts
        bound: Mapping[str, Any] = {
            "run_id": leased.run.run_id,
            "handler": registration.name,
            "attempt": leased.dispatch.attempts,
        }
        self.log: Log = structlog.get_logger("receiver.handler").bind(**bound)

    def open(self, output: Output) -> AbstractAsyncContextManager[Download]:
        return self._progress.track(output, self._downloader.open(output))

    async def save(self, output: Output, path: Path) -> Saved:
        async with self.open(output) as download:
            return await save(download, path)

    async def stored(self) -> Sequence[Artifact]:
        run_id = self._leased.run.run_id
        found = await self._database.read(lambda tx: queue.artifacts_of_run(tx, run_id))
        return [artifact for artifact in found if artifact.stored_at is not None]

    async def request(self) -> Mapping[str, Any] | None:
        run_id = self._leased.run.run_id
        body = await self._database.read(lambda tx: starts.request_of(tx, run_id))
        if body is None:
            return None
        return {name: value for name, value in json.loads(body).items() if name not in _OURS}

    async def reserve(self, position: int, output_id: str, location: str) -> None:
        run_id, handler = self._leased.run.run_id, self._leased.dispatch.handler
        await self._database.write(
            lambda tx: queue.reserve_location(tx, run_id, handler, position, output_id, location)
        )

    async def store_artifact(self, position: int, *, size: int, sha256: str, content_type: str | None) -> None:
        run_id, handler, now = self._leased.run.run_id, self._leased.dispatch.handler, self._clock()
        await self._database.write(
            lambda tx: queue.store_artifact(
                tx, run_id, handler, position, size=size, sha256=sha256, content_type=content_type, now=now
            )
        )
        self._progress.stored(position)
