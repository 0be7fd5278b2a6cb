"""`flora-receiver demo`: an emulated FLORA, a receiver over HTTPS, and eight runs between them.

The demo acts as your backend: it starts the runs at FLORA and registers them with the receiver.
"""

import asyncio
import contextlib
import secrets
import signal
import sys
import tempfile
from collections.abc import AsyncIterator, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

import typer
from rich.console import Console
from rich.live import Live

from receiver.cli.demo.scenes import SCENES, DemoRun
from receiver.cli.demo.view import make_table, print_next_steps, print_summary
from receiver.cli.output import FAILED, print_result, report_errors
from receiver.cli.trigger.cases import CASES, CallbackFactory
from receiver.config import Settings
from receiver.config.callback_url import CALLBACK_PATH
from receiver.emulator import Emulator, EmulatorSettings, parse_faults
from receiver.flora.client import FloraClient
from receiver.flora.rate_limit import RateLimit
from receiver.model import Origin, RunRegistered
from receiver.net import certificates
from receiver.net.clients import api_client, probe_client
from receiver.service.service import Service
from receiver.store import ledger, queue
from receiver.telemetry import configure_logging
from receiver.web.server import Server, bind

_PATIENCE_SECONDS = 60
_RUN_SECONDS = 3.0
_TIME_SCALE = 60.0
"""FLORA's 10 s, 1 min and 5 min between attempts become a sixth of a second, 1 s and 5 s."""


def run(*, keep: bool, outputs: Path, json: bool) -> None:
    with report_errors(as_json=json):
        configure_logging("error")
        raise typer.Exit(asyncio.run(_run(keep=keep, outputs=outputs, json=json)))


async def _run(*, keep: bool, outputs: Path, json: bool) -> int:
    console = Console(stderr=json, highlight=False)
    clock = asyncio.get_running_loop().time
    stopping = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopping.set)
    with tempfile.TemporaryDirectory(prefix="flora-receiver-demo-") as directory:
        ca = Path(directory) / "ca.pem"
        async with _run_both(ca, outputs) as (emulator, service, origin):
            url = f"https://127.0.0.1:{service.address[1]}{CALLBACK_PATH}"
            console.print(f"An emulated FLORA  {origin}\nThis receiver      {url}")
            runs = await _start_runs(emulator, service, origin, url)
            forged = await _send_forged(url, ca)
            console.print(f"A forged callback  refused: {forged}\n")
            began = clock()
            await _watch(service, runs, console, stopping)
            is_ok = all(each.is_stored for each in runs)
            if json:
                data = {"ok": is_ok, "runs": [each.to_json() for each in runs]}
                print_result(data, "", as_json=True)
                sys.stdout.flush()  # with --keep, the reader of a pipe would otherwise wait
            else:
                print_summary(runs, console, outputs, clock() - began)
            if keep and not stopping.is_set():
                print_next_steps(
                    console,
                    base_url=emulator.base_url(origin),
                    api_key=emulator.settings.api_key,
                    callback_url=url,
                    ca=ca,
                    outputs=outputs,
                )
                await stopping.wait()
            return 0 if is_ok else FAILED


@contextlib.asynccontextmanager
async def _run_both(ca: Path, outputs: Path) -> AsyncIterator[tuple[Emulator, Service, str]]:
    """Run an emulator, and a receiver whose certificate is of a new CA, which the emulator trusts.

    Yields both and the emulator's origin; the CA is written to `ca`, the other files beside it.
    """
    cert, key = _issue_certificate(ca)
    emulator = Emulator(
        EmulatorSettings(
            run_seconds=_RUN_SECONDS,
            time_scale=_TIME_SCALE,
            allow_private_callbacks=True,
            callback_ca=ca,
            cost_lag_seconds=1.0,
            webhook_secrets=(f"whsec_{secrets.token_hex(16)}",),
        )
    )
    server = Server(emulator.app, bind("127.0.0.1", 0))
    await server.start()
    origin = f"http://127.0.0.1:{server.port}"
    emulator.public_origin = origin
    try:
        settings = _settings(emulator, origin, ca.parent, outputs, cert=cert, key=key)
        async with Service(settings).running() as service:
            yield emulator, service, origin
            await emulator.aclose()
    finally:
        await emulator.aclose()
        await server.stop()


