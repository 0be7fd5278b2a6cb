"""`flora-receiver dev`: the receiver on a laptop, with a tunnel and a live view."""

import asyncio
import contextlib
import os
import signal
import tempfile
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path

import typer

from receiver.cli.connection import check_ca
from receiver.cli.dev.emulator import replace_settings, run_emulator
from receiver.cli.dev.events import CallbackEvents
from receiver.cli.dev.session import DevSession
from receiver.cli.dev.tunnel.choice import TunnelOptions, choose_provider
from receiver.cli.dev.view import View
from receiver.cli.output import report_errors
from receiver.config import Settings, load_settings
from receiver.config.callback_url import remove_callback_path, split_http_url
from receiver.decide import Policy
from receiver.errors import ConfigError, Problem
from receiver.net.addresses import is_loopback, is_unspecified
from receiver.service import wiring
from receiver.service.service import Service
from receiver.telemetry import configure_logging


@dataclass(frozen=True, slots=True)
class DevOptions:
    """The options of `dev` that do not replace a setting."""

    tunnel: TunnelOptions
    no_tunnel: bool = False
    emulator: bool = False
    ca: Path | None = None
    json: bool = False


def run(
    config: Path | None, options: DevOptions, *, host: str, port: int | None, ops_port: int | None
) -> None:
    with report_errors(as_json=options.json):
        settings = load_settings(config, os.environ, need_secrets=not options.emulator)
        if not (is_loopback(host) or is_unspecified(host)):
            message = "must be a loopback address, 0.0.0.0 or ::, so that this machine can reach it"
            raise ConfigError([Problem("--host", message)])
        check_ca(options.ca)
        if options.no_tunnel and (options.tunnel.kind or options.tunnel.public_url):
            message = "cannot be combined with the options of a tunnel"
            raise ConfigError([Problem("--no-tunnel", message)])
        options = replace(options, tunnel=_normalize_public_url(options.tunnel))
        public, operations = {"host": host, "port": port}, {"port": ops_port}
        settings = replace_settings(settings, {"public": public, "operations": operations})
        level = "error" if settings.log.level == "info" else settings.log.level
        configure_logging(level, settings.log.format)
        raise typer.Exit(asyncio.run(_run_session(settings, options)))


def _normalize_public_url(options: TunnelOptions) -> TunnelOptions:
    """Remove the callback path from the public URL, which is accepted with or without it.

    Raises ConfigError.
    """
    if options.public_url is None:
        return options
    try:
        url = remove_callback_path(split_http_url(options.public_url).geturl())
    except ValueError as error:
        raise ConfigError([Problem("--public-url", str(error))]) from error
    return replace(options, public_url=url)


def _with_fast_polling(policy: Policy) -> Policy:
    """Return the policy for a session without a tunnel, where a developer waits for each poll."""
    first, longest = timedelta(seconds=2), timedelta(seconds=5)
    return replace(policy, first_poll=first, eager_poll=first, max_gap=longest)


async def _run_session(settings: Settings, options: DevOptions) -> int:
    stopping = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        asyncio.get_running_loop().add_signal_handler(number, stopping.set)
    async with contextlib.AsyncExitStack() as stack:
        view = View(as_json=options.json)
        ca = options.ca
        if options.emulator:
            scratch = tempfile.TemporaryDirectory(prefix="flora-receiver-dev-")
            directory = Path(stack.enter_context(scratch))
            emulated = run_emulator(settings, directory, ca=ca, tls_host=_tls_host(settings, options))
            flora = await stack.enter_async_context(emulated)
            settings, ca = flora.settings, flora.ca
            text = f"an emulated FLORA  {flora.base_url}"
            view.show("emulator", text, base_url=flora.base_url)
        tls = settings.tls.cert is not None
        provider = None if options.no_tunnel else choose_provider(options.tunnel, tls=tls)
        policy = _with_fast_polling(wiring.to_policy(settings)) if provider is None else None
        service = Service(settings, policy=policy, around=lambda app: CallbackEvents(app, view))
        stack.enter_context(view)
        await stack.enter_async_context(service.running())
        return await DevSession(service, settings, view, provider, ca=ca).run(stopping)


def _tls_host(settings: Settings, options: DevOptions) -> str | None:
    """Return the ssh host for which the receiver needs a certificate, or None if it needs none."""
    tunnel = options.tunnel
    if options.no_tunnel or tunnel.kind != "ssh" or tunnel.public_url is not None:
        return None
    if settings.tls.cert is not None:
        return None
    address = (tunnel.ssh or "").rpartition("@")[2]
    if address.startswith("["):
        return address[1:].partition("]")[0]
    return address.partition(":")[0]
