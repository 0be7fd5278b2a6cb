"""The threads behind `asyncio.to_thread` and name look-ups. Each handler has its own of them.

The loop has one pool for all, and a thread cannot be stopped: a handler whose calls hang (a dead mount, a library without
a time limit) would soon hold every one, and FLORA's name could not be looked up any more. The service sets `Threads` as
the loop's default; whatever calls a handler says whose threads it needs with `use_threads_of`.
"""

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import ContextVar
from functools import partial
from typing import Any, ParamSpec, TypeVar

__all__ = ["MOST", "Threads", "use_threads_of"]

MOST = 32
"""Threads of one handler: as many as asyncio's own pool has at most."""

_OWNER: ContextVar[str | None] = ContextVar("owner", default=None)

P = ParamSpec("P")
T = TypeVar("T")


def use_threads_of(handler: str) -> None:
    """Have the current task, and all that it starts, use the threads of a handler."""
    _OWNER.set(handler)


class Threads(ThreadPoolExecutor):
    """The service's pool, and one beside it for each handler that needs any."""

    def __init__(self) -> None:
        super().__init__(thread_name_prefix="service")
        self._of: dict[str, _Daemons] = {}

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        owner = _OWNER.get()
        if owner is None:
            return super().submit(fn, *args, **kwargs)
        if owner not in self._of:
            self._of[owner] = _Daemons(owner)
        return self._of[owner].submit(partial(fn, *args, **kwargs))

    def release_handlers(self) -> None:
        """Have the handlers' threads end when they are done; nobody waits for them."""
        while self._of:
            self._of.popitem()[1].end()

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        self.release_handlers()
        super().shutdown(wait, cancel_futures=cancel_futures)


class _Daemons:
    """A pool whose threads do not keep the process, started when there is work and none is idle."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._work: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._idle = threading.Semaphore(0)
        self._started = 0

    def submit(self, call: Callable[[], T]) -> Future[T]:
        future: Future[T] = Future()
        self._work.put(partial(_settle, future, call))
        if not self._idle.acquire(blocking=False) and self._started < MOST:
            self._started += 1
            threading.Thread(target=self._serve, name=f"handler {self._name}", daemon=True).start()
        return future

    def end(self) -> None:
        for _ in range(self._started):
            self._work.put(None)

    def _serve(self) -> None:
        while (work := self._next()) is not None:
            work()
            del work  # what it holds must not live until the next

    def _next(self) -> Callable[[], None] | None:
        try:
            return self._work.get_nowait()
        except queue.Empty:
            self._idle.release()  # not before: a thread that counts as idle must be free for what comes
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
