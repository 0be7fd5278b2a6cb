"""Plain Python functions as handlers: `use = "package.module:function"`. Built by the loader.

An `async def` runs on the event loop. Any other function gets a daemon thread of its own for each
call, not one of a shared pool: a function that hangs is abandoned when its time is over, delays no
other call, and does not keep the process alive.
"""

import asyncio
import contextvars
import inspect
import threading
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import CancelledError
from datetime import datetime
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict

from receiver.errors import AttemptOverError, DownloadRefusedError, HandlerLoadError
from receiver.handler import Answer, Artifact, Context, Done, Event, Log, Output, Retry, Saved, SettledRun

__all__ = ["BlockingContext", "FunctionFactory", "FunctionHandler", "NoOptions", "to_factory"]

READ_BYTES = 64 * 1024 * 1024

T = TypeVar("T")


class NoOptions(BaseModel):
    """The options of a function, and of a class without a `Config`: there are none."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class FunctionFactory:
    """Stands in for a handler class: it has a `Config`, and calling it makes the handler."""

    Config: ClassVar[type[BaseModel]] = NoOptions

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        self.__doc__ = inspect.getdoc(function)

    def __call__(self, config: BaseModel) -> "FunctionHandler":
        return FunctionHandler(self._function)


def to_factory(found: object, use: str) -> FunctionFactory:
    """Return the factory of a callable's handler.

    Raises HandlerLoadError where it cannot be one.
    """
    if not callable(found):
        kind = "a module" if inspect.ismodule(found) else f"of type {type(found).__name__}"
        raise HandlerLoadError(
            f"{use} is {kind}, and no handler: name a class with a `handle` method, or a function (run, context)"
        )
    generators = (inspect.isgeneratorfunction, inspect.isasyncgenfunction)
    if any(is_generator(each) for is_generator in generators for each in _callables(found)):
        raise HandlerLoadError(f"{use} yields; a handler returns None, a dict, Done, Retry or Reject")
    try:
        inspect.signature(found).bind("run", "context")
    except TypeError:
        raise HandlerLoadError(f"{use} cannot be called with (run, context)") from None
    except ValueError:  # some builtins have no signature
        raise HandlerLoadError(
            f"{use} does not name its parameters: wrap it in a function (run, context)"
        ) from None
    return FunctionFactory(found)


def _callables(function: Callable[..., Any]) -> tuple[object, object]:
    """Return the object and the `__call__` of its class: either may be the function itself."""
    return function, type(function).__call__


class FunctionHandler:
    """Calls a function (run, context). None or a mapping from it means Done."""

    Config: ClassVar[type[BaseModel]] = NoOptions

    def __init__(self, function: Callable[..., Any], *, threads: int = 8) -> None:
        self._function = function
        self._is_async = any(inspect.iscoroutinefunction(each) for each in _callables(function))
        self.threads = threads
        """The most threads at a time, including those that were abandoned."""
        self._running = 0

    async def handle(self, run: SettledRun, context: Context) -> Answer:
        answer: Any
        if self._is_async:
            answer = await self._function(run, context)
        elif self._running >= self.threads:
            return Retry(
                f"{self._running} earlier calls have not returned; the function should end by itself"
            )
        else:
            answer = await self._in_thread(run, context)
            if inspect.isawaitable(answer):  # a lambda around an `async def`, for example
                answer = await answer
        if answer is None:
            return Done()
        result: Answer = Done(answer) if isinstance(answer, Mapping) else answer
        return result

    async def _in_thread(self, run: SettledRun, context: Context) -> Any:
        loop = asyncio.get_running_loop()
        ended: asyncio.Future[tuple[Any, BaseException | None]] = loop.create_future()
        blocking = BlockingContext(context, loop)

        def finish(answer: Any, error: BaseException | None) -> None:
            self._running -= 1
            if ended.done():
                context.log.info("handler.returned_late")
            else:
                ended.set_result((answer, error))

        def work() -> None:
            answer, error = None, None
            try:
                answer = self._function(run, blocking)
            except BaseException as raised:
                error = raised
            try:
                loop.call_soon_threadsafe(finish, answer, error)
            except RuntimeError:  # the loop is closed, and nothing waits for this call
                return

        threading.Thread(
            target=contextvars.copy_context().run,
            args=(work,),
            name=f"handler-{context.handler}",
            daemon=True,
        ).start()
        self._running += 1
        try:
            answer, error = await ended
        finally:
            if not ended.done() or ended.cancelled():
                context.log.warning("handler.abandoned", threads=self._running)
            await blocking.end()
        if error is not None:
            raise error
        return answer


class BlockingContext:
    """The context of a plain function: `receiver.handler.Context` with blocking methods.

    Once the attempt is over every method raises AttemptOverError, so that an abandoned function has
    no further effect.
    """

    def __init__(self, context: Context, loop: asyncio.AbstractEventLoop) -> None:
        self._context = context
        self._loop = loop
        self._tasks: set[asyncio.Task[Any]] = set()
        self._over = False

    @property
    def handler(self) -> str:
        return self._context.handler

    @property
    def idempotency_key(self) -> str:
        return self._context.idempotency_key

    @property
    def event(self) -> Event:
        return self._context.event

    @property
    def attempt(self) -> int:
        return self._context.attempt

    @property
    def max_attempts(self) -> int:
        return self._context.max_attempts

    @property
    def deadline_at(self) -> datetime:
        return self._context.deadline_at

    @property
    def artifacts(self) -> Sequence[Artifact]:
        return self._context.artifacts

    @property
    def log(self) -> Log:
        return self._context.log

    def save(self, output: Output, path: Path) -> Saved:
        """Fetch an output into a new file; the file is removed if that fails."""
        return self._wait_for(lambda: self._context.save(output, Path(path)))

    def read(self, output: Output, max_bytes: int = READ_BYTES) -> bytes:
        """Return the bytes of an output. Raises DownloadRefusedError beyond `max_bytes`."""
        return self._wait_for(lambda: self._read(output, max_bytes))

    def stored(self) -> Sequence[Artifact]:
        """Return the artifacts that any handler has stored for this run, by position."""
        return self._wait_for(self._context.stored)

    def request(self) -> Mapping[str, Any] | None:
        """Return the request that started the run, or None if it was not started here."""
        return self._wait_for(self._context.request)

    def reserve(self, position: int, output_id: str, location: str, *, vacant: bool = False) -> None:
        """Claim a location before writing to it; committed on return."""
        self._wait_for(lambda: self._context.reserve(position, output_id, location, vacant=vacant))

    def store_artifact(self, position: int, *, size: int, sha256: str, content_type: str | None) -> None:
        """Record that the bytes at the reserved location are durable; committed on return."""
        self._wait_for(
            lambda: self._context.store_artifact(
                position, size=size, sha256=sha256, content_type=content_type
            )
        )

    async def end(self) -> None:
        """End the attempt: cancel the running calls and wait until they have cleaned up."""
        self._over = True
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)

    async def _read(self, output: Output, max_bytes: int) -> bytes:
        parts = bytearray()
        async with self._context.open(output) as download:
            async for chunk in download:
                parts += chunk
                if len(parts) > max_bytes:
                    raise DownloadRefusedError(f"the output is larger than {max_bytes} bytes")
        return bytes(parts)

    def _wait_for(self, call: Callable[[], Awaitable[T]]) -> T:
        """Run a call on the event loop and wait for its result in this thread."""
        running = self._run_tracked(call)
        try:
            future = asyncio.run_coroutine_threadsafe(running, self._loop)
        except RuntimeError:  # the loop is closed
            running.close()
            raise AttemptOverError("the service has stopped") from None
        try:
            return future.result()
        except CancelledError:
            raise AttemptOverError("the attempt's time is over") from None

    async def _run_tracked(self, call: Callable[[], Awaitable[T]]) -> T:
        task = asyncio.current_task()
        if self._over or task is None:
            raise AttemptOverError("the attempt's time is over")
        self._tasks.add(task)
        try:
            return await call()
        finally:
            self._tasks.discard(task)
