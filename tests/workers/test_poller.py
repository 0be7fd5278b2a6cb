"""The poller against the emulated FLORA.

No run is lost by an outage, no response is read in a loop.
"""

from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import httpx
import pytest
from structlog.testing import capture_logs

from receiver.emulator import Emulator, EmulatorSettings, parse_faults
from receiver.emulator.techniques import find_technique
from receiver.flora.client import FloraClient
from receiver.flora.rate_limit import RateLimit
from receiver.model import Event, LostReason, Run, RunState, Subscription, Verdict
from receiver.store import Database
from receiver.workers.poller import Poller
from tests.support.core import NOW, Clock, Core, a_core, writable
from tests.support.patience import PATIENCE_SECONDS
from tests.support.stand import a_poller, run_readers

WORKSPACE = "ws_emulator"
TECHNIQUE = find_technique("emu-image")
assert TECHNIQUE is not None
TECHNIQUE_ID = TECHNIQUE.technique_id


@dataclass
class Sky:
    """An emulated FLORA on our clock, the poller that reads it, and the ledger behind."""

    core: Core
    emulator: Emulator
    poller: Poller
    client: FloraClient
    clients: list[httpx.AsyncClient] = field(default_factory=list)

    def start(self, *faults: dict[str, object]) -> str:
        return self.emulator.start_run(faults=faults)

    async def track(self, run_id: str, **fields: Any) -> None:
        given = {"run_type": "technique", "technique_id": TECHNIQUE_ID, "workspace_id": WORKSPACE, **fields}
        await self.core.register(run_id, **given)

    async def start_tracked(self, *faults: dict[str, object], **fields: Any) -> str:
        """Start a run in the emulator, make it known, and make it due."""
        run_id = self.start(*faults)
        await self.track(run_id, **fields)
        self.core.clock.forward(100)
        return run_id

    def break_it(self, *faults: dict[str, object]) -> None:
        self.emulator.faults.add(parse_faults(list(faults)))

    async def poll(self, seconds: float = 0) -> int:
        """Read what is due, `seconds` later than now, until nothing more follows.

        Return the requests that it took.
        """
        before = self.emulator.gate.requests.total()
        self.core.clock.forward(seconds)
        for _ in range(20):
            asked = self.emulator.gate.requests.total()
            await self.poller.tick(self.core.clock.now)
            await self.poller.drain()
            if self.emulator.gate.requests.total() == asked:
                return asked - before
        raise AssertionError(f"it spins: {self.emulator.gate.requests}")

    async def poll_when_due(self, run_id: str, times: int = 1) -> Run:
        for _ in range(times):
            run = await self.core.run(run_id)
            if run.next_poll_at is None:
                break
            self.core.clock.now = max(self.core.clock.now, run.next_poll_at)
            await self.poll()
        return await self.core.run(run_id)


@pytest.fixture
async def sky(database: Database, clock: Clock) -> AsyncIterator[Sky]:
    subscriptions = [
        Subscription("h", on=(Event.SETTLED, Event.COST_FINAL)),
        Subscription("lost", on=(Event.LOST,)),
    ]
    core = a_core(database, clock, subscriptions=subscriptions)
    settings = EmulatorSettings(run_seconds=10, seed=7, workspace_id=WORKSPACE)
    emulator = Emulator(settings, clock=lambda: clock().timestamp())
    transport = httpx.ASGITransport(app=emulator.app)
    async with httpx.AsyncClient(transport=transport, base_url=emulator.base_url("http://flora")) as http:
        client = FloraClient(
            http, settings.api_key, RateLimit(8, clock=clock), timeout_seconds=PATIENCE_SECONDS
        )
        poller = a_poller(core, run_readers(core, {None: client}))
        yield Sky(core, emulator, poller, client)
    await emulator.aclose()


# --- fair weather
# ------------------------------------------------------------------------------------------------


async def test_a_technique_run_is_read_to_its_end(sky: Sky) -> None:
    """Outputs, cost and dispatch from one request; afterwards it is never read again."""
    run_id = await sky.start_tracked()
    assert await sky.poll() == 1
    run = await sky.core.run(run_id)
    assert (run.state, run.technique_id, run.next_poll_at) == (RunState.COMPLETED, TECHNIQUE_ID, None)
    assert run.charged_cost is not None
    assert len(await sky.core.outputs(run_id)) == 1
    assert [row.event for row in await sky.core.dispatches(run_id, Event.SETTLED)] == [Event.SETTLED]
    assert await sky.poll(10**6) == 0


async def test_a_generation_is_read_on_its_own_route(sky: Sky) -> None:
    given = {"type": "image", "prompt": "x", "workspace_id": WORKSPACE, "project_id": "prj_emulator"}
    run_id = sky.emulator._starter.generation(dict(given)).run_id
    await sky.track(run_id, run_type="generation", technique_id=None)
    assert await sky.poll(100) == 1
    assert (await sky.core.run(run_id)).state is RunState.COMPLETED


