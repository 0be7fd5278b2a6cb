"""FLORA's API as the emulator shows it: starting, reading, listing, refusing, idempotency."""

import asyncio
from dataclasses import dataclass

import pytest

from receiver.emulator import Emulator, EmulatorSettings
from receiver.emulator.addresses import callback_problem
from receiver.emulator.idempotency import KeyBook, KeyScope, Remembered
from receiver.emulator.techniques import TECHNIQUES
from tests.emulator.conftest import Bench, MakeBench

PROMPT = {"id": "prompt", "type": "text", "value": "a lighthouse"}
GENERATION = {"type": "image", "prompt": "a cat", "workspace_id": "ws_emulator", "project_id": "prj_1"}


@dataclass
class Clock:
    """A clock that tests set."""

    now: float = 1_700_000_000.0

    def __call__(self) -> float:
        return self.now


async def test_every_technique_runs_on_a_prompt_alone(bench: Bench) -> None:
    """Each declared technique starts with one input and ends with the outputs it declares."""
    for technique in TECHNIQUES:
        started = await bench.start(technique.slug)
        run = (
            await bench.client.get(f"/techniques/{technique.technique_id}/runs/{started['run_id']}")
        ).json()
        if technique.error_code:
            assert (run["status"], run["error_code"], run["progress"]) == (
                "failed",
                technique.error_code,
                100,
            )
            assert "outputs" not in run
        else:
            assert [output["type"] for output in run["outputs"]] == [
                output.type for output in technique.outputs
            ]
            assert run["charged_cost"] == technique.run_cost


def test_a_run_moves_by_the_clock_alone() -> None:
    """pending, running with progress, completed; the cost comes later when it lags."""
    clock = Clock()
    emulator = Emulator(
        EmulatorSettings(run_seconds=10, read_lag_seconds=2, cost_lag_seconds=5), clock=clock
    )
    run_id = emulator.start_run()
    seen = []
    for step in (0, 5, 5, 3, 2):
        clock.now += step
        said = emulator.read_run(run_id, "http://127.0.0.1")
        assert said is not None
        seen.append((said["status"], said["progress"], "charged_cost" in said))
    assert seen == [
        ("pending", 0, False),
        ("running", 44, False),
        ("running", 99, False),
        ("completed", 100, False),
        ("completed", 100, True),
    ]


async def test_generate(bench: Bench) -> None:
    """A generation answers 201 with FLORA's fields and is read at /runs/{id}."""
    answer = await bench.client.post("/generate", json=GENERATION | {"model": "model-x"})
    assert answer.status_code == 201
    started = answer.json()
    assert started["type"] == "generation"
    assert started["model"] == {"model_id": "model-x"}
    assert started["technique"] is None
    run = (await bench.client.get(f"/runs/{started['run_id']}")).json()
    assert run["outputs"][0]["type"] == "imageUrl"


async def test_technique_runs_hide_from_the_runs_route(bench: Bench, make_bench: MakeBench) -> None:
    """As at FLORA, 404; a setting serves them. Under another technique they are never found."""
    run_id = await bench.run_id()
    assert (await bench.client.get(f"/runs/{run_id}")).status_code == 404
    assert (await bench.client.get(f"/techniques/emu-video/runs/{run_id}")).status_code == 404
    open_bench = await make_bench(EmulatorSettings(hide_technique_runs=False))
    assert (await open_bench.client.get(f"/runs/{await open_bench.run_id()}")).status_code == 200


