"""`flora-receiver dev`: the receiver on a laptop, with a public URL through a tunnel, and a live view of what happens."""

import asyncio
import contextlib
import os
import secrets
import signal
import tempfile
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import typer
from pydantic import SecretStr

from receiver.cli.connection import check_ca
from receiver.cli.dev.events import WatchedDoor
from receiver.cli.dev.session import Desk
from receiver.cli.dev.tunnel.choice import TunnelOptions, chosen
from receiver.cli.dev.view import View
from receiver.cli.output import report_errors
from receiver.config import Settings, ensure_token, load_settings
from receiver.config.callback_url import split_http_url
from receiver.decide import Policy
from receiver.emulator import Emulator, EmulatorSettings
from receiver.errors import ConfigError, Problem
from receiver.net import certificates
from receiver.net.addresses import is_loopback, is_unspecified
from receiver.service import wiring
from receiver.service.service import Service
from receiver.telemetry import configure_logging
from receiver.web.public import CALLBACK_PATH
from receiver.web.server import Server, bind


@dataclass(frozen=True, slots=True)
class DevOptions:
    """What the command line asks for besides the settings."""

    wanted: TunnelOptions
    no_tunnel: bool = False
    emulator: bool = False
    ca: Path | None = None
    json: bool = False


def run(config: Path | None, asked: DevOptions, *, host: str, port: int | None, ops_port: int | None) -> None:
    with report_errors(as_json=asked.json):
        settings = load_settings(config, os.environ, need_secrets=not asked.emulator)
        if not (is_loopback(host) or is_unspecified(host)):
            raise ConfigError([Problem("--host", "must be loopback, 0.0.0.0 or ::, so that we reach ourselves")])
        check_ca(asked.ca)
        if asked.no_tunnel and (asked.wanted.kind or asked.wanted.public_url):
            raise ConfigError([Problem("--no-tunnel", "contradicts the options of a tunnel: leave one of them out")])
        asked = replace(asked, wanted=_checked(asked.wanted))
        settings = _with(settings, {"public": {"host": host, "port": port}, "operations": {"port": ops_port}})
        configure_logging("error" if settings.log.level == "info" else settings.log.level, settings.log.format)
        raise typer.Exit(asyncio.run(_dev(settings, asked)))


def _checked(wanted: TunnelOptions) -> TunnelOptions:
    """Return the options with the public URL as others write it: with or without the path. Raises ConfigError."""
    if wanted.public_url is None:
        return wanted
    try:
        url = split_http_url(wanted.public_url).geturl().rstrip("/").removesuffix(CALLBACK_PATH)
    except ValueError as error:
        raise ConfigError([Problem("--public-url", str(error))]) from error
    return replace(wanted, public_url=url)


def _at_hand(policy: Policy) -> Policy:
    """Return a developer's pace, where polling is all there is and somebody waits for it."""
    quick = timedelta(seconds=2)
    return replace(policy, first_poll=quick, eager_poll=quick, max_gap=timedelta(seconds=5))


def _with(settings: Settings, given: dict[str, dict[str, Any]]) -> Settings:
    """Return the settings with values of some sections replaced; None leaves a value alone."""
    sections = {
        name: getattr(settings, name).model_copy(update={key: each for key, each in values.items() if each is not None})
        for name, values in given.items()
    }
    return settings.model_copy(update={"public_url": None, **sections})


async def _dev(settings: Settings, asked: DevOptions) -> int:
    stopping = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        asyncio.get_running_loop().add_signal_handler(number, stopping.set)
    async with contextlib.AsyncExitStack() as stack:
        view = View(as_json=asked.json)
        ca = asked.ca
        if asked.emulator:
            directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="flora-receiver-dev-")))
            settings, ca = await stack.enter_async_context(_emulated(settings, asked, directory, view))
        tls = settings.tls.cert is not None
        provider = None if asked.no_tunnel else chosen(asked.wanted, tls=tls)
        policy = _at_hand(wiring.policy(settings)) if provider is None else None
        service = Service(settings, policy=policy, around=lambda app: WatchedDoor(app, view))
        stack.enter_context(view)
        await stack.enter_async_context(service.running())
        return await Desk(service, settings, view, provider, ca=ca).work(stopping)


@contextlib.asynccontextmanager
async def _emulated(
    settings: Settings, asked: DevOptions, directory: Path, view: View
) -> AsyncIterator[tuple[Settings, Path | None]]:
    """Run an emulated FLORA, and return the settings that go with it: its keys, a ledger of its own, a certificate.

    Where TLS ends here (ssh), the certificate is of a throw-away CA, which the emulator trusts and nobody else.
    """
    ca = asked.ca
    tls: dict[str, Any] = {}
    wanted = asked.wanted
    if wanted.kind == "ssh" and wanted.public_url is None and settings.tls.cert is None and not asked.no_tunnel:
        hosts = {_host_of(wanted.ssh or ""), *certificates.LOCAL_HOSTS}
        authority = certificates.make_authority()
        ca = directory / "ca.pem"
        ca.write_bytes(authority.pem)
        cert, key = certificates.write(certificates.issue(authority, *sorted(hosts)), directory)
        tls = {"cert": cert, "key": key}
    emulator = Emulator(
        EmulatorSettings(
            webhook_secrets=(f"whsec_{secrets.token_hex(16)}",),
            api_key=f"sk_test_{secrets.token_hex(16)}",
            allow_private_callbacks=True,
            callback_ca=ca,
        )
    )
    stand = Server(emulator.app, bind("127.0.0.1", 0))
    await stand.start()
    origin = f"http://127.0.0.1:{stand.port}"
    emulator.public_origin = origin
    token = ensure_token(settings)  # where it always is, although the ledger is elsewhere: other commands look there
    given: dict[str, dict[str, Any]] = {
        "flora": {
            "base_url": emulator.base_url(origin),
            "api_key": SecretStr(emulator.settings.api_key),
            "webhook_secrets": tuple(map(SecretStr, emulator.settings.webhook_secrets)),
        },
        "database": {"url": f"sqlite:///{directory / 'receiver.db'}"},
        "operations": {"token": SecretStr(token)},
        "downloads": {"allow_private_hosts": (*settings.downloads.allow_private_hosts, urlsplit(origin).netloc)},
        "tls": tls,
    }
    view.tell("emulator", f"an emulated FLORA  {emulator.base_url(origin)}", base_url=emulator.base_url(origin))
    try:
        yield _with(settings, given).model_copy(update={"workspaces": ()}), ca
    finally:
        await emulator.aclose()
        await stand.stop()


def _host_of(text: str) -> str:
    place = text.rpartition("@")[2]
    return place[1:].partition("]")[0] if place.startswith("[") else place.partition(":")[0]
