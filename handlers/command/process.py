"""One program, from its start to the end of its last process. Blocks; for the handler `command`.

A program leads its own session and process group. It is reaped last: as long as it is a zombie, no
other group can have its number, and a signal to the group reaches no other process.
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

_CHUNK_BYTES = 64 * 1024
_TICK_SECONDS = 0.1
_FLOOD_SECONDS = 0.001
"""Pause after a full chunk, so that a program that floods does not slow the service down."""
_LINGER_SECONDS = 1.0
"""How long children of a program may go on writing after the program itself has ended."""
_REAP_SECONDS = 10.0
"""How long to wait for a killed program. One that is stuck in the kernel is left behind."""


@dataclass(frozen=True, slots=True)
class Exit:
    """How a program ended. `code` is negative for a signal, None if not known."""

    code: int | None
    tail: bytes
    """The last bytes that the program and its children wrote."""
    size: int
    """How many bytes they wrote in total."""


class Process:
    """A program to be run once. `run` returns when it is gone; `stop` may be called at any time."""

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
        self._stop_requested = threading.Event()
        self._code: int | None = None

    def stop(self) -> None:
        """Send SIGTERM to the program's group, and SIGKILL after the grace period."""
        self._stop_requested.set()

    def run(self, on_start: Callable[[int], None]) -> Exit:
        """Run the program until no process of its group is left; `on_start` gets its process id.

        OSError if it cannot be started.
        """
        reader, writer = os.pipe()
        try:
            try:
                child = self._start(writer)
            finally:
                os.close(writer)
            try:
                on_start(child.pid)
                self._watch(child, reader)
            finally:
                self._finish(child, reader)
        finally:
            os.close(reader)
        return Exit(self._code, self._tail.bytes(), self._tail.size)

    def _start(self, output: int) -> subprocess.Popen[bytes]:
        # The child inherits this thread's signal mask, which may block SIGTERM.
        mask = signal.pthread_sigmask(signal.SIG_SETMASK, ())
        try:
            with self._stdin.open("rb") as source:  # not a pipe: the program need not read it
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
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    def _watch(self, child: subprocess.Popen[bytes], reader: int) -> None:
        """Collect output until the program has ended, or the grace period after `stop` is over."""
        until, is_stopping, has_ended = float("inf"), False, False
        with selectors.DefaultSelector() as selector:
            selector.register(reader, selectors.EVENT_READ)
            while (now := time.monotonic()) < until:
                if not is_stopping and self._stop_requested.is_set():
                    _send_signal(child, signal.SIGTERM)
                    is_stopping, until = True, min(until, now + self._grace_seconds)
                if not has_ended and self._has_ended(child):
                    has_ended, until = True, min(until, now + _LINGER_SECONDS)
                if self._tail.at_end:
                    if has_ended:
                        return
                    self._pause(is_stopping=is_stopping)
                    continue
                wait = min(_TICK_SECONDS, max(0.0, until - now))
                if selector.select(wait) and self._tail.read(reader) == _CHUNK_BYTES:
                    time.sleep(_FLOOD_SECONDS)

    def _pause(self, *, is_stopping: bool) -> None:
        """Wait briefly for a program that has closed its output."""
        if is_stopping:
            time.sleep(_TICK_SECONDS / 10)
        else:
            self._stop_requested.wait(_TICK_SECONDS / 10)

    def _finish(self, child: subprocess.Popen[bytes], reader: int) -> None:
        """Kill what is left of the group, read its last output, and reap the program."""
        _send_signal(child, signal.SIGKILL)
        until = time.monotonic() + _LINGER_SECONDS
        with selectors.DefaultSelector() as selector:
            selector.register(reader, selectors.EVENT_READ)
            while not self._tail.at_end and (left := until - time.monotonic()) > 0:
                if selector.select(left):
                    self._tail.read(reader)
        until = time.monotonic() + _REAP_SECONDS
        while not self._has_ended(child) and time.monotonic() < until:
            time.sleep(_TICK_SECONDS / 10)
        with suppress(subprocess.TimeoutExpired):
            child.wait(0)

    def _has_ended(self, child: subprocess.Popen[bytes]) -> bool:
        """Whether the program has ended. Reaps it only without waitid (macOS, Python < 3.13)."""
        if not hasattr(os, "waitid"):
            self._code = child.poll()
            return self._code is not None
        try:
            status = os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:  # reaped elsewhere, or the service was started with SIGCHLD ignored
            return True
        if status is None:
            return False
        self._code = status.si_status if status.si_code == os.CLD_EXITED else -status.si_status
        return True


class _Tail:
    """The last bytes of a stream of any length."""

    def __init__(self, limit: int) -> None:
        self.size = 0
        self.at_end = False
        self._limit = limit
        self._bytes = bytearray()

    def read(self, fd: int) -> int:
        chunk = os.read(fd, _CHUNK_BYTES)
        self.at_end = not chunk
        self.size += len(chunk)
        self._bytes += chunk
        if len(self._bytes) > self._limit + _CHUNK_BYTES:
            del self._bytes[: -self._limit or None]
        return len(chunk)

    def bytes(self) -> bytes:
        return bytes(self._bytes[-self._limit :]) if self._limit else b""


def _send_signal(child: subprocess.Popen[bytes], number: signal.Signals) -> None:
    with suppress(ProcessLookupError, PermissionError):  # gone, or it runs as another user
        os.killpg(child.pid, number)
