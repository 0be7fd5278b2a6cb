"""Starts at the emulator: whatever happens, there is one run, and the database has it."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

from receiver.emulator import Emulator, EmulatorSettings, parse_faults
from receiver.emulator.runs import Run as Emulated
from receiver.flora.client import FloraClient
from receiver.flora.rate_limit import RateLimit
from receiver.flora.start_request import StartRequest, add_token, is_same_address
from receiver.intake.callbacks import Accepted
from receiver.model import Origin, RunState, Start, StartState
from receiver.net.clients import api_client
from receiver.store import schema
from receiver.web.server import Server, bind
from receiver.workers.starter import Committed, Conflict, Starter
from tests.support.core import Core, a_read, a_registration, callback_body, sign_body
from tests.support.patience import PATIENCE_SECONDS

OURS = "https://hooks.example.com/callbacks/flora"
PROMPT = {"id": "prompt", "type": "text", "value": "a lighthouse"}
REQUEST = StartRequest(
    technique_id="emu-image", inputs=(PROMPT,), idempotency_key="k", metadata={"market": "de"}
)
GENERATE = {
    "type": "image",
    "prompt": "a lighthouse",
    "workspace_id": "ws_emulator",
    "project_id": "prj_emulator",
}


@dataclass
class Scene:
    """A database, an emulated FLORA on the same clock, and starters.

    Another one is the process after a crash.
    """

    core: Core
    emulator: Emulator
    client: FloraClient
    callback_url: str | None = OURS
    starters: list[Starter] = field(default_factory=list)

    def process(self, *, asks: bool = True, callback_url: str | None = OURS) -> Starter:
        """A process that was just started; one that does not ask dies before it can."""
        starter = Starter(
            self.core.database,
            self.core.intake,
            {None: self.client},
            signals=self.core.signals,
            callback_url=callback_url,
            clock=self.core.clock,
            jitter=lambda: 0.0,
        )
        starter._stopped = not asks
        self.starters.append(starter)
        return starter

    def break_it(self, **fault: Any) -> None:
        self.emulator.faults.add(parse_faults({"method": "POST", "next": 1, **fault}))

    async def start(self, starter: Starter, request: StartRequest = REQUEST) -> Start:
        """Start, wait for FLORA's answer if there is one, and return what the ledger says."""
        begun = await starter.start(request)
        assert isinstance(begun, Committed)
        await starter.drain()
        return await self.read(begun.start)

    async def read(self, start: Start) -> Start:
        found = await self.starters[-1].find(start.token)
        assert found is not None
        return found

    async def again(self, starter: Starter, start: Start, seconds: float = 60) -> Start:
        """Let time pass, let the loop look once, and return what became of a start."""
        self.core.clock.forward(seconds)
        await starter.tick(self.core.clock.now)
        await starter.drain()
        return await self.read(start)

    @property
    def runs(self) -> list[Emulated]:
        """Every run at FLORA, newest first."""
        return [run for _, run in self.emulator.runs.newest(None)]

    @property
    def posts(self) -> int:
        return sum(count for name, count in self.emulator.gate.requests.items() if name.startswith("POST"))

    async def call_back(self, run: Emulated, token: str | None = None) -> None:
        """Let FLORA call back about a run, at the URL that the run was started with."""
        query = parse_qs(urlsplit(run.callback_url or "").query)
        body = callback_body(
            f"whd_{run.run_id}", run.run_id, run_type="technique", workspace_id=run.workspace_id
        )
        start = token or query["start"][0]
        assert (
            await self.core.intake.accept(body, sign_body(body, self.core.clock.now), start=start)
            == Accepted()
        )

    async def is_known(self, start: Start) -> None:
        """Check that FLORA has exactly one run, of this start, and that the database has it."""
        [run] = self.runs
        assert (start.state, start.run_id) == (StartState.STARTED, run.run_id)
        known = await self.core.run(run.run_id)
        assert known.origin in {Origin.STARTED, Origin.CALLBACK}
        assert (known.technique_id, known.run_type) == (start.technique_id, "technique")
        assert known.metadata == start.metadata


