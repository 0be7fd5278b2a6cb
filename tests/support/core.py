"""What the tests of the core share: a clock to turn, nouns to fill in, callbacks to sign, a door before a database."""

import asyncio
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

from sqlalchemy import Connection, text
from sqlalchemy.engine.base import OptionEngine

from receiver.decide import Backoff, Policy
from receiver.flora.signature import sign
from receiver.handler import Handler
from receiver.intake.callbacks import CallbackResult, Intake, Secret
from receiver.model import (
    CallbackReceived,
    CallbackStatus,
    Dispatch,
    Event,
    LostReason,
    Origin,
    Output,
    Run,
    RunRead,
    RunRegistered,
    RunState,
    Snapshot,
    Subscription,
)
from receiver.plugins.attempt import Registration
from receiver.store import Database, ledger, queries, queue
from receiver.store.changes import Signals
from receiver.store.postgres import PostgresDatabase
from receiver.telemetry import Metrics
from tests.support.patience import PATIENCE_SECONDS

_STEP_SECONDS = 0.05
NOW = datetime(2026, 11, 24, 12, 0, tzinfo=UTC)
SECRET = "whsec_test_1"
OUTPUT = Output(0, "output_1", "imageUrl", "https://media.flora.example/1.png")


def a_policy(**fields: Any) -> Policy:
    """Return the rules' numbers as they are by default; `fields` override."""
    given: dict[str, Any] = {
        "first_poll": timedelta(seconds=60),
        "eager_poll": timedelta(seconds=4),
        "max_gap": timedelta(minutes=15),
        "callback_window": timedelta(seconds=420),
        "deadline": timedelta(hours=24),
        "confirmation_delays": tuple(timedelta(seconds=pause) for pause in (0, 1, 2, 4, 8, 15, 30, 60)),
        "cost_window": timedelta(minutes=10),
    }
    return Policy(**(given | fields))


POLICY = a_policy()
BACKOFF = Backoff(timedelta(seconds=1), 2.0, timedelta(minutes=30))


def registered_handler(name: str, handler: Handler, **limits: Any) -> Registration:
    """Return a configured handler with the limits that it has by default; `limits` override."""
    given: dict[str, Any] = {
        "max_attempts": 12,
        "timeout_seconds": 900.0,
        "concurrency": 8,
        "backoff": BACKOFF,
    }
    return Registration(name, handler, **(given | limits))


@dataclass
class Clock:
    """A clock that moves when told to."""

    now: datetime = NOW

    def __call__(self) -> datetime:
        return self.now

    def forward(self, seconds: float = 0, **more: float) -> datetime:
        self.now += timedelta(seconds=seconds, **more)
        return self.now


async def until(holds: Callable[[], bool]) -> None:
    """Let the loop turn until something holds.

    The limit is in real time: the loop's own may stand still (`LoopTime`).
    """
    give_up_at = time.monotonic() + PATIENCE_SECONDS
    while not holds():
        assert time.monotonic() < give_up_at, "it did not come to hold"
        await asyncio.sleep(0)


@dataclass
class LoopTime:
    """The time of the running event loop, which stands still until a test moves it.

    No timer fires before, however long the machine takes for everything else.
    """

    now: float = 0.0

    def __call__(self) -> float:
        return self.now

    async def forward(self, seconds: float) -> None:
        """Move in steps, and after each let the loop do what is due."""
        for _ in range(round(seconds / _STEP_SECONDS)):
            self.now += _STEP_SECONDS
            for _ in range(20):
                await asyncio.sleep(0)


async def writable(database: Database, yes: bool) -> None:
    """Let the database refuse writes, as after a remount or on a standby, or take them again."""
    if isinstance(database, PostgresDatabase):
        engine = database._writing
        read_only = engine.execution_options(postgresql_readonly=True)
        database._writing = engine._proxied if isinstance(engine, OptionEngine) and yes else read_only
    else:
        await database.run(
            lambda c: c.exec_driver_sql(f"PRAGMA query_only = {'OFF' if yes else 'ON'}").close()
        )


def a_run(state: RunState = RunState.OPEN, **fields: Any) -> Run:
    """Return a run in `state` with what that state calls for; `fields` override."""
    given: dict[str, Any] = {
        "run_id": "run_1",
        "state": state,
        "origin": Origin.TRACKED,
        "first_seen_at": NOW,
        "deadline_at": NOW + POLICY.deadline,
        "run_type": "generation",
    }
    match state:
        case RunState.OPEN:
            given |= {"next_poll_at": NOW}
        case RunState.REPORTED:
            given |= {"next_poll_at": NOW, "callback_status": CallbackStatus.COMPLETED, "reported_at": NOW}
        case RunState.COMPLETED | RunState.FAILED:
            given |= {"settled_at": NOW}
        case RunState.LOST:
            given |= {"lost_reason": LostReason.DEADLINE, "losses": 1}
    return Run(**(given | fields))


