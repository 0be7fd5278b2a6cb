"""`flora-receiver demo`: the whole path on this machine, for real: an emulated FLORA, this receiver over HTTPS, files.

The demo plays the part of your backend: it starts eight runs at FLORA and tells the receiver about them.
"""

import asyncio
import contextlib
import secrets
import signal
import tempfile
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import typer
from rich.console import Console
from rich.live import Live
from rich.table import Table

from receiver import certificates
from receiver.cli.output import WRONG, explained, show
from receiver.cli.trigger import CASES
from receiver.config import Settings
from receiver.emulator import Emulator, EmulatorSettings, parse_faults
from receiver.flora.client import FloraClient
from receiver.http import api_client, probe_client
from receiver.model import Artifact, Dispatch, DispatchState, Origin, Registered, Run, RunState
from receiver.service import Service
from receiver.store import ledger, queue
from receiver.telemetry import configure_logging
from receiver.web.public import CALLBACK_PATH
from receiver.web.server import Server, bind

_PATIENCE_SECONDS = 60
_RUN_SECONDS = 3.0
_TIME_SCALE = 60.0
"""FLORA's 10 s, 1 min and 5 min between attempts become a sixth of a second, 1 s and 5 s."""

_DONE = {DispatchState.DONE, DispatchState.SKIPPED, DispatchState.DEAD}


@dataclass(frozen=True, slots=True)
class Scene:
    """One run of the demo."""

    title: str
    technique: str
    faults: tuple[dict[str, Any], ...] = ()


SCENES = (
    Scene("image", "emu-image"),
    Scene("two images", "emu-two-images"),
    Scene("video", "emu-video"),
    Scene("audio, callback comes 3 times", "emu-audio", ({"kind": "duplicate", "copies": 2},)),
    Scene("document", "emu-document"),
    Scene("text", "emu-text"),
    Scene("a run that fails", "emu-fail"),
    Scene("image, callback never comes", "emu-image", ({"kind": "drop"},)),
)


@dataclass(slots=True)
class Act:
    """A scene being played: its run's id, and what the ledger says of it."""

    scene: Scene
    run_id: str
    run: Run | None = None
    artifacts: list[Artifact] = field(default_factory=list)
    dispatches: tuple[Dispatch, ...] = ()

    @property
    def over(self) -> bool:
        settled = self.run is not None and self.run.state in {RunState.COMPLETED, RunState.FAILED}
        finished = bool(self.dispatches) and all(each.state in _DONE for each in self.dispatches)
        return settled and finished and self.run is not None and self.run.verdict is not None

    @property
    def safe(self) -> bool:
        """Whether it ended as it should: every output stored, and nothing dead."""
        return self.over and all(each.state is not DispatchState.DEAD for each in self.dispatches)

    @property
    def files(self) -> list[Path]:
        stored = [artifact for artifact in self.artifacts if artifact.stored_at is not None]
        return [Path(unquote(urlsplit(artifact.location).path)) for artifact in stored]


def run(*, keep: bool, outputs: Path, json: bool) -> None:
    with explained(as_json=json):
        configure_logging("error")
        raise typer.Exit(asyncio.run(_play(keep=keep, outputs=outputs, json=json)))


async def _play(*, keep: bool, outputs: Path, json: bool) -> int:
    console = Console(stderr=json, highlight=False)
    with tempfile.TemporaryDirectory(prefix="flora-receiver-demo-") as directory:
        async with _stage(Path(directory), outputs) as (emulator, service, origin):
            url = f"https://127.0.0.1:{service.address[1]}{CALLBACK_PATH}"
            console.print(f"An emulated FLORA   {origin}\nThis receiver       {url}\n")
            acts = await _start(emulator, service, origin, url)
            forged = await _forge(url, Path(directory) / "ca.pem")
            console.print(f"A forged callback was refused: {forged}\n")
            await _watch(service, acts, console)
            await _finish(acts, console, outputs, json=json)
            if keep:
                await _keep(console, emulator, service, origin, Path(directory))
            return 0 if all(act.safe for act in acts) else WRONG


@contextlib.asynccontextmanager
async def _stage(directory: Path, outputs: Path) -> AsyncIterator[tuple[Emulator, Service, str]]:
    """Set up a throw-away CA, the emulator that trusts only it, and a receiver with its certificate."""
    authority = certificates.make_authority()
    ca = directory / "ca.pem"
    ca.write_bytes(authority.pem)
    cert, key = certificates.write(certificates.issue(authority), directory)
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
    stand = Server(emulator.app, bind("127.0.0.1", 0))
    await stand.start()
    origin = f"http://127.0.0.1:{stand.port}"
    emulator.public_origin = origin
    try:
        settings = _settings(emulator, origin, directory, outputs, cert=cert, key=key)
        async with Service(settings).running() as service:
            yield emulator, service, origin
            await emulator.aclose()
    finally:
        await emulator.aclose()
        await stand.stop()


def _settings(emulator: Emulator, origin: str, directory: Path, outputs: Path, *, cert: Path, key: Path) -> Settings:
    return Settings.model_validate(
        {
            "public": {"host": "127.0.0.1", "port": 0},
            "tls": {"cert": str(cert), "key": str(key)},
            "database": {"url": f"sqlite:///{directory / 'receiver.db'}"},
            "flora": {
                "base_url": emulator.base_url(origin),
                "api_key": emulator.settings.api_key,
                "webhook_secrets": list(emulator.settings.webhook_secrets),
            },
            # The waits of production, shortened in the same measure as the emulator's.
            "reconcile": {"first_poll_seconds": _RUN_SECONDS + 1, "callback_window_seconds": 420 / _TIME_SCALE},
            "downloads": {"allow_private_hosts": [urlsplit(origin).netloc]},
            "handlers": [{"use": "storage", "options": {"url": str(outputs)}}, {"use": "log"}],
        }
    )


