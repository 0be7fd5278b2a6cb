"""One attempt of a handler: its context, its call, and the check of its answer.

Called by the dispatcher.
"""

import asyncio
import json
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, assert_never

import structlog

from receiver.decide import Backoff
from receiver.errors import DownloadFailedError
from receiver.handler import Answer, Context, Done, Handler, Log, Reject, Retry, SettledRun, growing_pause
from receiver.model import Artifact, DispatchState, Output, Run, storable_text
from receiver.net.download import Download, Downloader, Saved, save
from receiver.net.media_urls import conceal_urls
from receiver.net.scrubber import scrub
from receiver.plugins.progress import TransferProgress
from receiver.plugins.threads import use_threads_of
from receiver.store import Database, queue, starts
from receiver.store.queue import Leased

_GRACE_SECONDS = 5.0
"""How long a handler may take to clean up once its attempt is cancelled."""
_MAX_REASON = 1000
_MAX_RESULT = 256 * 1024
"""Characters of JSON: enough for the output of a program, not for a media file."""
_INTERNAL_FIELDS = frozenset({"callback_url", "idempotency_key"})
"""Fields of a start request that handlers do not see; the callback URL contains the start's token.
"""


@dataclass(frozen=True, slots=True)
class Registration:
    """A configured handler with its limits."""

    name: str
    handler: Handler
    max_attempts: int
    timeout_seconds: float
    concurrency: int
    backoff: Backoff


async def call_handler(
    handler: Handler, run: SettledRun, context: Context, timeout_seconds: float
) -> Answer:
    """Call a handler and return its answer in a form that the ledger can store.

    An exception, a time-out or an answer of another type becomes Retry. The handler runs in a task
    of its own: one that ignores its cancellation is abandoned, not waited for.
    """
    conceal = partial(conceal_urls, urls=[each.value for each in run.outputs if not each.is_text])
    task = asyncio.create_task(_handle(handler, run, context, conceal))
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
    if not isinstance(answer, Done | Retry | Reject):
        return Retry(f"it returned {type(answer).__name__} instead of Done, Retry or Reject")
    return _to_storable(answer, conceal)


async def _handle(
    handler: Handler, run: SettledRun, context: Context, conceal: Callable[[str], str]
) -> object:
    use_threads_of(context.handler)
    try:
        return await handler.handle(run, context)
    except asyncio.CancelledError:
        raise
    except BaseException as error:
        # Libraries quote the URL that failed, or its path alone, which only a comparison with the
        # run's URLs recognizes.
        context.log.warning("handler.raised", exception=conceal(_format_traceback(error)))
        if isinstance(error, DownloadFailedError):
            pause = growing_pause(error.retry_after_seconds, context.attempt)
            return Retry(_describe(error), pause, reread=error.expired)
        return Retry(_describe(error))


def _to_storable(answer: Answer, conceal: Callable[[str], str]) -> Answer:
    """Return an answer without secrets and media URLs, in values that the ledger can store.

    It never raises: a plug-in may put anything into its answer, and must not lose its lease by it.
    """
    try:
        match answer:
            case Done(result=result):
                return Done(_to_json(result, conceal))
            case Retry(reason=reason, after_seconds=after, reread=reread):
                seconds = None if after is None else float(after)
                return Retry(_to_reason(reason, conceal), seconds, reread is True)
            case Reject(reason=reason):
                return Reject(_to_reason(reason, conceal))
    except Exception as error:
        problem = f"its answer cannot be stored: {type(error).__name__}"
        # The effect of Done is applied: only its description is lost.
        if isinstance(answer, Done):
            return Done({"result": problem})
        return Reject(problem) if isinstance(answer, Reject) else Retry(problem)
    assert_never(answer)


def _to_json(result: Mapping[str, Any], conceal: Callable[[str], str]) -> Mapping[str, Any]:
    """Return a result as strict JSON values."""
    text = json.dumps(dict(result), default=str, ensure_ascii=False)
    if len(text) > _MAX_RESULT:
        return {"result": f"its result is too long to be stored: {len(text)} characters"}
    values: Mapping[str, Any] = json.loads(storable_text(conceal(text)), parse_constant=lambda _: None)
    return values


def _to_reason(value: object, conceal: Callable[[str], str]) -> str:
    return storable_text(scrub(conceal(str(value))))[:_MAX_REASON]


def _format_traceback(error: BaseException) -> str:
    return "".join(traceback.format_exception(error)).rstrip()


def _describe(error: BaseException) -> str:
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
    """Return a run as handlers see it."""
    settled_at = run.settled_at or run.first_seen_at
    by_callback = run.reported_at is not None and run.reported_at <= settled_at
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
        settled_by="callback" if by_callback else "poll",
        verdict=run.verdict and run.verdict.value,
        version=run.version,
    )


class AttemptContext:
    """The context of one attempt; implements `receiver.handler.Context`."""

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
            "attempt": leased.dispatch.last_attempt,
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
        return {name: value for name, value in json.loads(body).items() if name not in _INTERNAL_FIELDS}

    async def reserve(self, position: int, output_id: str, location: str, *, vacant: bool = False) -> None:
        run_id, handler = self._leased.run.run_id, self._leased.dispatch.handler
        await self._database.write(
            lambda tx: queue.reserve_location(
                tx, run_id, handler, position, output_id, location, vacant=vacant
            )
        )

    async def store_artifact(
        self, position: int, *, size: int, sha256: str, content_type: str | None
    ) -> None:
        run_id, handler, now = self._leased.run.run_id, self._leased.dispatch.handler, self._clock()
        await self._database.write(
            lambda tx: queue.store_artifact(
                tx, run_id, handler, position, size=size, sha256=sha256, content_type=content_type, now=now
            )
        )
        self._progress.mark_stored(position)
