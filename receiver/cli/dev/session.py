"""One session of `dev`: it composes the service, the tunnel and the view, and says what follows from what."""

import asyncio
from collections.abc import Coroutine
from dataclasses import replace
from pathlib import Path
from typing import Any, assert_never
from urllib.parse import urlsplit

import httpx

from receiver.cli.dev.events import Follower, Player
from receiver.cli.dev.tunnel.diagnosis import Judgement, Upstream, judge, upstream
from receiver.cli.dev.tunnel.provider import Given, Local, Provider
from receiver.cli.dev.tunnel.supervisor import Closed, Keeper, Looked, News, NotOpened, Opened, Pace, Woke
from receiver.cli.dev.view import View
from receiver.cli.doctor.probe import probe
from receiver.cli.output import FAILED
from receiver.config import Settings
from receiver.config.callback_url import check_callback_url
from receiver.errors import TunnelError
from receiver.net.addresses import is_loopback, local_host
from receiver.net.clients import own_client, probe_client
from receiver.service.service import Service
from receiver.store import queries
from receiver.web.public import CALLBACK_PATH
from receiver.workers.loop import run_until, wait_for_any

__all__ = ["Desk"]

_PROBE_SECONDS = 6.0
_STRANDED_SECONDS = 5.0
_STATUS_SECONDS = 1.0


