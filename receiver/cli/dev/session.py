"""One session of `dev`: runs the tunnel beside the service, shows events and reacts to them."""

import asyncio
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, assert_never
from urllib.parse import urlsplit

import httpx

from receiver.cli.dev.events import LedgerEvents
from receiver.cli.dev.route import RouteCheck
from receiver.cli.dev.simulator import CallbackSimulator
from receiver.cli.dev.tunnel.diagnosis import Diagnosis
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
from receiver.cli.dev.view import View
from receiver.cli.output import FAILED
from receiver.config import Settings
from receiver.config.callback_url import CALLBACK_PATH, check_callback_url
from receiver.errors import TunnelError
from receiver.net.addresses import http_origin, is_loopback, local_host, to_unix_path
from receiver.net.clients import own_client, probe_client
from receiver.service.service import Service
from receiver.store import queries
from receiver.workers.loop import run_until, wait_for_any

__all__ = ["DevSession"]

_CANARY_SECONDS = 6.0
_STRANDED_SECONDS = 5.0
_STATUS_SECONDS = 1.0


class DevSession:
    """Runs until stopped, with a tunnel or, if `provider` is None, with simulated callbacks.

    `ca` is a PEM file that the outside canary trusts besides the public CAs. A canary may take
    `canary_seconds`; runs whose callbacks go to a lost URL are read every `stranded_seconds`.
    """

    def __init__(
        self,
        service: Service,
        settings: Settings,
        view: View,
        provider: Provider | None,
        *,
        ca: Path | None = None,
        timing: Timing | None = None,
        canary_seconds: float = _CANARY_SECONDS,
        stranded_seconds: float = _STRANDED_SECONDS,
    ) -> None:
        self._service = service
        self._settings = settings
        self._view = view
        self._provider = provider
        self._timing = timing or Timing()
        self._canary_seconds = canary_seconds
        self._stranded_seconds = stranded_seconds
        tls = settings.tls.cert is not None
        host = local_host(settings.public.host)
        self._local = LocalEndpoint(service.address[1], tls=tls, host=host)
        self._secret = settings.secrets_by_workspace()[0][0]
        self._ca = ca
        self._stranded: frozenset[str] = frozenset()
        """Open runs whose callbacks go to a URL that is gone."""
        self._url: str | None = None

    async def run(self, stopping: asyncio.Event) -> int:
        """Run until `stopping` is set; return the exit code."""
        host, port = self._service.operations_address
        url = self._local.url + CALLBACK_PATH
        operations = host if to_unix_path(host) else http_origin(host, port, tls=False)
        self._view.show("receiver", url, receiver=url, operations=operations)
        async with (
            probe_client(ca=self._ca, timeout_seconds=self._canary_seconds) as outside,
            own_client() as inside,
        ):
            route = RouteCheck(
                self._service,
                self._local,
                self._provider,
                secret=self._secret,
                outside=outside,
                inside=inside,
            )
            if self._provider is None:
                return await self._run_without_tunnel(route, inside, stopping)
            return await self._run_with_tunnel(route, self._provider, stopping)

    async def _run_without_tunnel(
        self, route: RouteCheck, inside: httpx.AsyncClient, stopping: asyncio.Event
    ) -> int:
        text = "none: runs are polled, and a callback is simulated for each"
        self._view.show("tunnel", text, url=None)
        url = self._local.url + CALLBACK_PATH
        simulator = CallbackSimulator(self._service, self._settings, url, inside)
        events = LedgerEvents(self._service, self._view)
        work = [
            events.run(simulator.send),
            self._check_repeatedly(route),
            self._update_status(route),
        ]
        return await _run_all(work, stopping)

    async def _run_with_tunnel(self, route: RouteCheck, provider: Provider, stopping: asyncio.Event) -> int:
        supervisor = TunnelSupervisor(
            provider, self._local, check=route.check, report=self._handle, timing=self._timing
        )
        try:
            if (url := await run_until(stopping, supervisor.open())) is None:
                await provider.close()
                return 0
            self._check_url(url)
        except TunnelError as error:
            await provider.close()
            printed = "".join(f"\n    {line}" for line in error.printed)
            text = f"{provider.name} did not open: {error}{printed}"
            self._view.show("tunnel", text, error=str(error), printed=error.printed)
            return FAILED
        except BaseException:
            await provider.close()
            raise
        events = LedgerEvents(self._service, self._view)
        work = [
            events.run(),
            supervisor.run(stopping),
            self._read_stranded(),
            self._update_status(route),
        ]
        return await _run_all(work, stopping)

    def _check_url(self, url: str) -> None:
        """Raise TunnelError if FLORA would refuse the URL; a local emulator accepts any."""
        if is_loopback(urlsplit(self._settings.flora.base_url).hostname or ""):
            return
        if (problem := check_callback_url(url + CALLBACK_PATH)) is not None:
            raise TunnelError(f"{url}: {problem}")

    async def _check_repeatedly(self, route: RouteCheck) -> None:
        """Without a tunnel: show whether the receiver and FLORA work, whenever that changes."""
        last = None
        while True:
            diagnosis = await route.check(None)
            if diagnosis.code != last:
                self._show_diagnosis(diagnosis)
                last = diagnosis.code
            await asyncio.sleep(self._timing.check)

    async def _handle(self, event: TunnelEvent) -> None:
        """Show an event of the tunnel and react to it."""
        match event:
            case TunnelOpened(url, moved):
                await self._handle_opened(url, moved=moved)
            case TunnelClosed(reason):
                text = f"TUNNEL: {reason}; reopening it"
                self._view.show("tunnel", text, fault="tunnel", reason=reason)
            case OpenFailed(reason, seconds):
                text = f"TUNNEL: it could not be opened: {reason}; retrying in {seconds:g} s"
                self._view.show("tunnel", text, fault="tunnel", reason=reason, again_seconds=seconds)
            case TunnelChecked(diagnosis, is_new, has_recovered):
                if is_new:
                    self._show_diagnosis(diagnosis)
                if has_recovered:
                    await self._catch_up(moved=False)
            case SystemResumed(seconds):
                text = f"this machine was suspended for {seconds:.0f} s"
                self._view.show("tunnel", text, slept_seconds=round(seconds))
                await self._catch_up(moved=False)
            case _:
                assert_never(event)

    async def _handle_opened(self, url: str, *, moved: bool) -> None:
        was_open, self._url = self._url is not None, url
        self._service.set_public_url(url)
        name = self._provider.name if self._provider else ""
        text = f"{name}  {url}{CALLBACK_PATH}"
        self._view.show("tunnel", text, provider=name, url=url, moved=moved)
        if was_open:
            await self._catch_up(moved=moved)

    def _show_diagnosis(self, diagnosis: Diagnosis) -> None:
        fault = diagnosis.fault
        duration = "" if diagnosis.seconds is None else f" ({diagnosis.seconds * 1000:.0f} ms)"
        text = f"{diagnosis.reason}{duration}" if fault is None else _describe_fault(diagnosis)
        self._view.show("canary", text, fault=fault, code=diagnosis.code, reason=diagnosis.reason)

    async def _catch_up(self, *, moved: bool) -> None:
        """Read every run that is not settled: callbacks may have been missed."""
        ids = await self._service.poller.read_now()
        if not ids:
            return
        why = "their callbacks go to the old URL, so they are polled from now on"
        if not moved:
            why = "their callbacks may have been missed"
        text = f"reading {_count(len(ids), 'open run')}: {why}"
        self._view.show("catch-up", text, run_ids=sorted(ids), moved=moved)
        if moved:
            self._stranded |= ids

    async def _read_stranded(self) -> None:
        """Read the stranded runs repeatedly until they are settled."""
        while True:
            await asyncio.sleep(self._stranded_seconds)
            if self._stranded:
                self._stranded = await self._service.poller.read_now(self._stranded)

    async def _update_status(self, route: RouteCheck) -> None:
        while True:
            counts = await self._service.database.read(queries.count_unsettled)
            diagnosis = route.latest
            parts = ["no tunnel" if self._provider is None else self._url or "opening the tunnel"]
            if diagnosis is not None and diagnosis.seconds is not None:
                parts.append(f"canary {diagnosis.seconds * 1000:.0f} ms")
            if diagnosis is not None and diagnosis.fault is not None:
                parts.append(_describe_fault(diagnosis))
            runs = _count(sum(counts.values()), "open run")
            text = f"{'  '.join(parts)}  ·  {runs}  ·  Ctrl-C to stop"
            is_healthy = diagnosis is not None and diagnosis.fault is None
            self._view.show_status(text, is_healthy=is_healthy)
            await asyncio.sleep(_STATUS_SECONDS)


def _describe_fault(diagnosis: Diagnosis) -> str:
    assert diagnosis.fault is not None
    return f"{diagnosis.fault.value.upper()}: {diagnosis.reason}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


async def _run_all(work: list[Coroutine[Any, Any, None]], stopping: asyncio.Event) -> int:
    """Run everything until `stopping` is set or something fails; return exit code 0."""
    tasks = [asyncio.create_task(each) for each in work]
    try:
        await wait_for_any(stopping, *tasks)
        for task in tasks:
            if task.done():
                task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
    return 0
