"""Plain functions as handlers: what they may return, and that a hanging one delays nothing else."""

import asyncio
import contextvars
import functools
import hashlib
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from receiver.config import Settings
from receiver.errors import AttemptOverError, ConfigError
from receiver.handler import (
    Context,
    Done,
    DownloadRefusedError,
    LocationTakenError,
    Reject,
    Retry,
    SettledRun,
)
from receiver.plugins.attempt import call_handler
from receiver.plugins.functions import BlockingContext, FunctionHandler
from receiver.plugins.loader import load_handlers
from tests.support.core import until
from tests.support.handler_kit import RUN, MemoryContext
from tests.support.media import MediaServer, Page, page
from tests.support.patience import PATIENCE_SECONDS

HERE = __name__
ROOT = Path(__file__).parents[2]
LOUD: contextvars.ContextVar[str] = contextvars.ContextVar("LOUD", default="")

ContextOf = Callable[..., MemoryContext]


async def polite(run: SettledRun, context: Context) -> dict[str, str]:
    return {"run": run.run_id, "key": context.idempotency_key}


def plain(run: SettledRun, context: BlockingContext) -> dict[str, Any]:
    assert threading.current_thread().daemon
    return {"run": run.run_id, "key": context.idempotency_key, "thread": threading.current_thread().name}


def yield_numbers(run: SettledRun, context: BlockingContext) -> Iterator[int]:
    yield 1


def narrow(run: SettledRun) -> None:
    """Takes too little."""


def with_extra(extra: str, run: SettledRun, context: BlockingContext) -> dict[str, str]:
    return {"extra": extra}


class Caller:
    """An object that can be called, as decorators make them."""

    async def __call__(self, run: SettledRun, context: Context) -> Done:
        return Done({"by": type(self).__name__, "key": f"{run.run_id} {context.event}"})


class Classy:
    """No function, and no handler either."""


caller = Caller()
partial = functools.partial(with_extra, "more")
anonymous = lambda run, context: polite(run, context)  # noqa: E731, PLW0108  # the test is of a lambda
number = 3


def handler_of(name: str, **more: Any) -> Any:
    """Load a function of this module as the settings name it."""
    entry = {"use": f"{HERE}:{name}", "name": name.lower(), **more}
    (loaded,) = load_handlers(Settings.model_validate({"handlers": [entry]}))
    return loaded.registration.handler


