"""Faults of the API and of runs, and how they are selected."""

import random
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime

import httpx
import pytest

from receiver.emulator.faults import KINDS, Family, FaultBook, InvalidFaultError, parse_faults
from tests.emulator.conftest import Bench


@pytest.mark.parametrize(
    ("fault", "status", "code"),
    [
        ({"kind": "rate_limited"}, 429, "rate_limited"),
        ({"kind": "internal_error"}, 500, "internal_error"),
        ({"kind": "service_unavailable"}, 503, "service_unavailable"),
        ({"kind": "unauthorized"}, 401, "unauthorized"),
        ({"kind": "not_found"}, 404, "not_found"),
        ({"kind": "insufficient_credits"}, 402, "insufficient_credits"),
    ],
)
async def test_refusals_start_nothing(
    bench: Bench, fault: dict[str, object], status: int, code: str
) -> None:
    """The response has FLORA's body, and no run exists."""
    error = (await bench.start(faults=fault, status=status))["error"]
    assert isinstance(error, dict)
    assert error["code"] == code
    assert not (await bench.client.get("/technique-runs")).json()["technique_runs"]


async def test_retry_after(bench: Bench) -> None:
    """The header is present where the fault sets it, and only there."""
    await bench.break_it({"kind": "rate_limited", "retry_after": 2, "next": 1}, {"kind": "rate_limited"})
    first, second = [await bench.client.get("/techniques") for _ in range(2)]
    assert first.headers["retry-after"] == "2"
    assert "retry-after" not in second.headers
    assert first.headers["request-id"].startswith("req_")


async def test_retry_after_as_a_date(bench: Bench) -> None:
    """HTTP allows both forms."""
    await bench.break_it({"kind": "rate_limited", "retry_after": 90, "as_date": True})
    until = parsedate_to_datetime((await bench.client.get("/techniques")).headers["retry-after"])
    assert timedelta(seconds=80) < until - datetime.now(UTC) < timedelta(seconds=100)


async def test_html(bench: Bench) -> None:
    """200 with a page of a proxy."""
    await bench.break_it({"kind": "html"})
    answer = await bench.client.get("/techniques")
    assert (answer.status_code, answer.headers["content-type"][:9]) == (200, "text/html")


async def test_spoiled_responses_of_starts_that_happened(bench: Bench) -> None:
    """Slow, truncated and cut responses: the run was started nevertheless."""
    await bench.start(faults={"kind": "slow", "seconds": 0.01})
    body = {"mode": "async", "inputs": [{"id": "prompt", "type": "text", "value": "x"}]}
    header = {"Emulator-Faults": '{"kind": "truncated_json"}'}
    answer = await bench.client.post("/techniques/emu-image/runs", json=body, headers=header)
    with pytest.raises(ValueError, match=r"Expecting|Unterminated"):
        answer.json()
    with pytest.raises(httpx.RemoteProtocolError):
        await bench.start(faults={"kind": "cut_answer"})
    assert len((await bench.client.get("/technique-runs")).json()["technique_runs"]) == 3


async def test_selection_by_path_method_and_count(bench: Bench) -> None:
    """A fault applies where and as often as it says, and then leaves the list."""
    await bench.break_it(
        {"kind": "service_unavailable", "path": "/technique-runs", "method": "get", "next": 2}
    )
    assert (await bench.client.get("/generations")).status_code == 200
    statuses = [(await bench.client.get("/technique-runs")).status_code for _ in range(3)]
    assert statuses == [503, 503, 200]
    assert (await bench.client.get(f"{bench.origin}/_emulator/faults")).json() == {"faults": []}


async def test_api_faults_bound_to_a_run(bench: Bench) -> None:
    """Only reads of that run fail."""
    run, other = await bench.start(), await bench.start()
    path = f"{bench.origin}/_emulator/runs/{run['run_id']}/faults"
    bound = (await bench.client.post(path, json={"kind": "internal_error"})).json()["faults"]
    assert bound == [{"kind": "internal_error", "probability": 1.0}]
    assert (await bench.client.get(str(run["poll_url"]))).status_code == 500
    assert (await bench.client.get(str(other["poll_url"]))).status_code == 200
    assert (await bench.client.delete(f"{bench.origin}/_emulator/faults")).json() == {"faults": []}
    assert (await bench.client.get(str(run["poll_url"]))).status_code == 200


async def test_runs_that_end_oddly(bench: Bench) -> None:
    """Failed, without outputs, with one output id twice, without a cost yet."""
    for technique, fault in (
        ("emu-image", {"kind": "fail", "error_code": "model_timeout"}),
        ("emu-image", {"kind": "no_outputs"}),
        ("emu-two-images", {"kind": "same_output_ids"}),
        ("emu-image", {"kind": "cost_lag", "seconds": 3600}),
    ):
        await bench.start(technique, faults=fault)
    runs = (await bench.client.get("/technique-runs")).json()["technique_runs"][::-1]
    assert runs[0]["error_code"] == "model_timeout"
    assert runs[1]["outputs"] == []
    assert len({output["output_id"] for output in runs[2]["outputs"]}) == 1
    assert "charged_cost" not in runs[3]
    assert "charged_cost" in runs[2]


async def test_run_faults_in_force_apply_to_every_start(bench: Bench) -> None:
    """A run fault of the control endpoint counts down at starts."""
    await bench.break_it({"kind": "fail", "next": 1})
    for _ in range(2):
        await bench.start()
    runs = (await bench.client.get("/technique-runs")).json()["technique_runs"]
    assert [run["status"] for run in runs] == ["completed", "failed"]


async def test_requests_are_counted(bench: Bench) -> None:
    """By method and route, for budgets."""
    await bench.start()
    await bench.client.get("/technique-runs?limit=100")
    counted = (await bench.client.get(f"{bench.origin}/_emulator/requests")).json()["requests"]
    assert counted == {"POST /techniques/{technique_id}/runs": 1, "GET /technique-runs": 1}


def test_probability_is_seeded() -> None:
    """The same seed draws the same faults, about as often as their probability says."""

    def draw() -> list[bool]:
        book = FaultBook(random.Random(1), parse_faults({"kind": "drop", "probability": 0.3}))
        return [bool(book.take(Family.CALLBACK)) for _ in range(1000)]

    assert draw() == draw()
    assert 250 < sum(draw()) < 350


def test_every_kind_parses_with_its_defaults() -> None:
    """Its JSON form parses to the same fault."""
    for kind in KINDS:
        [fault] = parse_faults({"kind": kind})
        assert parse_faults(fault.to_json()) == (fault,)


@pytest.mark.parametrize(
    "document",
    [
        "drop",
        {},
        {"kind": "nothing"},
        {"kind": "drop", "copies": 1},
        {"kind": "duplicate", "copies": "two"},
        {"kind": "duplicate", "copies": True},
        {"kind": "expired", "status": None},
        {"kind": "drop", "probability": 2},
        {"kind": "drop", "next": 0},
        {"kind": "drop", "attempts": 1},
    ],
)
async def test_faults_that_make_no_sense(bench: Bench, document: object) -> None:
    """They are refused by the parser and by the control endpoint."""
    with pytest.raises(InvalidFaultError):
        parse_faults(document)
    answer = await bench.client.post(f"{bench.origin}/_emulator/faults", json={"faults": document})
    assert answer.status_code == 400


async def test_faults_header_must_be_json(bench: Bench) -> None:
    """A header that cannot be parsed is a 400, not a missing fault."""
    answer = await bench.client.get("/techniques", headers={"Emulator-Faults": "drop"})
    assert answer.json()["error"]["fields"][0]["field"] == "emulator-faults"
