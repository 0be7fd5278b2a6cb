"""The supervisor, with providers and diagnoses made here, and with a real program."""

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
from receiver.config.callback_url import CALLBACK_PATH
from receiver.errors import TunnelError
from receiver.net.clients import own_client, probe_client
from tests.support.patience import PATIENCE_SECONDS
from tests.support.stage import Stage
from tests.support.tunnel_programs import FORWARDER, write_program

QUICK = Timing(check=0.02, confirm=0.01, settle=0.0, settle_check=0.01, max_retry=0.02)
FINE = Diagnosis(None, "open", "callbacks come through", seconds=0.1)
CLOSED = Diagnosis(Fault.TUNNEL, "unreachable", "nothing responds", can_reopen=True)
ALTERED = Diagnosis(Fault.TUNNEL, "altered", "altered on the way")
BROKEN = Diagnosis(Fault.RECEIVER, "receiver_silent", "it does not answer")


class Tunnels:
    """A provider whose tunnels have these URLs in turn; an error is raised in place of a URL."""

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
    """A running supervisor with its events; the last of its diagnoses repeats."""

    def __init__(self, provider: Provider, found: Sequence[Diagnosis], timing: Timing = QUICK) -> None:
        self.events: asyncio.Queue[TunnelEvent] = asyncio.Queue()
        self.checked_urls: list[str] = []
        self._found = list(found)
        self.wall = 1000.0
        self.supervisor = TunnelSupervisor(
            provider,
            LocalEndpoint(8080),
            check=self._check,
            report=self.events.put,
            timing=timing,
            clock=lambda: self.wall,
        )
        self.stopping = asyncio.Event()

    async def _check(self, url: str) -> Diagnosis:
        self.checked_urls.append(url)
        return self._found[0] if len(self._found) == 1 else self._found.pop(0)

    async def until(self, wanted: Callable[[TunnelEvent], bool]) -> list[TunnelEvent]:
        """Return the events up to the first that is wanted."""
        seen: list[TunnelEvent] = []
        async with asyncio.timeout(PATIENCE_SECONDS):
            while not (seen and wanted(seen[-1])):
                seen.append(await self.events.get())
        return seen


@contextlib.asynccontextmanager
async def supervise(
    provider: Provider, *found: Diagnosis, timing: Timing = QUICK
) -> AsyncIterator[Session]:
    session = Session(provider, found, timing)
    await session.supervisor.open()
    task = asyncio.create_task(session.supervisor.run(session.stopping))
    try:
        yield session
    finally:
        session.stopping.set()
        async with asyncio.timeout(PATIENCE_SECONDS):
            await task


def is_opened(event: TunnelEvent) -> bool:
    return isinstance(event, TunnelOpened)


def without_repeats(events: list[TunnelEvent]) -> list[TunnelEvent]:
    return [each for each in events if not (isinstance(each, TunnelChecked) and not each.is_new)]


async def test_a_diagnosis_is_new_once() -> None:
    """Every check is reported; only a different diagnosis is new."""
    tunnels = Tunnels("https://a.example")
    async with supervise(tunnels, FINE) as session:
        events = await session.until(
            lambda each: isinstance(each, TunnelChecked) and len(session.checked_urls) > 2
        )
    assert events[0] == TunnelOpened("https://a.example")
    assert events[1:3] == [
        TunnelChecked(FINE, is_new=True, has_recovered=False),
        TunnelChecked(FINE, is_new=False, has_recovered=False),
    ]
    assert set(session.checked_urls) == {"https://a.example"}
    assert tunnels.closed == 1


async def test_a_fault_is_confirmed_before_a_tunnel_is_replaced() -> None:
    """The second lost canary decides; another URL is reported as `moved`."""
    tunnels = Tunnels("https://a.example", "https://b.example")
    async with supervise(tunnels, FINE, CLOSED, CLOSED, FINE) as session:
        events = await session.until(is_opened)
        events += await session.until(lambda each: each == TunnelClosed("nothing responds"))
        events += await session.until(is_opened)
        events += await session.until(lambda each: isinstance(each, TunnelChecked) and each.has_recovered)
    assert without_repeats(events) == [
        TunnelOpened("https://a.example"),
        TunnelChecked(FINE, is_new=True, has_recovered=False),
        TunnelChecked(CLOSED, is_new=True, has_recovered=False),
        TunnelClosed("nothing responds"),
        TunnelOpened("https://b.example", moved=True),
        TunnelChecked(FINE, is_new=True, has_recovered=True),
    ]
    assert tunnels.opened == 2
    assert session.checked_urls[-1] == "https://b.example"


async def test_one_lost_canary_does_not_replace_a_tunnel() -> None:
    tunnels = Tunnels("https://a.example")
    async with supervise(tunnels, FINE, CLOSED, FINE) as session:
        await session.until(lambda each: isinstance(each, TunnelChecked) and each.has_recovered)
    assert tunnels.opened == 1