async def test_lists_page_newest_first(bench: Bench) -> None:
    """Following next_cursor sees every run once, newest first; filters hold on every page."""
    ids = [await bench.run_id("emu-image" if n % 2 else "emu-fail") for n in range(7)]
    seen: list[str] = []
    params: dict[str, str] = {"limit": "3"}
    while True:
        page = (await bench.client.get("/technique-runs", params=params)).json()
        seen += [run["run_id"] for run in page["technique_runs"]]
        if page["meta"]["next_cursor"] is None:
            break
        params["cursor"] = page["meta"]["next_cursor"]
    assert seen == ids[::-1]
    for query, count in (
        ({"status": "failed"}, 4),
        ({"technique_id": "emu-image"}, 3),
        ({"technique_id": "tech_emu_image", "status": "failed"}, 0),
        ({"workspace_id": "ws_other"}, 0),
        ({"project_id": "prj_emulator"}, 7),
    ):
        assert (
            len((await bench.client.get("/technique-runs", params=query)).json()["technique_runs"]) == count
        )


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"inputs": []}, "inputs"),
        ({"inputs": "prompt"}, "inputs"),
        ({"inputs": [{**PROMPT, "id": "nothing"}]}, "inputs.0.id"),
        ({"inputs": [PROMPT, PROMPT]}, "inputs.1.id"),
        ({"inputs": [{**PROMPT, "type": "imageUrl"}]}, "inputs.0.type"),
        ({"inputs": [{**PROMPT, "type": "number"}]}, "inputs.0.type"),
        ({"inputs": [{**PROMPT, "value": 3}]}, "inputs.0.value"),
        ({"inputs": [PROMPT, {"id": "image", "type": "image_url", "value": "x"}]}, "inputs.1.value"),
        ({"inputs": [{"id": "image", "type": "image_url", "value": "https://a.example/b.png"}]}, "inputs"),
        ({"inputs": [PROMPT, {"id": "size", "type": "text", "value": "big"}]}, "inputs"),
        ({"mode": "later"}, "mode"),
        ({"callback_url": 1}, "callback_url"),
        ({"callback_url": "http://hooks.example.com/x"}, "callback_url"),
        ({"idempotency_key": ""}, "idempotency_key"),
    ],
)
async def test_wrong_starts_are_refused_by_field(bench: Bench, body: dict[str, object], field: str) -> None:
    """400 input_validation_error names the field; nothing is started."""
    error = (await bench.start(status=400, body=body))["error"]
    assert isinstance(error, dict)
    assert error["code"] == "input_validation_error"
    assert field in [one["field"] for one in error["fields"]]
    assert not (await bench.client.get("/technique-runs")).json()["technique_runs"]


@pytest.mark.parametrize(
    ("method", "path", "content", "status", "code"),
    [
        ("POST", "/techniques/emu-image/runs", "{", 400, "invalid_json"),
        ("POST", "/techniques/emu-image/runs", "[]", 400, "input_validation_error"),
        ("POST", "/techniques/emu-none/runs", "{}", 404, "not_found"),
        ("POST", "/generate", "{}", 400, "input_validation_error"),
        ("GET", "/techniques/emu-none", None, 404, "not_found"),
        ("GET", "/runs/run_none", None, 404, "not_found"),
        ("GET", "/technique-runs?limit=101", None, 400, "input_validation_error"),
        ("GET", "/technique-runs?limit=0", None, 400, "input_validation_error"),
        ("GET", "/technique-runs?limit=x", None, 400, "input_validation_error"),
        ("GET", "/technique-runs?cursor=x", None, 400, "input_validation_error"),
        ("GET", "/generations?status=done", None, 400, "input_validation_error"),
        ("GET", "/nowhere", None, 404, "not_found"),
        ("DELETE", "/generations", None, 405, "method_not_allowed"),
    ],
)
async def test_refusals(
    bench: Bench, method: str, path: str, content: str | None, status: int, code: str
) -> None:
    """Every refusal has FLORA's body and a request-id."""
    answer = await bench.client.request(method, path, content=content)
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
    assert answer.headers["request-id"].startswith("req_")


async def test_ids_of_others(bench: Bench) -> None:
    """A malformed id answers 500 as FLORA does, another workspace 403."""
    for change, status in (
        ({"workspace_id": "abc"}, 500),
        ({"project_id": "abc"}, 500),
        ({"workspace_id": "ws_x"}, 403),
    ):
        assert (await bench.client.post("/generate", json=GENERATION | change)).status_code == status


async def test_keys(bench: Bench) -> None:
    """No key is `unauthorized`, a wrong one `invalid_api_key`."""
    for header, code in (
        ("", "unauthorized"),
        ("Basic abc", "unauthorized"),
        ("Bearer sk_x", "invalid_api_key"),
    ):
        answer = await bench.client.get("/techniques", headers={"authorization": header})
        assert (answer.status_code, answer.json()["error"]["code"]) == (401, code)