@contextlib.asynccontextmanager
async def run_scene(core: Core, **emulation: Any) -> AsyncIterator[Scene]:
    settings = EmulatorSettings(run_seconds=10**6, allow_private_callbacks=True, seed=3, **emulation)
    emulator = Emulator(settings, clock=lambda: core.clock().timestamp())
    stand = Server(emulator.app, bind("127.0.0.1", 0))
    await stand.start()
    try:
        async with api_client(emulator.base_url(f"http://127.0.0.1:{stand.port}")) as http:
            yield Scene(
                core,
                emulator,
                FloraClient(
                    http, settings.api_key, RateLimit(8, clock=core.clock), timeout_seconds=PATIENCE_SECONDS
                ),
            )
    finally:
        await emulator.aclose()
        await stand.stop()


@pytest.fixture
async def scene(core: Core) -> AsyncIterator[Scene]:
    async with run_scene(core) as made:
        yield made


async def test_a_start_is_committed_asked_and_linked(scene: Scene) -> None:
    """FLORA gets the callback URL with the start's token, and the caller's key.

    The run has the metadata.
    """
    start = await scene.start(scene.process())
    await scene.is_known(start)
    assert scene.runs[0].callback_url == f"{OURS}?start={start.token}"
    assert json.loads(start.request)["idempotency_key"] == "k"
    assert (await scene.core.run(scene.runs[0].run_id)).callback_expected


async def test_the_same_key_again_starts_nothing(scene: Scene) -> None:
    """In the same process and in the next. Metadata may differ, since FLORA does not get it."""
    first = await scene.start(scene.process())
    for starter in (scene.starters[0], scene.process()):
        begun = await starter.start(
            StartRequest(technique_id="emu-image", inputs=(PROMPT,), idempotency_key="k")
        )
        assert isinstance(begun, Committed)
        assert begun.is_repeat
        assert begun.start == first
    assert scene.posts == 1
    await scene.is_known(first)


async def test_two_at_once_with_one_key_start_one_run(scene: Scene) -> None:
    starter = scene.process()
    one, two = await asyncio.gather(starter.start(REQUEST), starter.start(REQUEST))
    assert isinstance(one, Committed)
    assert isinstance(two, Committed)
    assert one.start.token == two.start.token
    assert {one.is_repeat, two.is_repeat} == {True, False}
    await starter.drain()
    await scene.is_known(await scene.read(one.start))


async def test_the_same_key_for_something_else_is_a_conflict(scene: Scene) -> None:
    first = await scene.start(scene.process())
    other = StartRequest(
        technique_id="emu-image", inputs=({**PROMPT, "value": "a fox"},), idempotency_key="k"
    )
    answer = await scene.starters[0].start(other)
    assert answer == Conflict(first)
    assert scene.posts == 1


async def test_without_a_key_every_start_is_its_own(scene: Scene) -> None:
    starter = scene.process()
    request = StartRequest(technique_id="emu-image", inputs=(PROMPT,))
    one, two = await scene.start(starter, request), await scene.start(starter, request)
    assert one.run_id != two.run_id
    assert len(scene.runs) == 2


async def test_a_generation_is_started_by_header_key(scene: Scene) -> None:
    starter = scene.process()
    request = StartRequest(generate=GENERATE, idempotency_key="g", workspace_id="ws_emulator")
    start = await scene.start(starter, request)
    [run] = scene.runs
    assert (start.state, start.run_id) == (StartState.STARTED, run.run_id)
    assert run.callback_url == f"{OURS}?start={start.token}"
    assert "idempotency_key" not in json.loads(start.request)
    known = await scene.core.run(run.run_id)
    assert (known.run_type, known.technique_id, known.quoted_cost) == ("generation", None, 0.04)


