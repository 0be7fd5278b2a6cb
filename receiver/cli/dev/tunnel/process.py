"""Runs a tunnel's program: in a process group of its own, its lines read as they come, and never left behind.

The group's leader is a shell that holds a lifeline to us: when it is cut, be it that this process was killed, the whole
group is ended. Called by the providers that are programs.
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

__all__ = ["Program"]

_GRACE_SECONDS = 2.0
_QUIET_SECONDS = 1.0
_KEPT = 200
_SHOWN = 15
_LONGEST = 4000
_COLOUR = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
_LINE_END = re.compile(rb"[\r\n]+")

# Children in the background: the program, and one that reads the lifeline and ends the group when it is cut.
_LEADER = """
exec 3<&0 </dev/null
"$@" 3<&- &
program=$!
(cat <&3; trap '' TERM; kill -s TERM 0; sleep 2; kill -s KILL 0) >/dev/null 2>&1 &
exec 3<&-
wait "$program"
"""


class Program:
    """One run of a program. `start` it, `find` what it prints, `stop` it."""

    def __init__(self, name: str, process: asyncio.subprocess.Process, lifeline: int) -> None:
        self._name = name
        self._process = process
        self._lifeline: int | None = lifeline
        self._lines: deque[str] = deque(maxlen=_KEPT)
        self._wanted: list[tuple[re.Pattern[str], asyncio.Future[re.Match[str]]]] = []
        self._reader = asyncio.create_task(self._read(), name=f"tunnel {name}")

    @classmethod
    async def start(cls, arguments: Sequence[str]) -> "Program":
        """Start it. Raises TunnelError where there is no such program."""
        if shutil.which(arguments[0]) is None:
            raise TunnelError(f"there is no program {arguments[0]!r} on the PATH: install it, or choose another way")
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
            if isinstance(error, OSError):  # no memory, no more files
                raise TunnelError(f"{arguments[0]} could not be started: {error.strerror}") from error
            raise
        finally:
            os.close(theirs)
        return cls(arguments[0], process, ours)

    @property
    def printed(self) -> tuple[str, ...]:
        """The last lines that it printed."""
        return tuple(self._lines)[-_SHOWN:]

    async def find(self, pattern: re.Pattern[str], *, within_seconds: float) -> re.Match[str]:
        """Return the first match in its lines, past ones included. Raises TunnelError when it ends, or time is up."""
        for line in self._lines:
            if match := pattern.search(line):
                return match
        if self._reader.done():
            raise await self._ended_early()
        future: asyncio.Future[re.Match[str]] = asyncio.get_running_loop().create_future()
        self._wanted.append((pattern, future))
        try:
            await wait_for_any(future, self._reader, timeout=within_seconds)
            if future.done():
                return future.result()
            if self._reader.done():
                raise await self._ended_early()
            message = f"{self._name} did not print what was waited for within {within_seconds:g} s"
            raise TunnelError(message, printed=self.printed)
        finally:
            self._wanted.remove((pattern, future))
            future.cancel()

    async def ended(self) -> str:
        """Return how it ended, once it has."""
        await asyncio.wait({self._reader})
        return f"{self._name} ended{await self._code()}"

    async def stop(self) -> None:
        """End the whole group: SIGTERM, and SIGKILL for what is left (a stopped process does not hear the first)."""
        if self._lifeline is None:
            return
        self._signal(signal.SIGTERM)
        await asyncio.wait({self._reader}, timeout=_GRACE_SECONDS)
        self._signal(signal.SIGKILL)
        os.close(self._lifeline)
        self._lifeline = None
        await asyncio.wait({self._reader}, timeout=_GRACE_SECONDS)
        self._reader.cancel()
        await self._code()

    def _signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, number)

    async def _ended_early(self) -> TunnelError:
        return TunnelError(f"{self._name} ended{await self._code()}", printed=self.printed)

    async def _code(self) -> str:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_GRACE_SECONDS):
                return f" with exit code {await self._process.wait()}"
        return ""

    async def _read(self) -> None:
        stream, rest = self._process.stdout, b""
        assert stream is not None, "it was started with a pipe"
        while True:
            try:
                async with asyncio.timeout(_QUIET_SECONDS if rest else None):
                    piece = await stream.read(4096)
            except TimeoutError:  # it waits at the end of a line that it does not end
                self._take(rest)
                rest = b""
                continue
            if not piece:
                break
            *lines, rest = _LINE_END.split(rest + piece)
            if len(rest) > _LONGEST:
                lines, rest = [*lines, rest], b""
            for line in lines:
                self._take(line)
        self._take(rest)

    def _take(self, raw: bytes) -> None:
        line = _COLOUR.sub("", raw.decode("utf-8", "replace")).rstrip()
        if not line:
            return
        self._lines.append(line)
        for pattern, future in self._wanted:
            if not future.done() and (match := pattern.search(line)):
                future.set_result(match)
