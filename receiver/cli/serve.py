"""`flora-receiver serve`: runs the service until SIGTERM or Ctrl-C."""

import asyncio
import gc
import importlib
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import cast

import structlog

from receiver.cli.output import report_errors
from receiver.config import Settings, SettingsSource
from receiver.service.service import Service
from receiver.service.systemd import Supervisor, inherited_listeners
from receiver.service.wiring import Only
from receiver.telemetry import configure_logging

log = structlog.get_logger("receiver.cli")

_EXIT_SECONDS = 3.0
"""How long the process may take to exit after the service has stopped.

A task that suppresses its cancellation, or a thread that never ends, would keep it for ever.
"""
_GC_THRESHOLD = 10_000
"""Allocations between garbage collections.

The objects of a callback live until its commit. With Python's default of 700, each collection finds
almost all of them alive, which costs a twentieth of the CPU time of the listener.
"""


def run(
    config: Path | None,
    *,
    host: str | None = None,
    port: int | None = None,
    ops_host: str | None = None,
    ops_port: int | None = None,
    only: Only | None = None,
) -> None:
    with report_errors():

        def adjust(settings: Settings) -> Settings:
            settings = _replace_address(settings, "public", host=host, port=port)
            return _replace_address(settings, "operations", host=ops_host, port=ops_port)

        source = SettingsSource(config, os.environ, adjust=adjust)
        settings = source.load()
        configure_logging(settings.log.level, settings.log.format)
        with asyncio.Runner(loop_factory=find_loop_factory()) as runner:
            runner.run(_serve(settings, only, source))


def find_loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """Return uvloop's event loop if the extra `fast` is installed, None for asyncio's own."""
    try:
        uvloop = importlib.import_module("uvloop")
    except ImportError:
        return None
    return cast("Callable[[], asyncio.AbstractEventLoop]", uvloop.new_event_loop)


async def _serve(settings: Settings, only: Only | None, source: SettingsSource) -> None:
    service = Service(
        settings,
        only=only,
        listeners=inherited_listeners(os.environ, os.getpid()),
        load=lambda reread: source.load(reread=reread),
    )
    gc.freeze()  # what is loaded by now stays: no collection needs to visit it
    gc.set_threshold(_GC_THRESHOLD, *gc.get_threshold()[1:])
    await service.run_until_signal(Supervisor.from_environment(os.environ, os.getpid()))
    timer = threading.Timer(_EXIT_SECONDS, _exit)
    timer.daemon = True  # or the process would wait for it
    timer.start()


def _exit() -> None:
    """End the process although a task or a thread still runs; the ledger is closed by now."""
    log.warning("service.left_behind", reason="a handler's task or thread does not end")
    os._exit(0)


def _replace_address(settings: Settings, section: str, *, host: str | None, port: int | None) -> Settings:
    """Return the settings with the host and port of a listener replaced, if they are given."""
    given = {key: value for key, value in (("host", host), ("port", port)) if value is not None}
    listener = getattr(settings, section).model_copy(update=given)
    return settings.model_copy(update={section: listener})
