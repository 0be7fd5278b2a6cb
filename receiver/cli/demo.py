"""`flora-receiver demo`: the whole path on this machine, for real: an emulated FLORA, this receiver over HTTPS, files.

The demo plays the part of your backend: it starts eight runs at FLORA and tells the receiver about them.
"""

import asyncio
import contextlib
import secrets
import signal
import sys
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
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from receiver.cli.output import FAILED, print_result, report_errors
from receiver.cli.trigger.cases import CASES, CallbackFactory
from receiver.config import Settings
from receiver.emulator import Emulator, EmulatorSettings, parse_faults
from receiver.flora.client import FloraClient
from receiver.flora.rate_limit import RateLimit
from receiver.model import Artifact, Dispatch, DispatchState, Origin, Run, RunRegistered, RunState
from receiver.net import certificates
from receiver.net.clients import api_client, probe_client
from receiver.service.service import Service
from receiver.store import ledger, queue
from receiver.telemetry import configure_logging
from receiver.web.public import CALLBACK_PATH
from receiver.web.server import Server, bind

_PATIENCE_SECONDS = 60
_RUN_SECONDS = 3.0
_TIME_SCALE = 60.0
"""FLORA's 10 s, 1 min and 5 min between attempts become a sixth of a second, 1 s and 5 s."""

_KIB = 1024

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
    Scene("audio, called back 3×", "emu-audio", ({"kind": "duplicate", "copies": 2},)),
    Scene("document", "emu-document"),
    Scene("text", "emu-text"),
    Scene("a failing run", "emu-fail"),
    Scene("image, never called back", "emu-image", ({"kind": "drop"},)),
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
    def verdict(self) -> str:
        return self.run.verdict.value if self.run and self.run.verdict else "unsettled"

    @property
    def size(self) -> int:
        """Bytes of the outputs; the manifest is ours."""
        return sum(each.size or 0 for each in self.artifacts if each.stored_at is not None and each.position >= 0)

    @property
    def cost(self) -> str:
        return f"${self.run.charged_cost:.2f}" if self.run and self.run.charged_cost is not None else ""

    @property
    def files(self) -> list[Path]:
        stored = [artifact for artifact in self.artifacts if artifact.stored_at is not None]
        return [Path(unquote(urlsplit(artifact.location).path)) for artifact in stored]


def run(*, keep: bool, outputs: Path, json: bool) -> None:
    with report_errors(as_json=json):
        configure_logging("error")
        raise typer.Exit(asyncio.run(_play(keep=keep, outputs=outputs, json=json)))


async def _play(*, keep: bool, outputs: Path, json: bool) -> int:
    console = Console(stderr=json, highlight=False)
    stopping = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopping.set)
    with tempfile.TemporaryDirectory(prefix="flora-receiver-demo-") as directory:
        async with _stage(Path(directory), outputs) as (emulator, service, origin):
            url = f"https://127.0.0.1:{service.address[1]}{CALLBACK_PATH}"
            console.print(f"An emulated FLORA  {origin}\nThis receiver      {url}")
            acts = await _start(emulator, service, origin, url)
            forged = await _forge(url, Path(directory) / "ca.pem")
            console.print(f"A forged callback  refused: {forged}\n")
            began = asyncio.get_running_loop().time()
            await _watch(service, acts, console, stopping)
            seconds = asyncio.get_running_loop().time() - began
            if json:
                print_result(
                    {"ok": all(act.safe for act in acts), "runs": [_row(act) for act in acts]}, "", as_json=True
                )
                sys.stdout.flush()  # with --keep, whoever reads it is still waiting
            else:
                _finish(acts, console, outputs, seconds)
            if keep and not stopping.is_set():
                _invite(console, emulator, origin, url, Path(directory) / "ca.pem", outputs)
                await stopping.wait()
            return 0 if all(act.safe for act in acts) else FAILED


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
            "operations": {"port": 0},
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
            client = FloraClient(http, emulator.settings.api_key, RateLimit(8))
            started = await client.start_technique_run(scene.technique, request)
            assert started is not None, "a request that may be sent at any time is sent"
            emulator.faults.add(parse_faults(list(scene.faults)), run_id=started.snapshot.run_id)
            await service.intake.apply(
                RunRegistered(
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
    (request,) = CASES["signature_mismatch"](CallbackFactory("", "run_forged", "whd_forged"))
    async with probe_client(ca=ca) as client:
        response = await client.post(url, content=request.body, headers=dict(request.headers))
    return f"{response.status_code} {response.json()['error']['code']}"


async def _watch(service: Service, acts: list[Act], console: Console, stopping: asyncio.Event) -> None:
    """Show the ledger until every run is over, patience ends, or somebody stops us."""
    deadline = asyncio.get_running_loop().time() + _PATIENCE_SECONDS
    with Live(_table(acts), console=console, refresh_per_second=8, transient=True) as live:
        while not all(act.over for act in acts) and asyncio.get_running_loop().time() < deadline:
            await _look(service, acts)
            live.update(_table(acts))
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(stopping.wait(), 0.1)
                return


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


_COLOURS = {"matched": "green", "recovered": "yellow", "late": "yellow", "diverged": "red", "unsettled": "red"}


def _table(acts: list[Act]) -> Table:
    """Return the ledger as it is now; it fits 80 columns."""
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0))
    for column in ("run", "state", "callback", "files", "size", "cost"):
        table.add_column(column, justify="right" if column in {"size", "cost"} else "left", no_wrap=True)
    for act in acts:
        verdict = act.run.verdict.value if act.run and act.run.verdict else ""
        table.add_row(
            act.scene.title,
            act.run.state.value if act.run else "",
            Text(verdict or "…", _COLOURS.get(verdict, "")),
            ", ".join(sorted({file.suffix.lstrip(".") for file in act.files if file.name != "run.json"})),
            human(act.size) if act.files else "",
            act.cost,
        )
    return table