class Desk:
    """`work` until told to stop. `ca`: a further CA that the canary trusts from outside.

    A canary may take `patience_seconds`; runs whose callbacks go to a lost address are read every `again_seconds`.
    """

    def __init__(
        self,
        service: Service,
        settings: Settings,
        view: View,
        provider: Provider | None,
        *,
        ca: Path | None = None,
        pace: Pace | None = None,
        patience_seconds: float = _PROBE_SECONDS,
        again_seconds: float = _STRANDED_SECONDS,
    ) -> None:
        self._service = service
        self._settings = settings
        self._view = view
        self._provider = provider
        self._pace = pace or Pace()
        self._patience = patience_seconds
        self._again_seconds = again_seconds
        tls = settings.tls.cert is not None
        self._local = Local(service.address[1], tls=tls, host=local_host(settings.public.host))
        self._secret = settings.secrets_by_workspace()[0][0]
        self._ca = ca
        self._asked_flora: dict[str, float] = {}
        self._stranded: frozenset[str] = frozenset()
        self._opened = False
        self._url: str | None = None
        self._judged: Judgement | None = None
        self._upstream = Upstream.UNKNOWN

    async def work(self, stopping: asyncio.Event) -> int:
        """Run until told to stop; return the exit code."""
        host, port = self._service.operations_address
        receiver = self._local.url + CALLBACK_PATH
        self._view.tell("receiver", receiver, receiver=receiver, operations=f"http://{host}:{port}")
        async with probe_client(ca=self._ca, timeout_seconds=self._patience) as outside, own_client() as inside:
            follower = Follower(self._service, self._view)
            if self._provider is None:
                self._view.tell("tunnel", "none: runs are polled, and each is played as a callback", url=None)
                player = Player(self._service, self._settings, receiver, inside)
                return await self._together(
                    stopping, [follower.run(player), self._look_on(outside, inside), self._show_status()]
                )
            keeper = Keeper(
                self._provider,
                self._local,
                look=lambda url: self._look(url, outside, inside),
                tell=self._heard,
                pace=self._pace,
            )
            try:
                if (url := await run_until(stopping, keeper.open())) is None:
                    await self._provider.close()
                    return 0
                self._check(url)
            except TunnelError as error:
                await self._provider.close()
                printed = "".join(f"\n    {line}" for line in error.printed)
                text = f"{self._provider.name} did not open: {error}{printed}"
                self._view.tell("tunnel", text, error=str(error), printed=error.printed)
                return FAILED
            except BaseException:
                await self._provider.close()
                raise
            work = [follower.run(), keeper.run(stopping), self._read_stranded(), self._show_status()]
            return await self._together(stopping, work)

    async def _together(self, stopping: asyncio.Event, work: list[Coroutine[Any, Any, None]]) -> int:
        """Do all of it until told to stop, or until something fails; nothing is left behind."""
        tasks: set[asyncio.Task[Any]] = {asyncio.create_task(each) for each in work}
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

    def _check(self, url: str) -> None:
        """Hold the URL against FLORA's rules, unless FLORA is this machine too. Raises TunnelError."""
        if is_loopback(urlsplit(self._settings.flora.base_url).hostname or ""):
            return
        if (problem := check_callback_url(url + CALLBACK_PATH)) is not None:
            raise TunnelError(f"{url}: {problem}")

    async def _look(self, url: str | None, outside: httpx.AsyncClient, inside: httpx.AsyncClient) -> Judgement:
        """Send both canaries and judge."""
        home = probe(self._local.url + CALLBACK_PATH, self._secret, client=inside)
        if url is None:
            far, near = None, await home
        else:
            far, near = await asyncio.gather(probe(url + CALLBACK_PATH, self._secret, client=outside), home)
        before, self._asked_flora = self._asked_flora, _answers(self._service)
        now_is = upstream(before, self._asked_flora)
        self._upstream = self._upstream if now_is is Upstream.UNKNOWN else now_is
        judged = judge(far, near, self._upstream, ours=not isinstance(self._provider, Given))
        if judged.code == "unreachable" and self._provider is not None and self._provider.hint:
            judged = replace(judged, reason=f"{judged.reason}; {self._provider.hint}")
        self._judged = judged
        return judged

    async def _look_on(self, outside: httpx.AsyncClient, inside: httpx.AsyncClient) -> None:
        """Without a tunnel: look whether receiver and FLORA work."""
        last = None
        while True:
            judgement = await self._look(None, outside, inside)
            if judgement.code != last:
                self._tell(judgement)
                last = judgement.code
            await asyncio.sleep(self._pace.every)

    async def _heard(self, news: News) -> None:
        """Show what happened to the tunnel, and do what follows from it."""
        match news:
            case Opened(url, moved):
                self._url, again, self._opened = url, self._opened, True
                self._service.moved(url)
                name = self._provider.name if self._provider else ""
                text = f"{name}  {url}{CALLBACK_PATH}"
                self._view.tell("tunnel", text, provider=name, url=url, moved=moved)
                if again:
                    await self._catch_up(moved=moved)
            case Closed(reason):
                self._view.tell("tunnel", f"TUNNEL: {reason}; opening it again", fault="tunnel", reason=reason)
            case NotOpened(reason, seconds):
                text = f"TUNNEL: it did not open: {reason}; again in {seconds:g} s"
                self._view.tell("tunnel", text, fault="tunnel", reason=reason, again_seconds=seconds)
            case Looked(judgement, is_news, recovered):
                if is_news:
                    self._tell(judgement)
                if recovered:
                    await self._catch_up(moved=False)
            case Woke(seconds):
                self._view.tell("tunnel", f"this machine slept for {seconds:.0f} s", slept_seconds=round(seconds))
                await self._catch_up(moved=False)
            case _:
                assert_never(news)

    def _tell(self, judgement: Judgement) -> None:
        fault = judgement.fault
        took = "" if judgement.seconds is None else f" ({judgement.seconds * 1000:.0f} ms)"
        text = f"{fault.value.upper()}: {judgement.reason}" if fault else f"{judgement.reason}{took}"
        self._view.tell("canary", text, fault=fault, code=judgement.code, reason=judgement.reason)

    async def _catch_up(self, *, moved: bool) -> None:
        """Read every run that is not settled: FLORA may have called while nobody could answer."""
        ids = await self._service.poller.read_now()
        if not ids:
            return
        why = "they call the old address, and are polled from now on" if moved else "their callbacks may be lost"
        self._view.tell("catch-up", f"open runs that are read now: {len(ids)}; {why}", run_ids=sorted(ids), moved=moved)
        if moved:
            self._stranded |= ids

    async def _read_stranded(self) -> None:
        """Keep reading the runs whose callbacks go to an address that we lost, until they are settled."""
        while True:
            await asyncio.sleep(self._again_seconds)
            if self._stranded:
                self._stranded = await self._service.poller.read_now(self._stranded)

    async def _show_status(self) -> None:
        while True:
            counts = await self._service.database.read(queries.count_unsettled)
            judged = self._judged
            where = "no tunnel" if self._provider is None else self._url or "opening"
            took = "" if judged is None or judged.seconds is None else f"  canary {judged.seconds * 1000:.0f} ms"
            state = "" if judged is None or judged.fault is None else f"  {judged.fault.value.upper()}: {judged.reason}"
            number = sum(counts.values())
            text = f"{where}{took}{state}  ·  {number} open run{'' if number == 1 else 's'}  ·  Ctrl-C ends it"
            self._view.status(text, fine=judged is not None and judged.fault is None)
            await asyncio.sleep(_STATUS_SECONDS)


def _answers(service: Service) -> dict[str, float]:
    """Return how often FLORA's API has answered with each status."""
    return {
        sample.labels["status"]: sample.value
        for metric in service.metrics.api_requests.collect()
        for sample in metric.samples
        if sample.name.endswith("_total")
    }
