"""The supervisor, with providers and canaries made here and short intervals, and with a real program."""

import asyncio
import contextlib
import os
import shlex
import signal
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path

import httpx
import pytest

from receiver.cli.dev.tunnel.command import Command
from receiver.cli.dev.tunnel.diagnosis import Diagnosis, Fault, diagnose
from receiver.cli.dev.tunnel.provider import LocalEndpoint, Provider
from receiver.cli.dev.tunnel.supervisor import (
    OpenFailed,
    SystemResumed,
    Timing,
    TunnelChecked,
    TunnelClosed,
    TunnelEvent,
    TunnelOpened,
    TunnelSupervisor,
)
from receiver.cli.doctor.probe import probe
from receiver.errors import TunnelError
from receiver.net.clients import own_client, probe_client
from receiver.web.public import CALLBACK_PATH
from tests.support.stage import Stage
from tests.support.tunnel_programs import FORWARDER, written

QUICK = Timing(check=0.02, confirm=0.01, settle=0.0, settle_check=0.01, max_retry=0.02)
FINE = Diagnosis(None, "open", "callbacks come through", seconds=0.1)
CLOSED = Diagnosis(Fault.TUNNEL, "unreachable", "nobody answers", can_reopen=True)
ALTERED = Diagnosis(Fault.TUNNEL, "altered", "altered on the way")
BROKEN = Diagnosis(Fault.RECEIVER, "receiver_silent", "it does not answer")
PATIENCE_SECONDS = 20


class Tunnels:
    """A provider whose tunnels have these URLs, one after the other; an error is raised instead."""

    name = "tunnels"
    hint = ""

    def __init__(self, *urls: str | TunnelError) -> None:
        self._urls = list(urls)
        self.opened = 0
        self.closed = 0
        self.end = asyncio.Event()

    async def open(self, local: LocalEndpoint) -> str:
        url = self._urls[0] if len(self._urls) == 1 else self._urls.pop(0)
        if isinstance(url, TunnelError):
            raise url
        self.opened += 1
        return url

    async def wait_closed(self) -> str:
        await self.end.wait()
        self.end.clear()
        return "the program ended"

    async def close(self) -> None:
        self.closed += 1


class Session:
    """A supervisor at work: what it told, and what its canaries find, the last of which stays."""

    def __init__(self, provider: Provider, found: Sequence[Diagnosis], timing: Timing = QUICK) -> None:
        self.news: asyncio.Queue[TunnelEvent] = asyncio.Queue()
        self.looked_at: list[str] = []
        self._found = list(found)
        self.wall = 1000.0
        self.supervisor = TunnelSupervisor(
            provider,
            LocalEndpoint(8080),
            check=self._look,
            report=self.news.put,
            timing=timing,
            clock=lambda: self.wall,
        )
        self.stopping = asyncio.Event()

    async def _look(self, url: str) -> Diagnosis:
        self.looked_at.append(url)
        return self._found[0] if len(self._found) == 1 else self._found.pop(0)

    async def told(self, wanted: Callable[[TunnelEvent], bool]) -> list[TunnelEvent]:
        """Return what is told, up to the first that is wanted."""
        seen: list[TunnelEvent] = []
        async with asyncio.timeout(PATIENCE_SECONDS):
            while not (seen and wanted(seen[-1])):
                seen.append(await self.news.get())
        return seen


@contextlib.asynccontextmanager
async def kept(provider: Provider, *found: Diagnosis, timing: Timing = QUICK) -> AsyncIterator[Session]:
    session = Session(provider, found, timing)
    await session.supervisor.open()
    task = asyncio.create_task(session.supervisor.run(session.stopping))
    try:
        yield session
    finally:
        session.stopping.set()
        async with asyncio.timeout(PATIENCE_SECONDS):
            await task


def is_opened(news: TunnelEvent) -> bool:
    return isinstance(news, TunnelOpened)


def without_repeats(news: list[TunnelEvent]) -> list[TunnelEvent]:
    return [each for each in news if not (isinstance(each, TunnelChecked) and not each.is_new)]


async def test_a_judgement_is_news_once() -> None:
    """It looks on, and tells each time; only another judgement is news."""
    tunnels = Tunnels("https://a.example")
    async with kept(tunnels, FINE) as session:
        told = await session.told(lambda each: isinstance(each, TunnelChecked) and len(session.looked_at) > 2)
    assert told[0] == TunnelOpened("https://a.example")
    assert told[1:3] == [
        TunnelChecked(FINE, is_new=True, has_recovered=False),
        TunnelChecked(FINE, is_new=False, has_recovered=False),
    ]
    assert set(session.looked_at) == {"https://a.example"}
    assert tunnels.closed == 1


async def test_a_tunnel_that_fails_is_confirmed_and_replaced() -> None:
    """One lost canary is asked about again; the second one decides; a new URL makes runs of the old one known as moved."""
    tunnels = Tunnels("https://a.example", "https://b.example")
    async with kept(tunnels, FINE, CLOSED, CLOSED, FINE) as session:
        told = await session.told(is_opened)
        told += await session.told(lambda each: each == TunnelClosed("nobody answers"))
        told += await session.told(is_opened)
        told += await session.told(lambda each: isinstance(each, TunnelChecked) and each.has_recovered)
    assert without_repeats(told) == [
        TunnelOpened("https://a.example"),
        TunnelChecked(FINE, is_new=True, has_recovered=False),
        TunnelChecked(CLOSED, is_new=True, has_recovered=False),
        TunnelClosed("nobody answers"),
        TunnelOpened("https://b.example", moved=True),
        TunnelChecked(FINE, is_new=True, has_recovered=True),
    ]
    assert tunnels.opened == 2
    assert session.looked_at[-1] == "https://b.example"


