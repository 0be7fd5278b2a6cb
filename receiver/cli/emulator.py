"""`flora-receiver emulator`: runs the emulated FLORA as a server."""

import asyncio
import signal
from typing import Any

from receiver.cli.output import report_errors
from receiver.emulator import Emulator, EmulatorSettings
from receiver.errors import ConfigError, Problem
from receiver.net.credentials import find_fault
from receiver.telemetry import configure_logging
from receiver.web.server import Server, bind


def run(**options: Any) -> None:
    """Serve with `options` of EmulatorSettings, where None stands for the default."""
    given = {name: value for name, value in options.items() if value is not None}
    with report_errors():
        _check_credentials(given)
        configure_logging("warning")
        asyncio.run(_serve(EmulatorSettings(**given)))


def _check_credentials(given: dict[str, Any]) -> None:
    """Raise ConfigError for a key or a secret that no receiver would accept."""
    named = [("--api-key", value) for value in (given.get("api_key"),) if value is not None]
    named += [("--webhook-secret", value) for value in given.get("webhook_secrets", ())]
    problems = [
        Problem(option, fault) for option, value in named if (fault := find_fault(value)) is not None
    ]
    if problems:
        raise ConfigError(problems)


async def _serve(settings: EmulatorSettings) -> None:
    stopping = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopping.set)
    emulator = Emulator(settings)
    try:
        sockets = bind(settings.host, settings.port)
    except ConfigError as error:  # its problems name the receiver's settings; here they are options
        raise ConfigError(
            [Problem("--host, --port", problem.message) for problem in error.problems]
        ) from error
    server = Server(emulator.app, sockets)
    await server.start()
    origin = f"http://{settings.host}:{server.port}"
    print(
        f"An emulated FLORA listens on {origin}\n"
        f"  export FLORA_BASE_URL={emulator.base_url(origin)}\n"
        f"  export FLORA_API_KEY={settings.api_key}\n"
        f"  export FLORA_WEBHOOK_SECRET={','.join(settings.webhook_secrets)}\n"
        f"  export RECEIVER_DOWNLOADS__ALLOW_PRIVATE_HOSTS={settings.host}:{server.port}\n"
        "Techniques: GET /techniques. Faults: /_emulator/faults. Press Ctrl-C to stop.",
        flush=True,
    )
    await stopping.wait()
    await emulator.aclose()
    await server.stop()