def a_snapshot(status: str = "running", run_id: str = "run_1", **fields: Any) -> Snapshot:
    given: dict[str, Any] = {"outputs": (OUTPUT,)} if status == "completed" else {}
    return Snapshot(**({"run_id": run_id, "status": status} | given | fields))


def a_read(
    status: str = "running", requested_at: datetime = NOW, run_id: str = "run_1", **fields: Any
) -> RunRead:
    return RunRead(a_snapshot(status, run_id, **fields), requested_at)


def a_callback_received(
    told: CallbackStatus = CallbackStatus.COMPLETED,
    received_at: datetime = NOW,
    run_id: str = "run_1",
    **fields: Any,
) -> CallbackReceived:
    return CallbackReceived(run_id, told, received_at, **fields)


def a_registration(run_id: str = "run_1", **fields: Any) -> RunRegistered:
    given: dict[str, Any] = {"origin": Origin.TRACKED, "registered_at": NOW, "run_type": "generation"}
    return RunRegistered(run_id, **(given | fields))


def callback_body(
    delivery_id: str = "whd_1", run_id: str = "run_1", event: str = "run.completed", **data: Any
) -> bytes:
    """Return a callback's bytes as FLORA writes them."""
    return json.dumps(
        {
            "id": delivery_id,
            "type": event,
            "api_version": "2026-06-11",
            "created_at": 1_733_952_000_000,
            "data": {
                "run_id": run_id,
                "run_type": "generation",
                "workspace_id": "ws_1",
                "status": event.rpartition(".")[2],
                **data,
            },
        }
    ).encode()


def sign_body(body: bytes, at: datetime = NOW, secret: str = SECRET) -> str:
    """Return the header that goes with a body."""
    return sign(body, secret, timestamp=int(at.timestamp()))


def all_runs(tx: Connection) -> tuple[Run, ...]:
    """Return the runs of a small ledger, newest first."""
    return queries.run_page(tx, limit=100)


@dataclass
class Core:
    """One database and the door before it."""

    database: Database
    clock: Clock
    intake: Intake
    signals: Signals
    metrics: Metrics
    subscriptions: Sequence[Subscription] = field(default_factory=tuple)

    async def call(
        self, delivery_id: str = "whd_1", run_id: str = "run_1", event: str = "run.completed", **data: Any
    ) -> CallbackResult:
        """Send one callback, signed now."""
        body = callback_body(delivery_id, run_id, event, **data)
        return await self.intake.accept(body, sign_body(body, self.clock.now))

    async def register(self, run_id: str = "run_1", **fields: Any) -> Run:
        await self.intake.apply(a_registration(run_id, registered_at=self.clock.now, **fields))
        return await self.run(run_id)

    async def settle(self, run_id: str = "run_1", status: str = "completed", **fields: Any) -> Run:
        """Let the API show the end of a run."""
        await self.intake.apply(a_read(status, self.clock.now, run_id, **fields))
        return await self.run(run_id)

    async def find(self, run_id: str = "run_1") -> Run | None:
        found = await self.database.read(lambda tx: ledger.runs_by_id(tx, [run_id]))
        return found.get(run_id)

    async def run(self, run_id: str = "run_1") -> Run:
        found = await self.find(run_id)
        assert found is not None, f"{run_id} is not in the ledger"
        return found

    async def outputs(self, run_id: str = "run_1") -> tuple[Output, ...]:
        return (await self.database.read(lambda tx: ledger.outputs_of_runs(tx, [run_id])))[run_id]

    async def dispatches(self, run_id: str = "run_1", event: Event | None = None) -> list[Dispatch]:
        rows = await self.database.read(lambda tx: queue.dispatches_of_run(tx, run_id))
        return [row for row in rows if event in (None, row.event)]

    async def rows(self, sql: str) -> list[Any]:
        """Return what a query finds, for facts that no statement of ours reads."""
        return await self.database.read(lambda tx: list(tx.execute(text(sql)).all()))

    async def count(self, table: str) -> int:
        return int((await self.rows(f"SELECT count(*) FROM {table}"))[0][0])  # noqa: S608  # a table's name of ours


def a_core(
    database: Database,
    clock: Clock,
    *,
    subscriptions: Sequence[Subscription] = (Subscription("h"),),
    secrets: Sequence[Secret] = (Secret(SECRET),),
    policy: Policy = POLICY,
    **options: Any,
) -> Core:
    """Put a door before a database."""
    signals, metrics = Signals(), Metrics()
    intake = Intake(
        database,
        secrets=secrets,
        subscriptions=subscriptions,
        policy=policy,
        signals=signals,
        metrics=metrics,
        clock=clock,
        jitter=lambda: 0.0,
        **options,
    )
    return Core(database, clock, intake, signals, metrics, subscriptions)