@pytest.mark.parametrize(
    "fault",
    [
        {"kind": "rate_limited", "retry_after": 7},
        {"kind": "rate_limited"},
        {"kind": "internal_error"},
        {"kind": "service_unavailable"},
        {"kind": "html", "status": 502},
        {"kind": "html", "status": 200},
        {"kind": "cut_answer"},
        {"kind": "truncated_json"},
    ],
    ids=lambda fault: "-".join(str(part) for part in fault.values()),
)
async def test_an_answer_that_says_nothing_is_asked_again(scene: Scene, fault: Mapping[str, Any]) -> None:
    """Whether FLORA carried the first request out or not.

    The same bytes are sent again, and one run exists.
    """
    scene.break_it(**fault)
    starter = scene.process()
    start = await scene.start(starter)
    assert start.state is StartState.ASKING
    assert (start.attempts, start.run_id) == (1, None)
    await scene.is_known(await scene.again(starter, start))


async def test_an_answer_that_takes_too_long_is_asked_again(scene: Scene) -> None:
    """FLORA carries out the first request after its time-out.

    The key keeps the second from starting another run.
    """
    scene.break_it(kind="slow", seconds=0.3)
    scene.client._timeout_seconds = 0.1
    starter = scene.process()
    start = await scene.start(starter)
    assert start.state is StartState.ASKING
    scene.client._timeout_seconds = PATIENCE_SECONDS
    await scene.is_known(await scene.again(starter, start))


async def test_a_pause_that_flora_asks_for_is_kept(scene: Scene) -> None:
    scene.break_it(kind="rate_limited", retry_after=30)
    starter = scene.process()
    start = await scene.start(starter)
    assert (await scene.again(starter, start, 29)).state is StartState.ASKING
    assert scene.posts == 1
    await scene.is_known(await scene.again(starter, start, 2))


@pytest.mark.parametrize(
    ("request_", "status", "code", "field"),
    [
        (StartRequest(technique_id="nope", inputs=(PROMPT,)), 404, "not_found", None),
        (StartRequest(technique_id="emu-image"), 400, "input_validation_error", "inputs"),
        (
            StartRequest(technique_id="emu-image", inputs=({**PROMPT, "id": "q"},)),
            400,
            "input_validation_error",
            "inputs.0.id",
        ),
    ],
)
async def test_a_refusal_is_kept_with_its_reasons(
    scene: Scene, request_: StartRequest, status: int, code: str, field: str | None
) -> None:
    start = await scene.start(scene.process(), request_)
    assert (start.state, start.error_status, start.error_code) == (StartState.REFUSED, status, code)
    assert (start.request_id or "").startswith("req_")
    assert field in {None, *(name for name, _ in start.error_fields)}
    assert scene.runs == []


async def test_a_refused_start_may_be_asked_again(scene: Scene) -> None:
    """FLORA releases the key of what it refused: with credits bought, the same command works."""
    scene.break_it(kind="insufficient_credits")
    starter = scene.process()
    refused = await scene.start(starter)
    assert (refused.state, refused.error_code) == (StartState.REFUSED, "insufficient_credits")
    start = await scene.start(starter)
    await scene.is_known(start)
    assert start.error_code is None


async def test_a_crash_before_flora_was_asked(scene: Scene) -> None:
    """The next process asks."""
    start = await scene.start(scene.process(asks=False))
    assert (start.state, scene.posts) == (StartState.ASKING, 0)
    await scene.is_known(await scene.again(scene.process(), start))


async def test_a_crash_before_the_answer_was_committed(scene: Scene) -> None:
    """The next process asks again, hears that the key was used, and finds the run in the list."""
    start = await scene.start(scene.process(asks=False))
    await scene.client.start_technique_run(start.technique_id, json.loads(start.request))
    await scene.is_known(await scene.again(scene.process(), start, 1))


async def test_a_crash_before_the_answer_with_replay(core: Core) -> None:
    """A FLORA that answers a repeated key with the first run names it."""
    async with run_scene(core, replay_idempotent=True) as scene:
        start = await scene.start(scene.process(asks=False))
        await scene.client.start_technique_run(start.technique_id, json.loads(start.request))
        await scene.is_known(await scene.again(scene.process(), start, 1))


