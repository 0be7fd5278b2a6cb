"""`flora-receiver serve`."""

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
from receiver.config import Settings, load_settings
from receiver.service.service import Service
from receiver.service.systemd import Supervisor, inherited_listeners
from receiver.service.wiring import Only
from receiver.telemetry import configure_logging

log = structlog.get_logger("receiver.cli")

_LAST_SECONDS = 3.0
"""How long a process that has stopped may take to be gone: tasks that swallow their cancellation would keep it for ever."""
_YOUNG = 10_000
"""Allocations between collections. What belongs to a callback lives until its commit: with Python's 700, each collection
finds almost all of it alive, and that costs a twentieth of all."""


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
        settings = _with(load_settings(config, os.environ), "public", host=host, port=port)
        settings = _with(settings, "operations", host=ops_host, port=ops_port)
        configure_logging(settings.log.level, settings.log.format)
        with asyncio.Runner(loop_factory=loop_factory()) as runner:
            runner.run(_serve(settings, only))


def loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """Return uvloop's, if the extra `fast` is installed: the same answers from a lighter event loop."""
    try:
        uvloop = importlib.import_module("uvloop")
    except ImportError:
        return None
    return cast("Callable[[], asyncio.AbstractEventLoop]", uvloop.new_event_loop)


async def _serve(settings: Settings, only: Only | None) -> None:
    service = Service(settings, only=only, listeners=inherited_listeners(os.environ, os.getpid()))
    gc.freeze()  # what is loaded by now stays for good: no collection needs to look at it
    gc.set_threshold(_YOUNG, *gc.get_threshold()[1:])
    await service.run_until_signal(Supervisor.from_environment(os.environ, os.getpid()))
    leaving = threading.Timer(_LAST_SECONDS, _leave)
    leaving.daemon = True  # or the process would wait for it
    leaving.start()


def _leave() -> None:
    """End the process under the feet of code that will not end: the ledger is closed, nothing else matters any more."""
    log.warning("service.left_behind", reason="a handler's task or thread does not end")
    os._exit(0)


def _with(settings: Settings, listener: str, *, host: str | None, port: int | None) -> Settings:
    """Return the settings with the command line's word on a listener."""
    given = {key: value for key, value in (("host", host), ("port", port)) if value is not None}
    return settings.model_copy(update={listener: getattr(settings, listener).model_copy(update=given)})
