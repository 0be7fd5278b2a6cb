"""Runs a tunnel program in a process group of its own, reads its output, and always ends it.

The leader of the group is a shell that reads from a pipe to this process. When the pipe closes,
even because this process was killed, the shell ends the whole group.
"""

import asyncio
import contextlib
import os
import re
import shutil
import signal
from collections import deque
from collections.abc import Sequence

from receiver.errors import TunnelError
from receiver.workers.loop import wait_for_any

__all__ = ["Program", "ProgramTunnel"]

_GRACE_SECONDS = 2.0
_QUIET_SECONDS = 1.0
_MAX_LINES = 200
_MAX_PRINTED = 15
_MAX_LINE_BYTES = 4000
_COLOUR = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
_LINE_END = re.compile(rb"[\r\n]+")

# Two background children: the program, and a reader that ends the group when the pipe closes.
_LEADER = """
exec 3<&0 </dev/null
"$@" 3<&- &
program=$!
(cat <&3; trap '' TERM; kill -s TERM 0; sleep 2; kill -s KILL 0) >/dev/null 2>&1 &
exec 3<&-
wait "$program"
"""


class Program:
    """One run of a program: `start` it, `find` something in its output, `stop` it."""

    def __init__(self, name: str, process: asyncio.subprocess.Process, lifeline: int) -> None:
        self._name = name
        self._process = process
        self._lifeline: int | None = lifeline
        self._lines: deque[str] = deque(maxlen=_MAX_LINES)
        self._wanted: list[tuple[re.Pattern[str], asyncio.Future[re.Match[str]]]] = []
        self._reader = asyncio.create_task(self._read(), name=f"tunnel {name}")

    @classmethod
    async def start(cls, arguments: Sequence[str]) -> "Program":
        """Start the program. Raises TunnelError if it is not installed or cannot be started."""
        if shutil.which(arguments[0]) is None:
            message = f"there is no program {arguments[0]!r} on the PATH; install it"
            raise TunnelError(message)
        theirs, ours = os.pipe()
        try:
            process = await asyncio.create_subprocess_exec(
                "sh", "-c", _LEADER, "sh", *arguments,
                stdin=theirs,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.STDOUT,
                start_new_session=True,
            )  # fmt: skip
        except BaseException as error:
            os.close(ours)
            if isinstance(error, OSError):  # out of memory or file descriptors
                raise TunnelError(f"{arguments[0]} could not be started: {error.strerror}") from error
            raise
        finally:
            os.close(theirs)
        return cls(arguments[0], process, ours)

    @property
    def printed(self) -> tuple[str, ...]:
        """The last lines of the program's output."""
        return tuple(self._lines)[-_MAX_PRINTED:]

    async def find(self, pattern: re.Pattern[str], *, within_seconds: float) -> re.Match[str]:
        """Return the first match in the output, earlier lines included.

        Raises TunnelError if the program ends first, or after `within_seconds`.
        """
        for line in self._lines:
            if match := pattern.search(line):
                return match
        if self._reader.done():
            raise await self._early_end()
        future: asyncio.Future[re.Match[str]] = asyncio.get_running_loop().create_future()
        self._wanted.append((pattern, future))
        try:
            await wait_for_any(future, self._reader, timeout=within_seconds)
            if future.done():
                return future.result()
            if self._reader.done():
                raise await self._early_end()
            message = f"{self._name} did not print the expected line within {within_seconds:g} s"
            raise TunnelError(message, printed=self.printed)
        finally:
            self._wanted.remove((pattern, future))
            future.cancel()

    async def wait_closed(self) -> str:
        """Wait until the program ends; return how it ended."""
        await asyncio.wait({self._reader})
        return f"{self._name} ended{await self._exit_code()}"

    async def stop(self) -> None:
        """End the group with SIGTERM, then SIGKILL: a stopped process does not handle the first."""
        if self._lifeline is None:
            return
        self._signal(signal.SIGTERM)
        await asyncio.wait({self._reader}, timeout=_GRACE_SECONDS)
        self._signal(signal.SIGKILL)
        os.close(self._lifeline)
        self._lifeline = None
        await asyncio.wait({self._reader}, timeout=_GRACE_SECONDS)
        self._reader.cancel()
        await self._exit_code()

    def _signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, number)

    async def _early_end(self) -> TunnelError:
        return TunnelError(f"{self._name} ended{await self._exit_code()}", printed=self.printed)

    async def _exit_code(self) -> str:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_GRACE_SECONDS):
                return f" with exit code {await self._process.wait()}"
        return ""

    async def _read(self) -> None:
        stream, rest = self._process.stdout, b""
        assert stream is not None, "the program is started with a pipe"
        while True:
            try:
                async with asyncio.timeout(_QUIET_SECONDS if rest else None):
                    chunk = await stream.read(4096)
            except TimeoutError:  # the last line may be a prompt without a line end
                self._add_line(rest)
                rest = b""
                continue
            if not chunk:
                break
            *lines, rest = _LINE_END.split(rest + chunk)
            if len(rest) > _MAX_LINE_BYTES:
                lines, rest = [*lines, rest], b""
            for line in lines:
                self._add_line(line)
        self._add_line(rest)

    def _add_line(self, raw: bytes) -> None:
        line = _COLOUR.sub("", raw.decode("utf-8", "replace")).rstrip()
        if not line:
            return
        self._lines.append(line)
        for pattern, future in self._wanted:
            if not future.done() and (match := pattern.search(line)):
                future.set_result(match)


class ProgramTunnel:
    """Base of the providers that run a program."""

    def __init__(self) -> None:
        self._program: Program | None = None

    async def wait_closed(self) -> str:
        assert self._program is not None, "the tunnel is open"
        return await self._program.wait_closed()

    async def close(self) -> None:
        if self._program is not None:
            program, self._program = self._program, None
            await program.stop()
