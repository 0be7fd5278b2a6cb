"""Keeps a tunnel open: checks it every 30 seconds and reopens it when that may help.

Everything that happens is reported as a `TunnelEvent`. `DevSession` shows the events, uses the new
URL for later runs, and reads the runs whose callbacks may have been missed.
"""

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from receiver.cli.dev.tunnel.diagnosis import Diagnosis
from receiver.cli.dev.tunnel.provider import LocalEndpoint, Provider
from receiver.errors import TunnelError
from receiver.workers.loop import wait_for_any

__all__ = [
    "OpenFailed",
    "SystemResumed",
    "Timing",
    "TunnelChecked",
    "TunnelClosed",
    "TunnelEvent",
    "TunnelOpened",
    "TunnelSupervisor",
]

_SLICE_SECONDS = 1.0
_JUMP_SECONDS = 5.0
"""If the wall clock runs this far ahead of a wait, the machine was suspended."""


@dataclass(frozen=True, slots=True)
class TunnelOpened:
    """The tunnel is open. `moved`: its URL changed, and earlier runs call a URL that is gone."""

    url: str
    moved: bool = False


@dataclass(frozen=True, slots=True)
class TunnelClosed:
    """The tunnel is closed and will be reopened."""

    reason: str


@dataclass(frozen=True, slots=True)
class OpenFailed:
    """The tunnel could not be reopened; the next attempt follows in `retry_seconds`."""

    reason: str
    retry_seconds: float


@dataclass(frozen=True, slots=True)
class TunnelChecked:
    """A check is complete.

    `is_new`: the diagnosis differs from the previous one. `has_recovered`: callbacks arrive again.
    """

    diagnosis: Diagnosis
    is_new: bool
    has_recovered: bool


@dataclass(frozen=True, slots=True)
class SystemResumed:
    """The machine was suspended for `seconds`."""

    seconds: float


TunnelEvent = TunnelOpened | TunnelClosed | OpenFailed | TunnelChecked | SystemResumed


@dataclass(frozen=True, slots=True)
class Timing:
    """The intervals of a supervisor, in seconds."""

    check: float = 30.0
    confirm: float = 1.0
    """From a canary that was lost to the one that confirms the fault."""
    settle: float = 25.0
    """How long a new tunnel may take until its first canary arrives."""
    settle_check: float = 2.0
    max_retry: float = 60.0
    """Pauses between attempts to reopen a tunnel double from 1 to this."""


class TunnelSupervisor:
    """Opens, checks, reopens and closes one tunnel.

    `check` sends the canaries to a URL and returns the diagnosis; `report` receives every event and
    is awaited before the supervisor goes on.
    """

    def __init__(
        self,
        provider: Provider,
        local: LocalEndpoint,
        *,
        check: Callable[[str], Awaitable[Diagnosis]],
        report: Callable[[TunnelEvent], Awaitable[None]],
        timing: Timing | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._provider = provider
        self._local = local
        self._check_url = check
        self._report = report
        self._timing = timing or Timing()
        self._clock = clock
        self._url: str | None = None
        self._opened_at = 0.0
        self._is_proven = False
        """Whether a canary has arrived since the tunnel was opened."""
        self._last: Diagnosis | None = None

    async def open(self) -> str:
        """Open the tunnel and return its URL. Raises TunnelError."""
        url = await self._provider.open(self._local)
        before, self._url = self._url, url
        self._opened_at, self._is_proven = asyncio.get_running_loop().time(), False
        await self._report(TunnelOpened(url, moved=before not in {None, url}))
        return url

    async def run(self, stopping: asyncio.Event) -> None:
        """Check the tunnel and replace it when it fails; close it once `stopping` is set."""
        try:
            while not stopping.is_set():
                if (reason := await self._watch(stopping)) is not None:
                    await self._replace(reason, stopping)
        finally:
            await self._provider.close()

    async def _watch(self, stopping: asyncio.Event) -> str | None:
        """Check repeatedly; return why the tunnel must be reopened, or None to stop."""
        closed = asyncio.create_task(self._provider.wait_closed(), name="tunnel closed")
        try:
            pause = 0.0
            while True:
                await self._sleep(pause, stopping, closed)
                if stopping.is_set():
                    return None
                if closed.done():
                    return closed.result()
                diagnosis = await self._check()
                if not diagnosis.can_reopen:
                    pause = self._timing.check
                elif self._is_settling():
                    pause = self._timing.settle_check
                else:
                    await self._sleep(self._timing.confirm, stopping, closed)
                    diagnosis = await self._check()
                    if diagnosis.can_reopen:
                        return diagnosis.reason
                    pause = self._timing.check
        finally:
            closed.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait({closed})

    def _is_settling(self) -> bool:
        """Return whether a new tunnel may still become reachable: names and routes take a while."""
        age = asyncio.get_running_loop().time() - self._opened_at
        return not self._is_proven and age < self._timing.settle

    async def _check(self) -> Diagnosis:
        assert self._url is not None, "the tunnel was opened"
        diagnosis = await self._check_url(self._url)
        self._is_proven = self._is_proven or diagnosis.is_open
        if diagnosis.can_reopen and self._is_settling():
            return diagnosis  # expected of a new tunnel: not reported
        last, self._last = self._last, diagnosis
        is_new = last is None or (last.fault, last.code) != (diagnosis.fault, diagnosis.code)
        has_recovered = diagnosis.is_open and last is not None and not last.is_open
        await self._report(TunnelChecked(diagnosis, is_new=is_new, has_recovered=has_recovered))
        return diagnosis

    async def _replace(self, reason: str, stopping: asyncio.Event) -> None:
        """Close the tunnel and try to reopen it until that succeeds."""
        await self._report(TunnelClosed(reason))
        await self._provider.close()
        pause = 1.0
        while not stopping.is_set():
            try:
                await self.open()
            except TunnelError as error:
                await self._report(OpenFailed(str(error), pause))
                await self._sleep(pause, stopping)
                pause = min(pause * 2, self._timing.max_retry)
            else:
                return

    async def _sleep(
        self, seconds: float, stopping: asyncio.Event, closed: asyncio.Task[str] | None = None
    ) -> None:
        """Wait; return early to stop, if the tunnel closes, or if the machine was suspended."""
        left = seconds
        while left > 0:
            part, began = min(left, _SLICE_SECONDS), self._clock()
            await wait_for_any(stopping, *([] if closed is None else [closed]), timeout=part)
            if stopping.is_set() or (closed is not None and closed.done()):
                return
            suspended = self._clock() - began - part
            if suspended > _JUMP_SECONDS:
                await self._report(SystemResumed(suspended))
                return
            left -= part
