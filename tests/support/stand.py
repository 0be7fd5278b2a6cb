"""A database and an emulated FLORA with the same runs, and the poller that reads them.

For tests at scale.
"""

import contextlib
import random
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from typing import Any

import httpx

from receiver.emulator import Emulator, EmulatorSettings
from receiver.emulator.runs import PlannedOutput, Subject
from receiver.emulator.runs import Run as Emulated
from receiver.flora.client import FloraClient
from receiver.flora.rate_limit import RateLimit
from receiver.model import Origin, Run, RunState
from receiver.net.clients import api_client
from receiver.store import Database, ledger
from receiver.web.server import Server, bind
from receiver.workers.poller import Poller
from receiver.workers.run_reader import RunReader
from tests.support.core import POLICY, Clock, Core, a_core, a_run

TECHNIQUE = Subject("technique", "tech_emu_image", "Emulated image")
OTHER = Subject("technique", "tech_emu_video", "Emulated video")
MODEL = Subject("generation", "emu-image-1", "image")
OUTPUTS = (PlannedOutput("output_1", "text", "a lighthouse"),)


@dataclass
class Stand:
    """One emulator and the requests that it got.

    `workspace_id` is the only workspace that it knows.
    """

    emulator: Emulator
    client: FloraClient
    http: httpx.AsyncClient
    clock: Clock
    workspace_id: str
    between: list[Callable[[], object]] = field(default_factory=list)
    """Called after each response, one after the other."""

    @property
    def requests(self) -> int:
        return self.emulator.gate.requests.total()

    @property
    def requests_by_route(self) -> Counter[str]:
        return self.emulator.gate.requests

    def fill(
        self,
        count: int,
        *,
        prefix: str = "run",
        subject: Subject = TECHNIQUE,
        apart_seconds: float = 1.0,
        youngest: timedelta = timedelta(minutes=10),
        ends_in: float = 10**6,
        **fields: object,
    ) -> list[Emulated]:
        """Start runs in the past, oldest first, the last of them `youngest` ago."""
        newest = (self.clock.now - youngest).timestamp()
        defaults: dict[str, Any] = {
            "subject": subject,
            "workspace_id": self.workspace_id,
            "project_id": "prj_1",
            "seconds": ends_in,
            "cost": 0.04,
            "outputs": OUTPUTS,
        }
        made = [
            Emulated(
                run_id=f"run_{prefix}_{number}",
                created_at=newest - (count - 1 - number) * apart_seconds,
                **(defaults | fields),
            )
            for number in range(count)
        ]
        for run in made:
            self.emulator.runs.add(run)
        book = self.emulator.runs
        book._order.sort(key=lambda run_id: book.get(run_id).created_at)  # lists are newest first
        return made

    def end(self, runs: Iterable[Emulated], *, cost_lag_seconds: float = 0.0) -> None:
        """Let runs be completed by now."""
        for run in runs:
            self.emulator.runs._runs[run.run_id] = replace(
                run, seconds=1.0, cost_lag_seconds=cost_lag_seconds
            )

    def to_rows(self, runs: Iterable[Emulated], **fields: object) -> list[Run]:
        """Return these runs as rows of a database, due now."""
        return [self._row(run, **fields) for run in runs]

    def _row(self, run: Emulated, **fields: object) -> Run:
        created_at = datetime.fromtimestamp(run.created_at, tz=self.clock.now.tzinfo)
        given: dict[str, object] = {
            "run_id": run.run_id,
            "origin": Origin.STARTED,
            "run_type": run.subject.run_type,
            "technique_id": run.subject.id if run.subject.run_type == "technique" else None,
            "workspace_id": run.workspace_id,
            "first_seen_at": created_at,
            "created_at": created_at,
            "deadline_at": created_at + POLICY.deadline,
            "next_poll_at": self.clock.now - timedelta(milliseconds=1),
        }
        state = fields.pop("state", RunState.OPEN)
        assert isinstance(state, RunState)
        return a_run(state, **(given | fields))


@contextlib.asynccontextmanager
async def a_stand(
    clock: Clock, *, workspace_id: str = "ws_1", concurrency: int = 8
) -> AsyncIterator[Stand]:
    """Serve an emulator on loopback."""
    settings = EmulatorSettings(
        workspace_id=workspace_id, api_key=f"sk_test_{random.getrandbits(64):x}", seed=7
    )

    def now() -> float:
        return clock.now.timestamp()

    emulator = Emulator(settings, clock=now)
    server = Server(emulator.app, bind("127.0.0.1", 0))
    await server.start()
    between: list[Callable[[], object]] = []

    async def run_next(_: httpx.Response) -> None:
        if between:
            between.pop(0)()

    http = api_client(emulator.base_url(f"http://127.0.0.1:{server.port}"))
    http.event_hooks = {**http.event_hooks, "response": [run_next]}
    client = FloraClient(http, settings.api_key, RateLimit(concurrency, clock=clock))
    try:
        yield Stand(emulator, client, http, clock, workspace_id, between)
    finally:
        await http.aclose()
        await emulator.aclose()
        await server.stop()


@dataclass
class Ledger:
    """A ledger with a poller over one or more stands.

    The first one's client is for every other workspace, too.
    """

    core: Core
    readers: Mapping[str | None, RunReader]
    poller: Poller

    async def add(self, runs: Iterable[Run]) -> None:
        rows = list(runs)
        await self.core.database.write(lambda tx: ledger.add_runs(tx, rows))

    async def look_once(self) -> None:
        """Tick until nothing is due that may be read."""
        for _ in range(1000):
            await self.poller.tick(self.core.clock.now)
            if not any(state.tasks for state in self.poller._keys.values()):
                return
            await self.poller.drain()
        raise AssertionError("the poller spins")

    async def states(self) -> Counter[str]:
        rows = await self.core.rows("SELECT state, count(*) FROM runs GROUP BY state")
        return Counter(dict(rows))

    async def count_unread(self) -> int:
        """Return how many runs were not read."""
        return int((await self.core.rows("SELECT count(*) FROM runs WHERE polls = failed_polls"))[0][0])


def a_ledger(database: Database, clock: Clock, *stands: Stand) -> Ledger:
    core = a_core(database, clock)
    first, *others = stands
    clients: dict[str | None, FloraClient] = {
        None: first.client,
        **{stand.workspace_id: stand.client for stand in others},
    }
    readers = run_readers(core, clients)
    return Ledger(core, readers, a_poller(core, readers))


def run_readers(core: Core, clients: Mapping[str | None, FloraClient]) -> dict[str | None, RunReader]:
    return {
        key: RunReader(key, client, metrics=core.metrics, clock=core.clock)
        for key, client in clients.items()
    }


def a_poller(core: Core, readers: Mapping[str | None, RunReader]) -> Poller:
    return Poller(
        core.database, core.intake, readers, signals=core.signals, policy=POLICY, clock=core.clock
    )