async def test_a_callback_that_overtakes_the_answer_names_the_run(scene: Scene) -> None:
    """The token in its URL links it in its own commit; the next process has nothing to ask."""
    start = await scene.start(scene.process(asks=False))
    await scene.client.start_technique_run(start.technique_id, json.loads(start.request))
    await scene.call_back(scene.runs[0])
    await scene.is_known(await scene.read(start))
    posts = scene.posts
    await scene.is_known(await scene.again(scene.process(), start))
    assert scene.posts == posts


async def test_a_run_of_others_waits_for_earlier_starts_alone(scene: Scene) -> None:
    """A start without a response may name a run whose callback had no token.

    One made after the callback cannot.

    Else, where one start follows the other, as in a batch, the runs of others in that workspace
    would never be settled.
    """
    core, starter = scene.core, scene.process(asks=False)
    await scene.start(starter)
    core.clock.forward(1)
    await core.call("whd_x", "run_x")
    await core.intake.apply(a_read("completed", core.clock.forward(1), "run_x"))
    assert (await core.run("run_x")).state is RunState.REPORTED
    for number in range(4):
        core.clock.forward(31)
        await scene.start(starter, replace(REQUEST, idempotency_key=f"later {number}"))
    await core.intake.apply(a_read("completed", core.clock.now, "run_x"))
    assert (await core.run("run_x")).state is RunState.COMPLETED


async def test_two_runs_that_could_be_meant_are_not_guessed(scene: Scene) -> None:
    """Searched for a while, then unknown, and it says what to do.

    Its callback settles it by itself.
    """
    start = await scene.start(scene.process(asks=False))
    await scene.client.start_technique_run(start.technique_id, json.loads(start.request))
    mine = scene.runs[0]
    scene.emulator.start_run("emu-image")
    process = scene.process()
    assert (await scene.again(process, start, 1)).state is StartState.ASKING
    unknown = await scene.again(process, start, 600)
    assert (unknown.state, unknown.error_code) == (StartState.UNKNOWN, "unknown_outcome")
    assert "runs resolve" in (unknown.error_message or "")
    await scene.call_back(mine)
    settled = await scene.read(start)
    assert (settled.state, settled.run_id, settled.error_code) == (StartState.STARTED, mine.run_id, None)


async def test_two_starts_that_could_be_meant_are_not_guessed(scene: Scene) -> None:
    starter = scene.process(asks=False)
    one = await scene.start(starter)
    two = await scene.start(
        starter,
        StartRequest(technique_id="emu-image", inputs=({**PROMPT, "value": "b"},), idempotency_key="k2"),
    )
    for start in (one, two):
        await scene.client.start_technique_run(start.technique_id, json.loads(start.request))
    next_process = scene.process()
    await scene.again(next_process, one, 1)
    assert {(await scene.read(start)).state for start in (one, two)} == {StartState.ASKING}
    await scene.again(next_process, one, 600)
    assert {(await scene.read(start)).state for start in (one, two)} == {StartState.UNKNOWN}


async def test_the_last_of_several_starts_is_told_apart(scene: Scene) -> None:
    """After a crash two starts and two runs could belong together.

    A callback names one, which leaves one for the other.
    """
    starter = scene.process(asks=False)
    one = await scene.start(starter)
    two = await scene.start(
        starter,
        StartRequest(technique_id="emu-image", inputs=({**PROMPT, "value": "b"},), idempotency_key="k2"),
    )
    for start in (one, two):
        await scene.client.start_technique_run(start.technique_id, json.loads(start.request))
    second, first = scene.runs
    next_process = scene.process()
    await scene.again(next_process, one, 1)
    await scene.call_back(first)
    assert (await scene.read(one)).run_id == first.run_id
    found = await scene.again(next_process, two, 10)
    assert (found.state, found.run_id) == (StartState.STARTED, second.run_id)


async def test_a_run_that_the_ledger_knows_is_nobody_elses(scene: Scene) -> None:
    """A run that was tracked meanwhile is not taken for the one of an unanswered start."""
    start = await scene.start(scene.process(asks=False))
    other = scene.emulator.start_run("emu-image")
    await scene.core.intake.apply(a_registration(other))
    await scene.client.start_technique_run(start.technique_id, json.loads(start.request))
    found = await scene.again(scene.process(), start, 1)
    assert found.run_id not in {None, other}


