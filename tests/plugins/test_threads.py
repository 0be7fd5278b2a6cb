"""Threads: each handler has its own, so that its hanging calls delay nothing else."""

import asyncio
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import TypeVar

import pytest

from receiver.plugins.threads import MAX_THREADS, Threads, use_threads_of
from tests.support.patience import PATIENCE_SECONDS

ROOT = Path(__file__).parents[2]
T = TypeVar("T")


@pytest.fixture(autouse=True)
async def threads() -> AsyncIterator[Threads]:
    """The pool that the service sets, on the test's loop."""
    made = Threads()
    asyncio.get_running_loop().set_default_executor(made)
    yield made
    made.release_handlers()


async def own(handler: str, call: Callable[[], T]) -> T:
    """Call a function in a thread, as a handler's code does."""
    use_threads_of(handler)
    return await asyncio.to_thread(call)


async def test_a_handler_that_hangs_in_every_thread_delays_no_other(threads: Threads) -> None:
    """Other handlers, the service and lookups go on; its own further calls wait."""
    release, hanging = threading.Event(), threading.Semaphore(0)

    def hang() -> bool:
        hanging.release()
        return release.wait(PATIENCE_SECONDS)

    stuck = [asyncio.create_task(own("a", hang)) for _ in range(MAX_THREADS)]
    for _ in range(MAX_THREADS):
        await asyncio.to_thread(hanging.acquire)
    late = [asyncio.create_task(own("a", threading.get_ident)) for _ in range(3)]
    assert await asyncio.create_task(own("b", lambda: "b")) == "b"
    assert await asyncio.to_thread(lambda: "service") == "service"
    assert await asyncio.get_running_loop().getaddrinfo("localhost", 80)
    assert not any(task.done() for task in late)
    late[0].cancel()
    threads.release_handlers()  # as the service does when it stops, without waiting
    release.set()
    assert await asyncio.gather(*stuck) == [True] * MAX_THREADS
    assert len(await asyncio.gather(*late[1:])) == 2
    assert late[0].cancelled()


async def test_threads_are_used_again_and_started_as_they_are_needed() -> None:
    """Successive calls share few threads; concurrent calls have one each."""
    names = {await asyncio.create_task(own("a", threading.get_ident)) for _ in range(200)}
    assert len(names) < MAX_THREADS  # not one: it may still be on its way back when the next call comes
    meeting = threading.Barrier(8)
    await asyncio.gather(
        *(asyncio.create_task(own("a", lambda: meeting.wait(PATIENCE_SECONDS))) for _ in range(8))
    )


async def test_an_error_reaches_the_caller() -> None:
    def fail() -> None:
        raise SystemExit(3)

    with pytest.raises(SystemExit, match="3"):
        await own("a", fail)
    assert await own("a", lambda: threading.current_thread().name) == "handler a"


def test_a_hanging_call_does_not_keep_the_process() -> None:
    """The process ends although a handler's thread still waits."""
    program = """
import asyncio, threading
from receiver.plugins.threads import Threads, use_threads_of

async def attempt():
    use_threads_of("hangs")
    await asyncio.to_thread(threading.Event().wait)

async def main():
    asyncio.get_running_loop().set_default_executor(Threads())
    await asyncio.wait({asyncio.create_task(attempt())}, timeout=0.05)
    print([thread.name for thread in threading.enumerate()])

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
    assert (done.returncode, done.stdout, done.stderr) == (0, "['MainThread', 'handler hangs']\n", "")
