"""`serve` with its loops at rest: what the door alone costs, on a database that allows one process only."""

import asyncio
import os

from receiver.cli.serve import loop_factory
from receiver.config import load
from receiver.service import Service
from receiver.telemetry import configure_logging


async def _rest(stopping: asyncio.Event) -> None:
    await stopping.wait()


def main() -> None:
    settings = load(None, os.environ)
    configure_logging(settings.log.level, settings.log.format)
    service = Service(settings)
    for loop in (service.poller, service.dispatcher, service.janitor, service.starter):
        loop.run = _rest  # type: ignore[method-assign]
    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        runner.run(service.run_until_signal())


if __name__ == "__main__":
    main()