@pytest.mark.parametrize("url", [OURS, None], ids=["conflict", "duplicate"])
async def test_a_key_that_flora_knew_before_is_unknown_at_once(scene: Scene, url: str | None) -> None:
    """As after the restore of an older backup: no run since is taken for it, and an operator names it.

    FLORA compares bodies: with our callback URL, whose token is new, it answers 422, else 409.
    """
    lost = await scene.start(scene.process(asks=False, callback_url=url))
    await scene.client.start_technique_run(lost.technique_id, json.loads(lost.request))
    mine = scene.runs[0]
    await scene.core.database.write(lambda tx: tx.execute(schema.starts.delete()))
    scene.core.clock.forward(60)
    scene.emulator.start_run("emu-image")
    start = await scene.start(scene.process(callback_url=url))
    assert (start.state, start.error_code, start.run_id) == (StartState.UNKNOWN, "key_used_before", None)
    assert "runs resolve" in (start.error_message or "")
    again = await scene.starters[-1].start(REQUEST)
    assert isinstance(again, Committed)
    assert (again.is_repeat, again.start) == (True, start)
    resolved = await scene.starters[-1].resolve(start.token, mine.run_id)
    assert resolved is not None
    assert (resolved.state, resolved.run_id, resolved.error_code) == (StartState.STARTED, mine.run_id, None)


async def test_a_key_of_another_request_is_refused(scene: Scene) -> None:
    """Without a callback URL of ours, bodies differ by what the caller wrote: a mistake of the caller."""
    lost = await scene.start(scene.process(asks=False, callback_url=None))
    await scene.client.start_technique_run(lost.technique_id, json.loads(lost.request))
    await scene.core.database.write(lambda tx: tx.execute(schema.starts.delete()))
    other = replace(REQUEST, inputs=({**PROMPT, "value": "a fox"},))
    start = await scene.start(scene.process(callback_url=None), other)
    assert (start.state, start.error_code) == (StartState.REFUSED, "idempotency_conflict")


async def test_a_request_that_another_process_may_have_repeated_is_searched(scene: Scene) -> None:
    """Past its head start, the run may be that of the same start."""
    start = await scene.start(scene.process(asks=False))
    await scene.client.start_technique_run(start.technique_id, json.loads(start.request))
    starter = scene.process()
    starter._head_start = timedelta(seconds=5)
    scene.core.clock.forward(6)
    starter._send_soon(start, is_first=True)
    await starter.drain()
    await scene.is_known(await scene.read(start))


async def test_what_is_older_than_flora_keeps_keys_is_not_posted_again(scene: Scene) -> None:
    """After 100 minutes a second POST could start a second run.

    The start is searched for, then unknown.
    """
    start = await scene.start(scene.process(asks=False))
    after = await scene.again(scene.process(), start, 101 * 60)
    assert (after.state, scene.posts, scene.runs) == (StartState.UNKNOWN, 0, [])


async def test_a_callback_url_of_the_callers_is_passed_on(scene: Scene) -> None:
    """FLORA calls somebody else then: no callback is expected here, the run is polled."""
    url = "https://hooks.example.com/elsewhere"
    start = await scene.start(
        scene.process(), StartRequest(technique_id="emu-image", inputs=(PROMPT,), callback_url=url)
    )
    [run] = scene.runs
    assert run.callback_url == url
    assert not start.callback_expected
    assert not (await scene.core.run(run.run_id)).callback_expected


async def test_our_own_callback_url_gets_its_token_though_the_caller_wrote_it(scene: Scene) -> None:
    request = StartRequest(technique_id="emu-image", inputs=(PROMPT,), callback_url=f"{OURS}/?a=1&start=x")
    start = await scene.start(scene.process(), request)
    assert scene.runs[0].callback_url == f"{OURS}/?a=1&start={start.token}"
    assert start.callback_expected