async def test_a_failed_run_settles_with_its_error(sky: Sky) -> None:
    run_id = await sky.start_tracked({"kind": "fail", "error_code": "model_timeout"})
    await sky.poll()
    run = await sky.core.run(run_id)
    assert (run.state, run.error_code) == (RunState.FAILED, "model_timeout")
    assert await sky.core.outputs(run_id) == ()


async def test_a_run_that_goes_on_is_read_again_later(sky: Sky) -> None:
    """Not before it is due, and some ten times in all."""
    run_id = await sky.start_tracked({"kind": "run_seconds", "seconds": 3600})
    reads = 0
    while (await sky.core.run(run_id)).state is RunState.OPEN:
        await sky.poll_when_due(run_id)
        reads += 1
    assert reads < 15
    assert (await sky.core.run(run_id)).state is RunState.COMPLETED


@pytest.mark.parametrize("run_type", ["technique", None])
async def test_a_technique_run_whose_technique_nobody_told_us(sky: Sky, run_type: str | None) -> None:
    """Its callback names no technique.

    It is found in the list, and a 404 on the other route counts for nothing.
    """
    run_id = sky.start()
    sky.core.clock.forward(100)
    await sky.core.call(run_id=run_id, run_type=run_type, workspace_id=WORKSPACE)
    run = await sky.poll_when_due(run_id, 4)
    assert (run.state, run.technique_id, run.verdict) == (RunState.COMPLETED, TECHNIQUE_ID, Verdict.MATCHED)
    assert run.missing == 0


async def test_absence_from_a_list_never_counts(sky: Sky) -> None:
    """Not in the list, again and again for days: the run backs off, and is not lost."""
    await sky.core.call(run_id="run_hidden", run_type="technique", workspace_id=WORKSPACE)
    run = await sky.poll_when_due("run_hidden", 30)
    assert (run.state, run.missing, run.losses) == (RunState.REPORTED, 0, 0)
    assert run.next_poll_at is not None
    assert run.next_poll_at - sky.core.clock.now <= timedelta(seconds=300)


async def test_many_runs_cost_few_requests(sky: Sky) -> None:
    """A page shows a hundred: poll the batch, not the item."""
    for _ in range(120):
        await sky.track(sky.start())
    assert await sky.poll(100) <= 12
    assert await sky.core.rows("SELECT state, count(*) FROM runs GROUP BY state") == [("completed", 120)]


# --- lag ------------------------------------------------------------------------------------------
# ---------------


async def test_an_api_that_lags_behind_its_own_callback(sky: Sky) -> None:
    """The ladder finds the end within seconds of its being shown, and the verdict is matched."""
    run_id = await sky.start_tracked({"kind": "read_lag", "seconds": 100})
    await sky.core.call(run_id=run_id, workspace_id=WORKSPACE)
    shown_at = NOW + timedelta(seconds=110)
    run = await sky.poll_when_due(run_id, 10)
    assert (run.state, run.verdict) == (RunState.COMPLETED, Verdict.MATCHED)
    assert run.settled_at is not None
    assert shown_at <= run.settled_at <= shown_at + timedelta(seconds=20)


async def test_a_cost_that_lags_is_told_when_it_comes(sky: Sky) -> None:
    """The run settles at once; its cost follows as an event of its own, once."""
    run_id = await sky.start_tracked({"kind": "cost_lag", "seconds": 150})
    await sky.poll()
    run = await sky.core.run(run_id)
    assert (run.state, run.charged_cost) == (RunState.COMPLETED, None)
    assert await sky.core.dispatches(run_id, Event.COST_FINAL) == []
    run = await sky.poll_when_due(run_id, 20)
    assert run.charged_cost is not None
    assert (run.next_poll_at, run.cost_due_at) == (None, None)
    assert len(await sky.core.dispatches(run_id, Event.COST_FINAL)) == 1


async def test_hurrying_reads_what_is_not_settled_at_once(sky: Sky) -> None:
    """Every open run, or those that are named.

    What is settled is left alone, and a run that goes on has its next read.
    """
    done = await sky.start_tracked()
    await sky.poll()
    long = {"kind": "run_seconds", "seconds": 1000}
    open_runs = {sky.start(long), sky.start(long)}
    for run_id in open_runs:
        await sky.track(run_id)
    one = min(open_runs)
    assert await sky.poll() == 0
    assert await sky.poller.read_now([one, done, "run_unknown"]) == {one}
    assert await sky.poll() == 1
    assert await sky.poller.read_now() == open_runs
    assert await sky.poll() > 0
    assert await sky.poll() == 0
    assert {(await sky.core.run(run_id)).state for run_id in open_runs} == {RunState.OPEN}