@pytest.mark.parametrize(
    ("name", "result"),
    [
        ("polite", {"run": "run_1", "key": "run_1:test:settled:0"}),
        ("plain", {"run": "run_1", "key": "run_1:test:settled:0", "thread": "handler-test"}),
        ("caller", {"by": "Caller", "key": "run_1 settled"}),
        ("partial", {"extra": "more"}),
        ("anonymous", {"run": "run_1", "key": "run_1:test:settled:0"}),
    ],
)
async def test_every_callable_with_run_and_context_is_a_handler(
    name: str, result: dict[str, Any], context_of: ContextOf
) -> None:
    """Async on the loop, plain in a thread of its own; objects, partials and lambdas too."""
    assert await handler_of(name).handle(RUN, context_of()) == Done(result)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("Classy", "a class without a `handle` method"),
        ("number", "or a function (run, context)"),
        ("narrow", "cannot be called with (run, context)"),
        ("yield_numbers", "yields"),
        ("absent", "cannot be imported"),
    ],
)
def test_an_object_that_is_no_handler_is_reported(name: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        handler_of(name)
    (problem,) = caught.value.problems
    assert problem.path == "handlers.0.use"
    assert words in problem.message


def test_a_function_has_no_options() -> None:
    """An unknown option is a problem."""
    with pytest.raises(ConfigError, match="no option of this handler"):
        handler_of("plain", options={"size": 1})


@pytest.mark.parametrize("is_async", [True, False])
@pytest.mark.parametrize(
    ("returned", "answer"),
    [
        (None, Done()),
        ({"a": 1}, Done({"a": 1})),
        (Done({"b": 2}), Done({"b": 2})),
        (Retry("later", 5), Retry("later", 5)),
        (Reject("never"), Reject("never")),
        (True, Retry("it returned bool instead of Done, Retry or Reject")),
        ("text", Retry("it returned str instead of Done, Retry or Reject")),
    ],
)
async def test_what_a_function_returns(
    returned: Any, answer: Any, is_async: bool, context_of: ContextOf
) -> None:
    """None and a mapping are Done, answers are themselves, and all else is a reported mistake."""

    async def asynchronous(run: SettledRun, context: Context) -> Any:
        return returned

    def plain_function(run: SettledRun, context: BlockingContext) -> Any:
        return returned

    assert (
        await run_attempt(FunctionHandler(asynchronous if is_async else plain_function), context_of())
        == answer
    )


async def run_attempt(handler: FunctionHandler, context: MemoryContext, seconds: float = 30) -> Any:
    return await call_handler(handler, RUN, context, seconds)


@pytest.mark.parametrize(
    "error", [ValueError("no"), SystemExit("no"), KeyboardInterrupt("no"), StopIteration("no")]
)
async def test_an_exception_of_a_function_means_retry(error: BaseException, context_of: ContextOf) -> None:
    """Also one that would end a program or a coroutine."""

    def fail(run: SettledRun, context: BlockingContext) -> None:
        raise error

    answer = await run_attempt(FunctionHandler(fail), context_of())
    assert isinstance(answer, Retry)
    assert "no" in answer.reason or "StopIteration" in answer.reason


async def test_a_download_that_fails_in_a_function_is_retried_as_it_should_be(
    media: MediaServer, context_of: ContextOf
) -> None:
    """An expired URL has the run read again, and a pause that the server asks for is kept."""

    def read(run: SettledRun, blocking: BlockingContext) -> None:
        blocking.read(gone if blocking.attempt == 1 else busy)

    gone = media.output("/gone", page(b"", status="410 Gone"))
    busy = media.output("/busy", page(b"", "text/plain", "Retry-After: 90", status="503 Busy"))
    first = await run_attempt(FunctionHandler(read), context_of())
    second = await run_attempt(FunctionHandler(read), context_of(attempt=2))
    assert isinstance(first, Retry)
    assert isinstance(second, Retry)
    assert (first.reread, first.after_seconds) == (True, None)
    assert (second.reread, second.after_seconds) == (False, 90)


async def test_a_plain_function_has_the_whole_context(
    media: MediaServer, context_of: ContextOf, tmp_path: Path
) -> None:
    """Its calls block and return results; context variables are passed on to its thread."""
    image = media.output("/a.png", page(b"bytes" * 1000))
    context = context_of(asked={"inputs": []})
    LOUD.set("heard")

    def whole(run: SettledRun, blocking: BlockingContext) -> dict[str, Any]:
        saved = blocking.save(image, tmp_path / "a.png")
        blocking.reserve(0, "out", "file:///a.png")
        blocking.store_artifact(0, size=saved.size, sha256=saved.sha256, content_type=saved.content_type)
        with pytest.raises(LocationTakenError):
            blocking.reserve(1, "out", "file:///a.png")
        with pytest.raises(DownloadRefusedError, match="4999 bytes"):
            blocking.read(image, max_bytes=4999)
        blocking.log.info("all.there")
        return {
            "read": hashlib.sha256(blocking.read(image)).hexdigest() == saved.sha256,
            "stored": [each.location for each in blocking.stored()],
            "request": blocking.request(),
            "known": (blocking.handler, blocking.event.value, blocking.attempt, blocking.max_attempts),
            "until": blocking.deadline_at,
            "own": len(blocking.artifacts),
            "loud": LOUD.get(),
        }

    answer = await run_attempt(FunctionHandler(whole), context)
    assert answer == Done(
        {
            "read": True,
            "stored": ["file:///a.png"],
            "request": {"inputs": []},
            "known": ["test", "settled", 1, 5],  # as the ledger keeps it
            "until": str(context.deadline_at),
            "own": 1,
            "loud": "heard",
        }
    )
    assert ("info", "all.there", {}) in context.log.lines


async def test_a_function_that_hangs_is_abandoned(context_of: ContextOf) -> None:
    """Its attempt ends in time, and further calls are refused while all its threads hang."""
    release = threading.Event()
    refused: list[Exception] = []

    def hang(run: SettledRun, context: BlockingContext) -> None:
        release.wait()
        try:
            context.reserve(0, "out", "file:///late")
        except AttemptOverError as error:
            refused.append(error)

    handler = FunctionHandler(hang, threads=1)
    context = context_of()
    assert await run_attempt(handler, context, 0.05) == Retry("it took longer than 0.05 s")
    assert [line[1] for line in context.log.lines] == ["handler.abandoned"]
    second = await run_attempt(handler, context_of(), 0.05)
    assert second == Retry("1 earlier calls have not returned; the function should end by itself")
    release.set()
    # The loop hears of the return after the function's last line.
    await until(lambda: context.log.lines[-1][1] == "handler.returned_late")
    assert len(refused) == 1
    assert not context.records
    assert await run_attempt(handler, context_of()) == Done()


async def test_a_running_download_is_cleaned_up(
    media: MediaServer, context_of: ContextOf, tmp_path: Path
) -> None:
    """When its time is over, no partial file is left, and the function gets an error."""
    slow = media.output("/slow", Page(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nshort", hold=True))
    heard = threading.Event()

    def save_output(run: SettledRun, context: BlockingContext) -> None:
        try:
            context.save(slow, tmp_path / "file")
        except AttemptOverError:
            heard.set()

    task = asyncio.create_task(FunctionHandler(save_output).handle(RUN, context_of()))
    await media.held.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not (tmp_path / "file").exists()
    assert await asyncio.to_thread(heard.wait, 10)


def test_a_hanging_function_does_not_keep_the_process(tmp_path: Path) -> None:
    """Shutdown ends, with exit code 0, while a function still sleeps."""
    program = """
import asyncio, threading
from types import SimpleNamespace
from receiver.plugins.functions import FunctionHandler

class Log:
    def __getattr__(self, name): return lambda *values, **more: None

async def main():
    handler = FunctionHandler(lambda run, context: threading.Event().wait())
    context = SimpleNamespace(handler="hangs", log=Log())
    try:
        await asyncio.wait_for(handler.handle(None, context), 0.05)
    except TimeoutError:
        print("left behind", threading.active_count())

asyncio.run(main())
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "left behind 2\n", "")


async def test_a_function_that_hangs_takes_no_shared_thread(context_of: ContextOf) -> None:
    """Every call has its own thread, none of the loop's, which disk and name lookups need."""
    release = threading.Event()
    seen: list[str] = []

    def hang(run: SettledRun, context: BlockingContext) -> None:
        release.wait()
        seen.append(threading.current_thread().name)

    handler = FunctionHandler(hang, threads=40)
    calls = [asyncio.create_task(handler.handle(RUN, context_of())) for _ in range(40)]
    assert await asyncio.to_thread(lambda: "free") == "free"
    release.set()
    assert await asyncio.gather(*calls) == [Done()] * 40
    assert seen == ["handler-test"] * 40


async def test_the_limit_on_threads_is_the_handler_s_own() -> None:
    """As many calls as the settings allow at a time."""
    assert handler_of("plain", concurrency=3).threads == 3
    assert handler_of("plain").threads == 8