async def _start(emulator: Emulator, service: Service, origin: str, url: str) -> list[Act]:
    acts = []
    async with api_client(emulator.base_url(origin)) as http:
        for scene in SCENES:
            request = {
                "inputs": [{"id": "prompt", "type": "text", "value": f"a lighthouse: {scene.title}"}],
                "mode": "async",
                "callback_url": url,
            }
            client = FloraClient(http, emulator.settings.api_key)
            started = await client.start_technique_run(scene.technique, request)
            emulator.faults.add(parse_faults(list(scene.faults)), run_id=started.snapshot.run_id)
            await service.intake.learn(
                Registered(
                    run_id=started.snapshot.run_id,
                    origin=Origin.TRACKED,
                    registered_at=datetime.now(UTC),
                    run_type="technique",
                    technique_id=scene.technique,
                    workspace_id=emulator.settings.workspace_id,
                    quoted_cost=started.quoted_cost,
                    metadata={"scene": scene.title},
                )
            )
            acts.append(Act(scene, started.snapshot.run_id))
    return acts


async def _forge(url: str, ca: Path) -> str:
    """Send a callback signed with a secret of our own making, and return how it was refused."""
    shot = CASES["signature_mismatch"](b'{"id":"whd_forged","data":{"run_id":"run_forged"}}', "")
    async with probe_client(ca=ca) as client:
        response = await client.post(url, content=shot.body, headers=dict(shot.headers))
    return f"{response.status_code} {response.json()['error']['code']}"


async def _watch(service: Service, acts: list[Act], console: Console) -> None:
    """Show the ledger until every run is over."""
    deadline = asyncio.get_running_loop().time() + _PATIENCE_SECONDS
    with Live(_table(acts), console=console, refresh_per_second=8) as live:
        while not all(act.over for act in acts) and asyncio.get_running_loop().time() < deadline:
            await _look(service, acts)
            live.update(_table(acts))
            await asyncio.sleep(0.1)
        live.update(_table(acts))


async def _look(service: Service, acts: list[Act]) -> None:
    ids = [act.run_id for act in acts]
    runs = await service.database.read(lambda tx: ledger.runs_by_id(tx, ids))
    for act in acts:
        act.run = runs.get(act.run_id)
        run_id = act.run_id
        act.dispatches = await service.database.read(lambda tx, run_id=run_id: queue.dispatches_of_run(tx, run_id))  # type: ignore[misc]
        act.artifacts = list(
            await service.database.read(lambda tx, run_id=run_id: queue.artifacts_of_run(tx, run_id))  # type: ignore[misc]
        )


def _table(acts: list[Act]) -> Table:
    table = Table(box=None, pad_edge=False)
    for column in ("run", "state", "settled", "files", "bytes", "cost"):
        table.add_column(column, justify="right" if column in {"bytes", "cost"} else "left", no_wrap=True)
    for act in acts:
        run, stored = act.run, [each for each in act.artifacts if each.stored_at is not None and each.position >= 0]
        state = run.state.value if run else ""
        if run and run.error_code:
            state = f"{state}: {run.error_code}"
        table.add_row(
            act.scene.title,
            state,
            run.verdict.value if run and run.verdict else "…",
            ", ".join(sorted(Path(urlsplit(each.location).path).suffix for each in stored)),
            f"{sum(each.size or 0 for each in stored):,}" if stored else "",
            f"${run.charged_cost:.2f}" if run and run.charged_cost is not None else "",
        )
    return table


async def _finish(acts: list[Act], console: Console, outputs: Path, *, json: bool) -> None:
    data = []
    for act in acts:
        verdict = act.run.verdict.value if act.run and act.run.verdict else "unsettled"
        state = act.run.state.value if act.run else "unknown"
        data.append(
            {
                "run_id": act.run_id,
                "scene": act.scene.title,
                "state": state,
                "verdict": verdict,
                "files": [str(file) for file in act.files],
            }
        )
    if json:
        show({"ok": all(act.safe for act in acts), "runs": data}, "", as_json=True)
        return
    console.print()
    for act, row in zip(acts, data, strict=True):
        console.print(f"{row['verdict']:<10} {act.run_id}  {act.scene.title} ({row['state']})")
        for file in act.files:
            console.print(f"           {_shown(file)}", soft_wrap=True)
    settled = sum(act.over for act in acts)
    console.print(f"\n{settled} of {len(acts)} runs settled; their files are in {outputs}/")


def _shown(file: Path) -> str:
    try:
        return str(file.relative_to(Path.cwd()))
    except ValueError:
        return str(file)


async def _keep(console: Console, emulator: Emulator, service: Service, origin: str, directory: Path) -> None:
    """Leave both servers running until Ctrl-C, and say how to use them."""
    url = f"https://127.0.0.1:{service.address[1]}{CALLBACK_PATH}"
    stopping = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopping.set)
    console.print(
        f"\nBoth keep running until Ctrl-C. Start another run:\n"
        f"  curl {emulator.base_url(origin)}/techniques/emu-image/runs -H 'Authorization: Bearer "
        f"{emulator.settings.api_key}' -H 'Content-Type: application/json' -d "
        f'\'{{"mode": "async", "inputs": [{{"id": "prompt", "type": "text", "value": "a lighthouse"}}], '
        f'"callback_url": "{url}"}}\'\n'
        f"The receiver's certificate is signed by {directory / 'ca.pem'}.",
        soft_wrap=True,
    )
    await stopping.wait()