@pytest.mark.parametrize("trouble", [ALTERED, BROKEN])
async def test_a_fault_that_reopening_does_not_fix_is_only_reported(trouble: Diagnosis) -> None:
    """Another tunnel fixes neither the receiver nor altered bodies."""
    tunnels = Tunnels("https://a.example")
    async with supervise(tunnels, trouble) as session:
        await session.until(lambda each: isinstance(each, TunnelChecked) and len(session.checked_urls) > 3)
    assert tunnels.opened == 1


async def test_a_tunnel_that_closes_by_itself_is_replaced_at_once() -> None:
    """It does not wait for the next check. The same URL again is not `moved`."""
    tunnels = Tunnels("https://a.example")
    async with supervise(tunnels, FINE, timing=Timing(check=3600)) as session:
        await session.until(lambda each: isinstance(each, TunnelChecked))
        tunnels.end.set()
        events = await session.until(is_opened)
    assert events == [TunnelClosed("the program ended"), TunnelOpened("https://a.example")]


async def test_opening_is_retried_until_it_succeeds() -> None:
    tunnels = Tunnels(
        "https://a.example", TunnelError("no network"), TunnelError("no network"), "https://b.example"
    )
    async with supervise(tunnels, CLOSED, CLOSED, FINE, timing=QUICK) as session:
        await session.until(lambda each: isinstance(each, TunnelClosed))
        events = await session.until(is_opened)
    assert events == [
        OpenFailed("no network", 1.0),
        OpenFailed("no network", 0.02),
        TunnelOpened("https://b.example", moved=True),
    ]


async def test_a_new_tunnel_has_time_to_settle() -> None:
    """Until its first canary arrives or the time is up, faults are not reported."""
    tunnels = Tunnels("https://a.example")
    async with supervise(
        tunnels, *[CLOSED] * 5, FINE, timing=Timing(check=0.02, settle=3600, settle_check=0.01)
    ) as session:
        events = await session.until(lambda each: isinstance(each, TunnelChecked))
    assert events == [
        TunnelOpened("https://a.example"),
        TunnelChecked(FINE, is_new=True, has_recovered=False),
    ]
    assert len(session.checked_urls) >= 6


async def test_a_suspended_machine_is_noticed() -> None:
    """The wall clock runs ahead of the wait, which leads to a check at once."""
    async with supervise(Tunnels("https://a.example"), FINE, timing=Timing(check=3600)) as session:
        await session.until(lambda each: isinstance(each, TunnelChecked))
        session.wall += 600
        events = await session.until(lambda each: isinstance(each, TunnelChecked))
    assert isinstance(events[0], SystemResumed)
    assert events[0].seconds == pytest.approx(600, abs=2)


async def test_a_first_tunnel_that_does_not_open_raises() -> None:
    tunnels = Tunnels(TunnelError("there is no program"))
    session = Session(tunnels, [FINE])
    with pytest.raises(TunnelError):
        await session.supervisor.open()
    assert session.events.empty()


async def test_a_suspended_program_is_noticed_and_replaced(stage: Stage, tmp_path: Path) -> None:
    """After SIGSTOP its port accepts connections and nothing responds; canaries find that."""
    program = write_program(tmp_path, "forwarder", FORWARDER)
    command = Command(f"{shlex.quote(str(program))} {{port}}", r"listening at (https://\S+)")
    async with (
        stage.service() as service,
        probe_client(ca=stage.ca, timeout_seconds=3) as outside,
        own_client() as inside,
    ):
        local = LocalEndpoint(service.address[1], tls=True)
        events: asyncio.Queue[TunnelEvent] = asyncio.Queue()
        supervisor = TunnelSupervisor(
            command,
            local,
            check=lambda url: check(stage, url, local, outside, inside),
            report=events.put,
            timing=QUICK,
        )
        first = await supervisor.open()
        stopping = asyncio.Event()
        task = asyncio.create_task(supervisor.run(stopping))
        try:
            async with asyncio.timeout(PATIENCE_SECONDS):
                while not isinstance(await events.get(), TunnelChecked):
                    pass
                os.kill(pid_of(command), signal.SIGSTOP)
                while not isinstance(opened := await events.get(), TunnelOpened):
                    pass
                assert opened.url != first
                assert opened.moved
                while not (isinstance(seen := await events.get(), TunnelChecked) and seen.has_recovered):
                    pass
        finally:
            stopping.set()
            await task


def pid_of(command: Command) -> int:
    assert command._program is not None
    return next(int(line.split()[1]) for line in command._program.printed if line.startswith("pid "))


async def check(
    stage: Stage, url: str, local: LocalEndpoint, outside: httpx.AsyncClient, inside: httpx.AsyncClient
) -> Diagnosis:
    far, near = await asyncio.gather(
        probe(url + CALLBACK_PATH, stage.secret, client=outside),
        probe(local.url + CALLBACK_PATH, stage.secret, client=inside),
    )
    return diagnose(far, near)