def human(size: int) -> str:
    """Return a number of bytes in the unit that a person would choose."""
    if size < _KIB:
        return f"{size} B"
    amount, unit = size / _KIB, "KiB"
    for larger in ("MiB", "GiB"):
        if amount >= _KIB:
            amount, unit = amount / _KIB, larger
    return f"{amount:.1f} {unit}"


def _row(act: Act) -> dict[str, Any]:
    return {
        "run_id": act.run_id,
        "scene": act.scene.title,
        "state": act.run.state.value if act.run else "unknown",
        "verdict": act.verdict,
        "error_code": act.run.error_code if act.run else None,
        "files": [str(file) for file in act.files],
    }


def _finish(acts: list[Act], console: Console, outputs: Path, seconds: float) -> None:
    """List the runs with their files, and say what it means."""
    for act in acts:
        told = act.run.error_code or act.run.state.value if act.run else "unknown"
        size = human(act.size) if act.files else ""
        line = Text.assemble((f"{act.verdict:<9}", _COLOURS.get(act.verdict, "")), f"  {act.scene.title:<26}{told}")
        console.print(line, f"{size:>{max(0, 62 - line.cell_len)}}{act.cost:>7}")
        if act.files:
            names = " ".join(sorted(file.name for file in act.files))
            console.print(f"  [dim]{escape(_shown(act.files[0].parent))}/[/dim]  {escape(names)}", soft_wrap=True)
    settled = sum(act.over for act in acts)
    polled = sum(act.verdict == "recovered" for act in acts)
    console.print(f"\n{settled} of {len(acts)} runs settled in {seconds:.0f} s, {polled} of them by polling alone.")
    if settled == len(acts):
        console.print(f"The files are in {outputs}/", soft_wrap=True, markup=False)
    else:
        console.print("The others did not settle in time: is this machine very busy? Try again.")


def _shown(file: Path) -> str:
    try:
        return str(file.relative_to(Path.cwd()))
    except ValueError:
        return str(file)


def _invite(console: Console, emulator: Emulator, origin: str, url: str, ca: Path, outputs: Path) -> None:
    """Say how to use what keeps running."""
    body = (
        f'{{"mode": "async", "callback_url": "{url}",\n'
        '       "inputs": [{"id": "prompt", "type": "text", "value": "a lighthouse"}]}'
    )
    console.print(
        f"\nBoth keep running until Ctrl-C. Start another run, and its output comes to {outputs}/:\n\n"
        f"  curl {emulator.base_url(origin)}/techniques/emu-image/runs \\\n"
        f"    -H 'Authorization: Bearer {emulator.settings.api_key}' -H 'Content-Type: application/json' \\\n"
        f"    -d '{body}'\n\n"
        f"The receiver's certificate is signed by {ca}",
        soft_wrap=True,
        markup=False,
    )
