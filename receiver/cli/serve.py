"""`flora-receiver serve`."""

import asyncio
import os
from pathlib import Path

from receiver.cli.output import explained
from receiver.config import Settings, load
from receiver.service import Service
from receiver.telemetry import configure_logging


def run(config: Path | None, *, host: str | None, port: int | None) -> None:
    with explained():
        settings = _with(load(config, os.environ), host=host, port=port)
        configure_logging(settings.log.level, settings.log.format)
        asyncio.run(_serve(settings))


async def _serve(settings: Settings) -> None:
    await Service(settings).run_until_signal()


def _with(settings: Settings, *, host: str | None, port: int | None) -> Settings:
    """Return the settings with the command line's word on the listener."""
    given = {key: value for key, value in (("host", host), ("port", port)) if value is not None}
    return settings.model_copy(update={"public": settings.public.model_copy(update=given)})