async def test_without_a_public_url_runs_are_polled(scene: Scene) -> None:
    start = await scene.start(scene.process(callback_url=None))
    assert scene.runs[0].callback_url is None
    assert not (await scene.core.run(start.run_id or "")).callback_expected


async def test_another_address_counts_from_the_next_start_on(scene: Scene) -> None:
    """A tunnel has moved: what is started now is called back there.

    The same key again starts nothing.
    """
    starter = scene.process(callback_url=None)
    before = await scene.start(starter)
    starter.callback_url = OURS
    after = await scene.start(starter, replace(REQUEST, idempotency_key="other"))
    assert [run.callback_url for run in scene.runs] == [add_token(OURS, after.token), None]
    assert (after.callback_expected, before.callback_expected) == (True, False)
    assert (await scene.start(starter)).run_id == before.run_id
    assert len(scene.runs) == 2


@pytest.mark.parametrize("to_a_run", [True, False])
async def test_an_operator_settles_what_is_unknown(scene: Scene, to_a_run: bool) -> None:
    start = await scene.start(scene.process(asks=False))
    unknown = await scene.again(scene.process(), start, 101 * 60)
    run_id = scene.emulator.start_run("emu-image") if to_a_run else None
    resolved = await scene.starters[-1].resolve(unknown.token, run_id)
    assert resolved is not None
    assert (resolved.state, resolved.run_id) == (
        StartState.STARTED if to_a_run else StartState.REFUSED,
        run_id,
    )
    if run_id:
        assert (await scene.core.run(run_id)).metadata == {"market": "de"}
    else:
        await scene.is_known(await scene.start(scene.starters[-1]))
    assert await scene.starters[-1].resolve("nobody", None) is None


async def test_waiting_for_an_answer_ends_with_it_or_with_time(scene: Scene) -> None:
    starter = scene.process()
    begun = await starter.start(REQUEST)
    assert isinstance(begun, Committed)
    answered = await starter.wait_for_response(begun.start.token, timeout_seconds=PATIENCE_SECONDS)
    assert answered is not None
    assert answered.state is StartState.STARTED
    silent = await scene.start(
        scene.process(asks=False),
        StartRequest(technique_id="emu-text", inputs=(PROMPT,), idempotency_key="s"),
    )
    waited = await starter.wait_for_response(silent.token, timeout_seconds=0)
    assert waited is not None
    assert waited.state is StartState.ASKING


async def test_stopping_lets_flora_finish_its_answer(scene: Scene) -> None:
    """An answer that is on its way at SIGTERM is not thrown away."""
    scene.break_it(kind="slow", seconds=0.2)
    starter = scene.process()
    begun = await starter.start(REQUEST)
    assert isinstance(begun, Committed)
    stopping = asyncio.Event()
    loop = asyncio.create_task(starter.run(stopping))
    stopping.set()
    await loop
    await scene.is_known(await scene.read(begun.start))


async def test_after_stopping_intents_are_left_to_the_next_process(scene: Scene) -> None:
    starter = scene.process()
    stopping = asyncio.Event()
    stopping.set()
    await starter.run(stopping)
    start = await scene.start(starter)
    assert (start.state, scene.posts) == (StartState.ASKING, 0)
    await scene.is_known(await scene.again(scene.process(), start))


async def test_a_tracked_run_meets_its_early_callback(scene: Scene) -> None:
    """Tracked after its callback came: what only the caller knows is filled in."""
    run_id = scene.emulator.start_run("emu-image")
    body = callback_body("whd_early", run_id, run_type="technique")
    await scene.core.intake.accept(body, sign_body(body, scene.core.clock.now))
    run = await scene.process().track(a_registration(run_id, technique_id="emu-image", metadata={"a": 1}))
    assert (run.state, run.technique_id, run.metadata) == (RunState.REPORTED, "emu-image", {"a": 1})


def test_a_token_takes_the_place_of_another() -> None:
    assert add_token("https://h.example/c?start=1&b=2", "T") == "https://h.example/c?b=2&start=T"
    assert is_same_address("https://H.example/c/?x=1", "https://h.example/c")
    assert not is_same_address("https://h.example/c", "http://h.example/c")