async def test_many_costs_that_lag_do_not_make_us_spin(sky: Sky) -> None:
    """A list that shows a settled run still without its cost is an answer.

    The run is due later, not at once.
    """
    run_ids = [sky.start({"kind": "cost_lag", "seconds": 1000}) for _ in range(40)]
    for run_id in run_ids:
        await sky.track(run_id)
    sky.core.clock.forward(100)
    await sky.poll()
    for _ in range(3):
        assert await sky.poll(6) <= 41
        due = {(await sky.core.run(run_id)).next_poll_at for run_id in run_ids}
        assert all(at is not None and at > sky.core.clock.now for at in due)


async def test_completed_without_outputs_ends_loudly(sky: Sky) -> None:
    run_id = await sky.start_tracked({"kind": "no_outputs"})
    run = await sky.poll_when_due(run_id, 10)
    assert (run.state, run.lost_reason) == (RunState.LOST, LostReason.NO_OUTPUTS)
    assert len(await sky.core.dispatches(run_id, Event.LOST)) == 1
    assert await sky.poll(10**6) == 0


# --- foul weather
# ------------------------------------------------------------------------------------------------

WEATHER: list[dict[str, object]] = [
    {"kind": "unauthorized"},
    {"kind": "rate_limited"},
    {"kind": "rate_limited", "retry_after": 30},
    {"kind": "internal_error"},
    {"kind": "service_unavailable"},
    {"kind": "insufficient_credits"},
    {"kind": "html"},
    {"kind": "html", "status": 403},
    {"kind": "html", "status": 404},
    {"kind": "html", "status": 502},
    {"kind": "truncated_json"},
    {"kind": "slow", "seconds": 30},
]


@pytest.mark.parametrize(
    "fault", WEATHER, ids=lambda fault: "-".join(str(value) for value in fault.values())
)
async def test_no_weather_loses_a_run_and_every_weather_passes(sky: Sky, fault: dict[str, object]) -> None:
    """However long it lasts, past the deadline too.

    The run backs off without a spin, and settles when FLORA is back.
    """
    run_id = await sky.start_tracked()
    sky.break_it(fault)
    if fault["kind"] == "slow":
        sky.client._timeout_seconds = 0.1
    assert await sky.poll() <= 2
    run = await sky.core.run(run_id)
    assert (run.state, run.missing, run.unconfirmed_reads) == (RunState.OPEN, 0, 0)
    for _ in range(3):
        assert await sky.poll(24 * 3600) <= 2
    run = await sky.core.run(run_id)
    assert (run.state, run.losses) == (RunState.OPEN, 0)
    sky.emulator.faults.reset()
    sky.client._timeout_seconds = PATIENCE_SECONDS
    assert 1 <= await sky.poll(3700) <= 2
    assert (await sky.core.run(run_id)).state is RunState.COMPLETED


async def test_floras_own_404_counts(sky: Sky) -> None:
    """On the run's right route, five times over ten minutes."""
    await sky.track("run_unknown")
    sky.core.clock.forward(100)
    first = sky.core.clock.now
    run = await sky.poll_when_due("run_unknown", 4)
    assert (run.state, run.missing) == (RunState.OPEN, 4)
    while (run := await sky.poll_when_due("run_unknown")).state is RunState.OPEN:
        assert sky.core.clock.now - first < timedelta(hours=1)
    assert (run.state, run.lost_reason) == (RunState.LOST, LostReason.NOT_FOUND)
    assert sky.core.clock.now - first >= timedelta(minutes=10)


async def test_a_refused_key_is_told_once_and_loudly(sky: Sky) -> None:
    """One critical line however many runs wait, and no requests until the key works again."""
    run_ids = [await sky.start_tracked() for _ in range(3)]
    sky.break_it({"kind": "unauthorized"})
    with capture_logs() as lines:
        for _ in range(5):
            await sky.poll(61)
        asked = sky.emulator.gate.requests.total()
        await sky.poll(1)
        assert sky.emulator.gate.requests.total() == asked
        held = sky.poller.find_hold(None)
        assert held is not None
        assert "FLORA_API_KEY" in held.reason
        assert timedelta(0) < held.until - sky.core.clock.now <= timedelta(seconds=60)
        sky.emulator.faults.reset()
        await sky.poll(200)
        assert sky.poller.find_hold(None) is None
    told = [line["event"] for line in lines if line["log_level"] == "critical"]
    assert told == ["flora.key_refused"]
    assert [line["event"] for line in lines].count("flora.key_accepted") == 1
    for run_id in run_ids:
        assert (await sky.core.run(run_id)).state is RunState.COMPLETED