async def test_idempotency_in_body_and_header(bench: Bench) -> None:
    """A repeated key is a duplicate, or with another body a conflict.

    Each destination has its own keys, and one run exists.
    """
    await bench.start(body={"idempotency_key": "k"})
    duplicate = (await bench.start(body={"idempotency_key": "k"}, status=409))["error"]
    conflict = (await bench.start(body={"idempotency_key": "k", "mode": "stream"}, status=422))["error"]
    assert isinstance(duplicate, dict)
    assert isinstance(conflict, dict)
    assert (duplicate["code"], conflict["code"]) == ("idempotency_duplicate", "idempotency_conflict")
    await bench.start("emu-video", body={"idempotency_key": "k"})
    assert len((await bench.client.get("/technique-runs")).json()["technique_runs"]) == 2
    header = {"idempotency-key": "k"}
    answers = await asyncio.gather(
        *(bench.client.post("/generate", json=GENERATION, headers=header) for _ in range(5))
    )
    assert sorted(answer.status_code for answer in answers) == [201, 409, 409, 409, 409]


async def test_a_failed_request_releases_its_key(bench: Bench) -> None:
    """After a 400 or a 500 the key may be used again."""
    await bench.start(body={"idempotency_key": "k", "mode": "later"}, status=400)
    await bench.start(body={"idempotency_key": "k"}, faults={"kind": "internal_error"}, status=500)
    await bench.start(body={"idempotency_key": "k"})


async def test_replay(make_bench: MakeBench) -> None:
    """In replay mode the original response is sent again, marked."""
    bench = await make_bench(EmulatorSettings(replay_idempotent=True))
    first = await bench.start(body={"idempotency_key": "k"})
    body = {"mode": "async", "inputs": [PROMPT], "idempotency_key": "k"}
    again = await bench.client.post("/techniques/emu-image/runs", json=body)
    assert again.headers["idempotent-replayed"] == "true"
    assert again.json() == first


def test_a_key_lives_two_hours() -> None:
    """Scaled: at a time scale of 10 it is 720 s."""
    clock = Clock()
    keys = KeyBook(clock, time_scale=10)
    scope = KeyScope("ws_1", "generate", "prj_1", "k")
    keys.remember(scope, "digest", {"run_id": "run_1"})
    clock.now += 719
    assert isinstance(keys.recall(scope), Remembered)
    clock.now += 1
    assert keys.recall(scope) is None


@pytest.mark.parametrize(
    ("url", "public", "private"),
    [
        ("https://hooks.example.com/callbacks/flora?start=1", True, True),
        ("https://203.0.114.9/x", True, True),
        ("http://hooks.example.com/x", False, False),
        ("ftp://hooks.example.com/x", False, False),
        ("https:///x", False, False),
        ("https://hooks.example.com:port/x", False, False),
        ("https://hooks.example.com/a b", False, False),
        ("https://localhost/x", False, True),
        ("http://localhost:8080/x", False, True),
        ("https://LOCALHOST./x", False, True),
        ("https://printer.local/x", False, True),
        ("https://db.internal/x", False, True),
        ("https://metadata.google.internal/x", False, True),
        ("https://169.254.169.254/x", False, True),
        ("https://10.0.0.1/x", False, True),
        ("https://[::1]/x", False, True),
        ("https://[::ffff:127.0.0.1]/x", False, True),
        ("https://[fe80::1]/x", False, True),
        ("https://127.1/x", False, True),
        ("https://2130706433/x", False, True),
        ("https://0x7f000001/x", False, True),
        ("http://receiver:8080/x", False, True),
    ],
)
def test_callback_hosts(url: str, *, public: bool, private: bool) -> None:
    """FLORA accepts public HTTPS only; `allow_private_callbacks` accepts private hosts too."""
    assert (callback_problem(url, allow_private=False) is None) is public
    assert (callback_problem(url, allow_private=True) is None) is private


async def test_seeded_ids_repeat() -> None:
    """The same seed gives the same ids, no seed never does."""
    assert Emulator(EmulatorSettings(seed=3)).start_run() == Emulator(EmulatorSettings(seed=3)).start_run()
    assert Emulator().start_run() != Emulator().start_run()