async def test_one_lost_canary_replaces_nothing() -> None:
    tunnels = Tunnels("https://a.example")
    async with kept(tunnels, FINE, CLOSED, FINE) as session:
        await session.told(lambda each: isinstance(each, TunnelChecked) and each.has_recovered)
    assert tunnels.opened == 1


@pytest.mark.parametrize("trouble", [ALTERED, BROKEN])
async def test_what_no_new_tunnel_heals_is_told_and_left(trouble: Diagnosis) -> None:
    """Another tunnel would not help the receiver, nor bring back altered bytes."""
    tunnels = Tunnels("https://a.example")
    async with kept(tunnels, trouble) as session:
        await session.told(lambda each: isinstance(each, TunnelChecked) and len(session.looked_at) > 3)
    assert tunnels.opened == 1


async def test_a_tunnel_that_ends_by_itself_is_replaced_at_once() -> None:
    """Long before the next canary is due. The same URL again is no move."""
    tunnels = Tunnels("https://a.example")
    async with kept(tunnels, FINE, timing=Timing(check=3600)) as session:
        await session.told(lambda each: isinstance(each, TunnelChecked))
        tunnels.end.set()
        told = await session.told(is_opened)
    assert told == [TunnelClosed("the program ended"), TunnelOpened("https://a.example")]


async def test_opening_is_tried_until_it_works() -> None:
    tunnels = Tunnels("https://a.example", TunnelError("no network"), TunnelError("no network"), "https://b.example")
    async with kept(tunnels, CLOSED, CLOSED, FINE, timing=QUICK) as session:
        await session.told(lambda each: isinstance(each, TunnelClosed))
        told = await session.told(is_opened)
    assert told == [
        OpenFailed("no network", 1.0),
        OpenFailed("no network", 0.02),
        TunnelOpened("https://b.example", moved=True),
    ]


async def test_a_new_tunnel_may_take_a_while() -> None:
    """Until its first canary came through, or its time is up, nothing is said and nothing replaced."""
    tunnels = Tunnels("https://a.example")
    async with kept(tunnels, *[CLOSED] * 5, FINE, timing=Timing(check=0.02, settle=3600, settle_check=0.01)) as session:
        told = await session.told(lambda each: isinstance(each, TunnelChecked))
    assert told == [TunnelOpened("https://a.example"), TunnelChecked(FINE, is_new=True, has_recovered=False)]
    assert len(session.looked_at) >= 6


async def test_waking_from_sleep_is_noticed() -> None:
    """The wall clock has run far ahead of our waiting: it is looked at once, not when the half a minute is over."""
    async with kept(Tunnels("https://a.example"), FINE, timing=Timing(check=3600)) as session:
        await session.told(lambda each: isinstance(each, TunnelChecked))
        session.wall += 600
        told = await session.told(lambda each: isinstance(each, TunnelChecked))
    assert isinstance(told[0], SystemResumed)
    assert told[0].seconds == pytest.approx(600, abs=2)


async def test_it_can_be_opened_first_or_not_at_all() -> None:
    tunnels = Tunnels(TunnelError("there is no program"))
    session = Session(tunnels, [FINE])
    with pytest.raises(TunnelError):
        await session.supervisor.open()
    assert session.news.empty()


async def test_a_stopped_program_is_noticed_and_replaced(stage: Stage, tmp_path: Path) -> None:
    """SIGSTOP: its port still takes connections, and nothing answers. Canaries notice, the next program works."""
    program = written(tmp_path, "forwarder", FORWARDER)
    command = Command(f"{shlex.quote(str(program))} {{port}}", r"listening at (https://\S+)")
    async with (
        stage.service() as service,
        probe_client(ca=stage.ca, timeout_seconds=0.5) as outside,
        own_client() as inside,
    ):
        local = LocalEndpoint(service.address[1], tls=True)
        news: asyncio.Queue[TunnelEvent] = asyncio.Queue()
        supervisor = TunnelSupervisor(
            command, local, check=lambda url: look(stage, url, local, outside, inside), report=news.put, timing=QUICK
        )
        first = await supervisor.open()
        stopping = asyncio.Event()
        task = asyncio.create_task(supervisor.run(stopping))
        try:
            async with asyncio.timeout(PATIENCE_SECONDS):
                while not isinstance(await news.get(), TunnelChecked):
                    pass
                os.kill(pid_of(command), signal.SIGSTOP)
                while not isinstance(opened := await news.get(), TunnelOpened):
                    pass
                assert opened.url != first
                assert opened.moved
                while not (isinstance(seen := await news.get(), TunnelChecked) and seen.has_recovered):
                    pass
        finally:
            stopping.set()
            await task


def pid_of(command: Command) -> int:
    assert command._program is not None
    return next(int(line.split()[1]) for line in command._program.printed if line.startswith("pid "))


async def look(
    stage: Stage, url: str, local: LocalEndpoint, outside: httpx.AsyncClient, inside: httpx.AsyncClient
) -> Diagnosis:
    far, near = await asyncio.gather(
        probe(url + CALLBACK_PATH, stage.secret, client=outside),
        probe(local.url + CALLBACK_PATH, stage.secret, client=inside),
    )
    return diagnose(far, near)
