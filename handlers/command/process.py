"""One program, from its start to the end of its last process. Blocks, so it runs in a thread; for `handlers.command`.

A program leads a session and a process group of its own. Nobody waits for the program's end by reaping it: while it is
a zombie, the number of its group belongs to no other, and a signal to the group hits nobody else.
"""

import os
import selectors
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

CHUNK_BYTES = 64 * 1024
TICK_SECONDS = 0.1
FLOOD_SECONDS = 0.001
"""The pause after a chunk that was full: a program that floods must wait, not the service's other work."""
LINGER_SECONDS = 1.0
"""How long what a program has started may go on writing when the program itself has ended."""
REAP_SECONDS = 10.0
"""How long a killed program may take to be gone: one that is stuck in the kernel is left there."""


@dataclass(frozen=True, slots=True)
class Ended:
    """How a program ended. `code` is negative for a signal, None where the system did not tell."""

    code: int | None
    tail: bytes
    """The last bytes that it and its children wrote."""
    size: int
    """How many they wrote in all."""


class Process:
    """A program that is not started yet. `run` starts it and returns when it is gone; `stop` may come at any time."""

    def __init__(
        self,
        arguments: Sequence[str],
        *,
        directory: Path,
        environment: Mapping[bytes, bytes],
        stdin: Path,
        keep_bytes: int,
        grace_seconds: float,
    ) -> None:
        self._arguments = [argument.encode(errors="surrogateescape") for argument in arguments]
        self._directory = directory
        self._environment = environment
        self._stdin = stdin
        self._tail = _Tail(keep_bytes)
        self._grace_seconds = grace_seconds
        self._stop = threading.Event()
        self._code: int | None = None

    def stop(self) -> None:
        """Have the program's group told to end, and killed after the grace."""
        self._stop.set()

    def run(self, started: Callable[[int], None]) -> Ended:
        """Run the program, once `started` has its number; OSError where it cannot be started.

        Afterwards nothing of its group is left.
        """
        reader, writer = os.pipe()
        try:
            try:
                child = self._start(writer)
            finally:
                os.close(writer)
            try:
                started(child.pid)
                self._watch(child, reader)
            finally:
                self._finish(child, reader)
        finally:
            os.close(reader)
        return Ended(self._code, self._tail.bytes(), self._tail.size)

    def _start(self, output: int) -> subprocess.Popen[bytes]:
        # The child inherits the mask of this thread: whoever started the service may have blocked SIGTERM.
        before = signal.pthread_sigmask(signal.SIG_SETMASK, ())
        try:
            with self._stdin.open("rb") as source:  # a file, not a pipe: whoever does not read it hurts nobody
                return subprocess.Popen(
                    self._arguments,
                    stdin=source,
                    stdout=output,
                    stderr=output,
                    cwd=self._directory,
                    env=self._environment,
                    close_fds=True,
                    restore_signals=True,
                    start_new_session=True,
                )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def _watch(self, child: subprocess.Popen[bytes], reader: int) -> None:
        """Collect output until the program has ended, or has been told to and the grace is over."""
        until, asked, ended = float("inf"), False, False
        with selectors.DefaultSelector() as selector:
            selector.register(reader, selectors.EVENT_READ)
            while (now := time.monotonic()) < until:
                if not asked and self._stop.is_set():
                    _signal(child, signal.SIGTERM)
                    asked, until = True, min(until, now + self._grace_seconds)
                if not ended and self._has_ended(child):
                    ended, until = True, min(until, now + LINGER_SECONDS)
                if self._tail.ended:
                    if ended:
                        return
                    self._pause(asked=asked)
                    continue
                wait = min(TICK_SECONDS, max(0.0, until - now))
                if selector.select(wait) and self._tail.read(reader) == CHUNK_BYTES:
                    time.sleep(FLOOD_SECONDS)

    def _pause(self, *, asked: bool) -> None:
        """Wait a moment for a program that has closed its output."""
        if asked:
            time.sleep(TICK_SECONDS / 10)
        else:
            self._stop.wait(TICK_SECONDS / 10)

    def _finish(self, child: subprocess.Popen[bytes], reader: int) -> None:
        """Kill what is left of the group, keep what it had written, and reap the program."""
        _signal(child, signal.SIGKILL)
        until = time.monotonic() + LINGER_SECONDS
        with selectors.DefaultSelector() as selector:
            selector.register(reader, selectors.EVENT_READ)
            while not self._tail.ended and (left := until - time.monotonic()) > 0:
                if selector.select(left):
                    self._tail.read(reader)
        until = time.monotonic() + REAP_SECONDS
        while not self._has_ended(child) and time.monotonic() < until:
            time.sleep(TICK_SECONDS / 10)
        with suppress(subprocess.TimeoutExpired):
            child.wait(0)

    def _has_ended(self, child: subprocess.Popen[bytes]) -> bool:
        """Look whether the program has ended, without reaping it where the system can do that (macOS before 3.13 not)."""
        if not hasattr(os, "waitid"):
            self._code = child.poll()
            return self._code is not None
        try:
            found = os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:  # somebody else has reaped it, or the service was started with SIGCHLD ignored
            return True
        if found is None:
            return False
        self._code = found.si_status if found.si_code == os.CLD_EXITED else -found.si_status
        return True


class _Tail:
    """The last bytes of a stream of any length."""

    def __init__(self, keep: int) -> None:
        self.size = 0
        self.ended = False
        self._keep = keep
        self._kept = bytearray()

    def read(self, fd: int) -> int:
        chunk = os.read(fd, CHUNK_BYTES)
        self.ended = not chunk
        self.size += len(chunk)
        self._kept += chunk
        if len(self._kept) > self._keep + CHUNK_BYTES:
            del self._kept[: -self._keep or None]
        return len(chunk)

    def bytes(self) -> bytes:
        return bytes(self._kept[-self._keep :]) if self._keep else b""


def _signal(child: subprocess.Popen[bytes], number: signal.Signals) -> None:
    with suppress(ProcessLookupError, PermissionError):  # gone already, or it has become another user
        os.killpg(child.pid, number)