@pytest.mark.parametrize(
    ("fault", "seconds"),
    [
        ({}, 5),
        ({"retry_after": 30}, 30),
        ({"retry_after": 10**9}, 3600),
        ({"retry_after": 10**6, "as_date": True}, 3600),
    ],
)
async def test_a_rate_limit_is_obeyed_by_all(sky: Sky, fault: dict[str, object], seconds: float) -> None:
    """Not one request of that key before its time is over; afterwards everything goes on."""
    await sky.start_tracked()
    sky.break_it({"kind": "rate_limited", "next": 1, **fault})
    assert await sky.poll() == 1
    await sky.start_tracked()  # due, and made 100 s later
    sky.core.clock.forward(-100)
    assert await sky.poll(seconds - 1) == 0
    assert await sky.poll(120) >= 1
    assert await sky.core.rows("SELECT state, count(*) FROM runs GROUP BY state") == [("completed", 2)]


async def test_a_hold_from_a_clock_that_was_wrong_does_not_last(sky: Sky) -> None:
    """The clock jumped a year ahead, FLORA sent a 429, the clock came back: no pause of a year."""
    run_id = await sky.start_tracked()
    sky.break_it({"kind": "rate_limited", "next": 1})
    await sky.poll(365 * 86_400)
    sky.core.clock.now = NOW + timedelta(seconds=200)
    await sky.core.database.write(lambda tx: tx.exec_driver_sql("UPDATE runs SET next_poll_at = 0").close())
    assert await sky.poll() >= 1
    assert (await sky.core.run(run_id)).polls == 2
    sky.break_it({"kind": "rate_limited", "next": 1})
    await sky.start_tracked()
    assert await sky.poll() == 1
    await sky.core.database.write(lambda tx: tx.exec_driver_sql("UPDATE runs SET next_poll_at = 0").close())
    assert await sky.poll(1) == 0, (
        "a hold of today must count, whatever was held in a year that did not come"
    )


async def test_an_answer_about_another_run_is_no_answer(sky: Sky, monkeypatch: pytest.MonkeyPatch) -> None:
    """It must never settle the run that was asked about."""
    run_id, other = await sky.start_tracked(), sky.start()
    monkeypatch.setitem(sky.emulator.runs._runs, run_id, sky.emulator.runs._runs[other])
    sky.core.clock.forward(100)
    await sky.poll()
    run = await sky.core.run(run_id)
    assert (run.state, run.failures) == (RunState.OPEN, 1)


async def test_without_a_key_runs_wait(sky: Sky) -> None:
    """Nothing can be read: said aloud, and looked at again later, not in a spin."""
    run_id = await sky.start_tracked()
    core = sky.core
    poller = a_poller(core, {})
    with capture_logs() as lines:
        await poller.tick(core.clock.now)
        await poller.drain()
    assert "poll.no_key" in [line["event"] for line in lines]
    held = poller.find_hold("ws_1")
    assert held is not None
    assert "no API key" in held.reason
    run = await core.run(run_id)
    assert run.state is RunState.OPEN
    assert run.next_poll_at is not None
    assert run.next_poll_at >= core.clock.now + timedelta(seconds=60)


async def test_one_workspaces_refused_key_starves_no_other(sky: Sky) -> None:
    """Many runs of a workspace whose key is refused are due first.

    The others are read all the same.
    """
    core = sky.core
    transport = httpx.ASGITransport(app=sky.emulator.app)
    base_url = sky.emulator.base_url("http://flora")
    async with httpx.AsyncClient(transport=transport, base_url=base_url) as http:
        keys = {"ws_bad": "sk_wrong", None: "sk_test_emulator"}
        clients = {
            key: FloraClient(http, value, RateLimit(8, clock=core.clock)) for key, value in keys.items()
        }
        poller = a_poller(core, run_readers(core, clients))
        for number in range(60):
            await sky.track(f"run_bad{number}", workspace_id="ws_bad")
        core.clock.forward(1)
        good = [sky.start() for _ in range(3)]
        for run_id in good:
            await sky.track(run_id)
        core.clock.forward(200)
        for _ in range(5):
            await poller.tick(core.clock.forward(1))
            await poller.drain()
    for run_id in good:
        assert (await core.run(run_id)).state is RunState.COMPLETED


async def test_a_ledger_that_cannot_be_written_makes_no_storm(sky: Sky) -> None:
    """The answer is lost, the run stays due; FLORA is not asked again and again meanwhile."""
    run_id = await sky.start_tracked()
    await writable(sky.core.database, False)
    assert await sky.poll() <= 2
    await writable(sky.core.database, True)
    await sky.poll(10)
    assert (await sky.core.run(run_id)).state is RunState.COMPLETED
