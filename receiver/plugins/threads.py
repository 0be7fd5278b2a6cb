"""Threads for `asyncio.to_thread` and name look-ups, a pool for each handler.

The event loop has one pool for everything, and a thread cannot be stopped: a handler whose calls
hang (a dead mount, a library without a time limit) would soon occupy every thread, and not even
FLORA's name could be looked up. The service sets `Threads` as the loop's default executor;
code that calls a handler selects the handler's threads with `use_threads_of`.
"""

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import ContextVar
from functools import partial
from typing import Any, ParamSpec, TypeVar

__all__ = ["MAX_THREADS", "Threads", "use_threads_of"]

MAX_THREADS = 32
"""Threads of one handler: the most that asyncio's own pool has."""

_HANDLER: ContextVar[str | None] = ContextVar("handler", default=None)

P = ParamSpec("P")
T = TypeVar("T")


def use_threads_of(handler: str) -> None:
    """Make the current task, and every task it starts, use the threads of a handler."""
    _HANDLER.set(handler)


class Threads(ThreadPoolExecutor):
    """The service's own pool, and one for each handler that needs threads."""

    def __init__(self) -> None:
        super().__init__(thread_name_prefix="service")
        self._pools: dict[str, _DaemonPool] = {}

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        handler = _HANDLER.get()
        if handler is None:
            return super().submit(fn, *args, **kwargs)
        if handler not in self._pools:
            self._pools[handler] = _DaemonPool(handler)
        return self._pools[handler].submit(partial(fn, *args, **kwargs))

    def release_handlers(self) -> None:
        """Let the handlers' threads end with their current work, without waiting for them."""
        while self._pools:
            self._pools.popitem()[1].end()

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        self.release_handlers()
        super().shutdown(wait, cancel_futures=cancel_futures)


class _DaemonPool:
    """A pool of daemon threads, which do not keep the process alive.

    A thread is started when there is work and no thread is idle.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._work: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._idle = threading.Semaphore(0)
        self._started = 0

    def submit(self, call: Callable[[], T]) -> Future[T]:
        future: Future[T] = Future()
        self._work.put(partial(_settle, future, call))
        if not self._idle.acquire(blocking=False) and self._started < MAX_THREADS:
            self._started += 1
            threading.Thread(target=self._serve, name=f"handler {self._name}", daemon=True).start()
        return future

    def end(self) -> None:
        for _ in range(self._started):
            self._work.put(None)

    def _serve(self) -> None:
        while (work := self._next()) is not None:
            work()
            del work  # or its references would live until the next work arrives

    def _next(self) -> Callable[[], None] | None:
        try:
            return self._work.get_nowait()
        except queue.Empty:
            self._idle.release()  # only now: a thread that counts as idle must be free
            return self._work.get()


def _settle(future: Future[Any], call: Callable[[], Any]) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        result = call()
    except BaseException as error:
        future.set_exception(error)
    else:
        future.set_result(result)
