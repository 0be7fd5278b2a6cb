"""Keeps a tunnel open: looks through it every half a minute, says who is at fault, and opens it again where that may help.

What happens is told as values; whoever composes it (`dev`) shows them, tells FLORA's next runs the new URL, and has
polling catch up with what was missed.
"""

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from receiver.cli.dev.tunnel.diagnosis import Judgement
from receiver.cli.dev.tunnel.provider import Local, Provider
from receiver.errors import TunnelError
from receiver.workers.loop import wait_for_any

__all__ = ["Closed", "Keeper", "Looked", "News", "NotOpened", "Opened", "Pace", "Woke"]

_SLICE_SECONDS = 1.0
_JUMP_SECONDS = 5.0
"""A wall clock this far ahead of our waiting: the machine slept."""


@dataclass(frozen=True, slots=True)
class Opened:
    """The tunnel is open. `moved`: runs started before call an address that leads nowhere now."""

    url: str
    moved: bool = False


@dataclass(frozen=True, slots=True)
class Closed:
    """The tunnel is down and will be opened again."""

    reason: str


@dataclass(frozen=True, slots=True)
class NotOpened:
    """It could not be opened again; that is tried in `again_seconds`."""

    reason: str
    again_seconds: float


@dataclass(frozen=True, slots=True)
class Looked:
    """The canaries are back. `news`: it is another judgement than the last one; `recovered`: callbacks come again."""

    judgement: Judgement
    news: bool
    recovered: bool


@dataclass(frozen=True, slots=True)
class Woke:
    """The machine slept for `seconds`."""

    seconds: float


News = Opened | Closed | NotOpened | Looked | Woke


@dataclass(frozen=True, slots=True)
class Pace:
    """How often things are done, in seconds."""

    every: float = 30.0
    confirm: float = 1.0
    """Between a canary that is lost and the one that decides."""
    settle: float = 25.0
    """How long a tunnel that has just been opened may take until its first canary comes through."""
    settle_every: float = 2.0
    longest: float = 60.0
    """Pauses between tries to open it grow from one second to this."""


class Keeper:
    """Opens, watches, closes. `look` sends the canaries to a URL and judges; `tell` hears what happens, and is waited for."""

    def __init__(
        self,
        provider: Provider,
        local: Local,
        *,
        look: Callable[[str], Awaitable[Judgement]],
        tell: Callable[[News], Awaitable[None]],
        pace: Pace | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._provider = provider
        self._local = local
        self._look = look
        self._tell = tell
        self._pace = pace or Pace()
        self._clock = clock
        self._url: str | None = None
        self._opened_at = 0.0
        self._proven = False
        """Whether a canary has come through since it was opened."""
        self._last: Judgement | None = None

    async def open(self) -> str:
        """Open the tunnel and return its URL. Raises TunnelError."""
        url = await self._provider.open(self._local)
        before, self._url = self._url, url
        self._opened_at, self._proven = asyncio.get_running_loop().time(), False
        await self._tell(Opened(url, moved=before not in {None, url}))
        return url

    async def run(self, stopping: asyncio.Event) -> None:
        """Watch the tunnel that was opened, and replace it when it fails, until told to stop; then close it."""
        try:
            while not stopping.is_set():
                if (reason := await self._watch(stopping)) is not None:
                    await self._replace(reason, stopping)
        finally:
            await self._provider.close()

    async def _watch(self, stopping: asyncio.Event) -> str | None:
        """Look again and again; return why the tunnel must be opened again, or None: we are to stop."""
        ended = asyncio.create_task(self._provider.ended(), name="tunnel ended")
        try:
            pause = 0.0
            while True:
                await self._sleep(pause, stopping, ended)
                if stopping.is_set():
                    return None
                if ended.done():
                    return ended.result()
                judgement = await self._looked()
                if not judgement.reopen:
                    pause = self._pace.every
                elif self._settling:
                    pause = self._pace.settle_every
                else:
                    await self._sleep(self._pace.confirm, stopping, ended)
                    judgement = await self._looked()
                    if judgement.reopen:
                        return judgement.reason
                    pause = self._pace.every
        finally:
            ended.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait({ended})

    @property
    def _settling(self) -> bool:
        """Whether it may still be on its way: names and routes take a while to be known."""
        age = asyncio.get_running_loop().time() - self._opened_at
        return not self._proven and age < self._pace.settle

    async def _looked(self) -> Judgement:
        assert self._url is not None, "it was opened"
        judgement = await self._look(self._url)
        self._proven = self._proven or judgement.open
        if judgement.reopen and self._settling:
            return judgement  # not worth a word yet
        last, self._last = self._last, judgement
        news = last is None or (last.fault, last.code) != (judgement.fault, judgement.code)
        recovered = judgement.open and last is not None and not last.open
        await self._tell(Looked(judgement, news=news, recovered=recovered))
        return judgement

    async def _replace(self, reason: str, stopping: asyncio.Event) -> None:
        """Close what is left of the tunnel and open it again, however often that takes."""
        await self._tell(Closed(reason))
        await self._provider.close()
        pause = 1.0
        while not stopping.is_set():
            try:
                await self.open()
            except TunnelError as error:
                await self._tell(NotOpened(str(error), pause))
                await self._sleep(pause, stopping)
                pause = min(pause * 2, self._pace.longest)
            else:
                return

    async def _sleep(self, seconds: float, stopping: asyncio.Event, ended: asyncio.Task[str] | None = None) -> None:
        """Wait, unless we are to stop, the tunnel ends, or the machine wakes from sleep: then there is no time to lose."""
        left = seconds
        while left > 0:
            part, began = min(left, _SLICE_SECONDS), self._clock()
            await wait_for_any(stopping, *([] if ended is None else [ended]), timeout=part)
            if stopping.is_set() or (ended is not None and ended.done()):
                return
            slept = self._clock() - began - part
            if slept > _JUMP_SECONDS:
                await self._tell(Woke(slept))
                return
            left -= part