def _issue_certificate(ca: Path) -> tuple[Path, Path]:
    """Write a new CA to `ca`, and beside it a certificate and its key, whose paths are returned."""
    authority = certificates.make_authority()
    ca.write_bytes(authority.pem)
    return certificates.write(certificates.issue(authority), ca.parent)


def _settings(
    emulator: Emulator,
    origin: str,
    directory: Path,
    outputs: Path,
    *,
    cert: Path,
    key: Path,
) -> Settings:
    return Settings.model_validate(
        {
            "public": {"host": "127.0.0.1", "port": 0},
            "operations": {"port": 0},
            "tls": {"cert": str(cert), "key": str(key)},
            "database": {"url": f"sqlite:///{directory / 'receiver.db'}"},
            "flora": {
                "base_url": emulator.base_url(origin),
                "api_key": emulator.settings.api_key,
                "webhook_secrets": list(emulator.settings.webhook_secrets),
            },
            # The defaults, shortened like the emulator's pauses.
            "reconcile": {
                "first_poll_seconds": _RUN_SECONDS + 1,
                "callback_window_seconds": 420 / _TIME_SCALE,
            },
            "downloads": {"allow_private_hosts": [urlsplit(origin).netloc]},
            "handlers": [{"use": "storage", "options": {"url": str(outputs)}}, {"use": "log"}],
        }
    )


async def _start_runs(emulator: Emulator, service: Service, origin: str, url: str) -> list[DemoRun]:
    """Start a run of every scene, and register it with the service."""
    runs = []
    async with api_client(emulator.base_url(origin)) as http:
        client = FloraClient(http, emulator.settings.api_key, RateLimit(8))
        for scene in SCENES:
            prompt = {"id": "prompt", "type": "text", "value": f"a lighthouse: {scene.title}"}
            request = {"inputs": [prompt], "mode": "async", "callback_url": url}
            started = await client.start_technique_run(scene.technique, request)
            assert started is not None, "a request that may be sent at any time is sent"
            run_id = started.snapshot.run_id
            emulator.faults.add(parse_faults(list(scene.faults)), run_id=run_id)
            await service.intake.apply(
                RunRegistered(
                    run_id=run_id,
                    origin=Origin.TRACKED,
                    registered_at=datetime.now(UTC),
                    run_type="technique",
                    technique_id=scene.technique,
                    workspace_id=emulator.settings.workspace_id,
                    quoted_cost=started.quoted_cost,
                    metadata={"scene": scene.title},
                )
            )
            runs.append(DemoRun(scene, run_id))
    return runs


async def _send_forged(url: str, ca: Path) -> str:
    """Send a callback signed with another secret, and return the status and code of the refusal."""
    (request,) = CASES["signature_mismatch"](CallbackFactory("", "run_forged", "whd_forged"))
    async with probe_client(ca=ca) as client:
        response = await client.post(url, content=request.body, headers=dict(request.headers))
    return f"{response.status_code} {response.json()['error']['code']}"


async def _watch(
    service: Service, runs: Sequence[DemoRun], console: Console, stopping: asyncio.Event
) -> None:
    """Show the runs until all are finished, the time is up, or the demo is stopped."""
    clock = asyncio.get_running_loop().time
    deadline = clock() + _PATIENCE_SECONDS
    with Live(make_table(runs), console=console, refresh_per_second=8, transient=True) as live:
        while not all(each.is_finished for each in runs) and clock() < deadline:
            await _read_ledger(service, runs)
            live.update(make_table(runs))
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(stopping.wait(), 0.1)
                return


async def _read_ledger(service: Service, runs: Sequence[DemoRun]) -> None:
    read = service.database.read
    rows = await read(partial(ledger.runs_by_id, run_ids=[each.run_id for each in runs]))
    for each in runs:
        each.run = rows.get(each.run_id)
        each.dispatches = await read(partial(queue.dispatches_of_run, run_id=each.run_id))
        each.artifacts = list(await read(partial(queue.artifacts_of_run, run_id=each.run_id)))
