"""The Python client against prepared responses: what it sends, what it returns, when it retries."""

import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from receiver.client.client import ReceiverApiError, ReceiverClient

RUN = {
    "run_id": "run_1",
    "state": "open",
    "settled": False,
    "finished": False,
    "cost_final": False,
    "first_seen_at": "2026-11-24T12:00:00+00:00",
    "metadata": {"a": 1},
}
START = {"state": "started", "run_id": "run_1", "idempotency_key": "k", "token": "t", "error": None}
Result = httpx.Response | Exception
NAMES = ("RECEIVER_OPS_URL", "RECEIVER_OPS_TOKEN", "RECEIVER_OPS_TOKEN_FILE")


class Service:
    """Returns prepared responses one after the other, and keeps the requests."""

    def __init__(self, *results: Result) -> None:
        self.results = iter(results)
        self.requests: list[httpx.Request] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        result = next(self.results)
        if isinstance(result, Exception):
            raise result
        return result

    def client(self) -> ReceiverClient:
        client = ReceiverClient("http://127.0.0.1:8081", "tok")
        client._connection.http._transport = httpx.MockTransport(self)
        client._connection.http._mounts = {}
        return client

    def body(self, index: int = 0) -> Any:
        return json.loads(self.requests[index].content)


def ok(**data: Any) -> httpx.Response:
    return httpx.Response(200, json=data)


def refusal(status: int, code: str, **more: Any) -> httpx.Response:
    return httpx.Response(status, json={"error": {"code": code, "message": "no", **more}})


@pytest.fixture(autouse=True)
def _clear_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)


def test_a_start_carries_a_key_of_its_own() -> None:
    """After a cut connection, a repeated request must name the same start."""
    service = Service(ok(start=START, run=RUN, repeated=True))
    start = service.client().start("tech", [{"id": "a"}], metadata={"m": 1}, wait_seconds=5)
    assert (start.run_id, start.repeated, start.run and start.run.metadata) == ("run_1", True, {"a": 1})
    body = service.body()
    assert body.pop("idempotency_key").startswith("auto-")
    assert body == {
        "technique_id": "tech", "inputs": [{"id": "a"}], "mode": "async", "metadata": {"m": 1}, "wait_seconds": 5,
    }  # fmt: skip
    assert service.requests[0].headers["authorization"] == "Bearer tok"
    assert service.requests[0].extensions["timeout"]["read"] == 35


def test_a_refusal_is_an_error_with_its_reasons() -> None:
    fields = [{"field": "inputs.0", "message": "wrong"}]
    service = Service(refusal(400, "input_validation_error", fields=fields, request_id="req_1"))
    with pytest.raises(ReceiverApiError, match="no") as caught:
        service.client().start("tech", [])
    error = caught.value
    assert (error.status, error.code, error.request_id) == (400, "input_validation_error", "req_1")
    assert error.fields == (("inputs.0", "wrong"),)


def test_an_older_and_a_newer_service_are_understood() -> None:
    """An older one sends `told` alone; of a newer one, unknown fields and states are accepted."""
    older = Service(ok(run={**RUN, "told": "completed"})).client().run("run_1")
    assert (older.callback_status, older.origin, older.outputs) == ("completed", None, ())
    dispatch = {
        "handler": "h",
        "event": "settled",
        "round": 0,
        "state": "paused",
        "attempts": 0,
        "last_error": None,
    }
    run = {
        **RUN,
        "state": "archived",
        "callback_status": "both",
        "told": "both",
        "shape": 1,
        "dispatches": [dispatch],
    }
    newer = Service(ok(run=run, more=1)).client().run("run_1")
    assert (newer.state, newer.callback_status, newer.dispatches[0].state) == ("archived", "both", "paused")


def test_a_response_without_required_fields_is_reported() -> None:
    with pytest.raises(ReceiverApiError) as caught:
        Service(ok(run={"run_id": "run_1"})).client().run("run_1")
    assert caught.value.code == "not_a_receiver"


@pytest.mark.parametrize("result", [httpx.Response(200, text="<html>"), httpx.Response(502, text="<html>")])
def test_another_server_at_the_address_is_reported(result: httpx.Response) -> None:
    with pytest.raises(ReceiverApiError) as caught:
        Service(result).client().run("run_1")
    assert caught.value.code == "not_a_receiver"


def test_no_server_at_the_address_is_reported_with_a_fix() -> None:
    with pytest.raises(ReceiverApiError, match="flora-receiver serve") as caught:
        Service(httpx.ConnectError("refused")).client().run("run_1")
    assert (caught.value.code, caught.value.status) == ("unreachable", None)


def test_a_wait_continues_through_a_restart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests that fail, or end with 502 to 504, are sent again after growing pauses."""
    pauses: list[float] = []
    monkeypatch.setattr("receiver.client.client.sleep", pauses.append)
    service = Service(
        ok(run=RUN), httpx.ConnectError("gone"), httpx.ReadError("cut"), refusal(503, "unavailable"),
        ok(run={**RUN, "state": "completed", "settled": True, "finished": True}),
    )  # fmt: skip
    run = service.client().wait("run_1")
    assert (run.state, run.finished, run.succeeded) == ("completed", True, True)
    assert pauses == [0.2, 0.5, 1.0]
    assert [request.url.params["timeout"] for request in service.requests] == ["60.000"] * 5


@pytest.mark.parametrize(
    ("status", "code"), [(404, "not_found"), (401, "unauthorized"), (400, "invalid_request")]
)
def test_a_refusal_ends_a_wait(status: int, code: str) -> None:
    service = Service(refusal(status, code))
    with pytest.raises(ReceiverApiError) as caught:
        service.client().wait("run_1")
    assert caught.value.code == code


def test_a_wait_ends_with_its_timeout() -> None:
    """It returns the run as it is, or raises why it could not be read."""
    assert not Service(ok(run=RUN)).client().wait("run_1", timeout_seconds=0).finished
    with pytest.raises(ReceiverApiError):
        Service(httpx.ConnectError("gone")).client().wait("run_1", timeout_seconds=0)


def test_lists_follow_their_cursors() -> None:
    """A repeated cursor ends the list instead of repeating it without end."""
    service = Service(
        ok(runs=[RUN], next_cursor="a"),
        ok(runs=[{**RUN, "run_id": "run_2"}], next_cursor="b"),
        ok(runs=[], next_cursor="b"),
    )
    assert [run.run_id for run in service.client().runs("open", 1)] == ["run_1", "run_2"]
    assert [request.url.params.get("cursor") for request in service.requests] == [None, "a", "b"]
    assert service.requests[0].url.params["state"] == "open"


def test_a_start_is_resolved_by_its_key_or_its_token() -> None:
    service = Service(ok(starts=[{"token": "t1"}], next_cursor=None), ok(start=START, run=None))
    service.client().resolve("a/key", "run_1")
    assert service.requests[0].url.params["key"] == "a/key"
    assert service.requests[1].url.path == "/api/starts/t1/resolve"
    by_token = Service(ok(starts=[], next_cursor=None), ok(start=START, run=None))
    by_token.client().resolve("t9", None)
    assert (by_token.requests[1].url.path, by_token.body(1)) == ("/api/starts/t9/resolve", {"run_id": None})
    ambiguous = Service(ok(starts=[{"token": "t1"}, {"token": "t2"}], next_cursor=None))
    with pytest.raises(ReceiverApiError) as caught:
        ambiguous.client().resolve("k", None)
    assert caught.value.code == "ambiguous_key"


def test_ids_are_escaped() -> None:
    service = Service(ok(run=RUN))
    service.client().run("run_/../x?y")
    assert service.requests[0].url.raw_path == b"/api/runs/run_%2F..%2Fx%3Fy"


def test_files_are_the_stored_outputs_in_order() -> None:
    def artifact(position: int, location: str, stored: bool = True) -> dict[str, Any]:
        return {
            "handler": "storage", "position": position, "output_id": "o", "location": location, "size": 1,
            "sha256": "x", "content_type": None, "stored_at": RUN["first_seen_at"] if stored else None,
        }  # fmt: skip

    rows = [artifact(-1, "file:///a/run.json"), artifact(0, "file:///a/b%20c.png"), artifact(1, "s3://b/k")]
    run = (
        Service(ok(run={**RUN, "artifacts": [*rows, artifact(2, "file:///d", stored=False)]}))
        .client()
        .run("run_1")
    )
    assert [(one.path, one.location) for one in run.files] == [
        (Path("/a/b c.png"), "file:///a/b%20c.png"),
        (None, "s3://b/k"),
    ]


def token_of(client: ReceiverClient) -> str:
    return client._connection.http.headers["authorization"]


def test_the_service_is_found_by_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Variables first, then the file they name, then var/ops-token; or no token."""
    assert (ReceiverClient().url, token_of(ReceiverClient())) == ("http://127.0.0.1:8081", "Bearer ")
    (tmp_path / "var").mkdir()
    (tmp_path / "var/ops-token").write_text("from-var\n")
    assert token_of(ReceiverClient()) == "Bearer from-var"
    (tmp_path / "mine").write_text("from-file\n")
    monkeypatch.setenv("RECEIVER_OPS_TOKEN_FILE", str(tmp_path / "mine"))
    assert token_of(ReceiverClient()) == "Bearer from-file"
    monkeypatch.setenv("RECEIVER_OPS_TOKEN", "from-variable")
    monkeypatch.setenv("RECEIVER_OPS_URL", "http://127.0.0.1:9/")
    assert token_of(ReceiverClient()) == "Bearer from-variable"
    assert ReceiverClient().url == "http://127.0.0.1:9"
    assert token_of(ReceiverClient(token="given")) == "Bearer given"


@pytest.mark.parametrize("url", ["localhost:8081", "ftp://h", "http://", "http://[::1"])
def test_an_invalid_address_is_reported(url: str) -> None:
    with pytest.raises(ReceiverApiError) as caught:
        ReceiverClient(url, "t")
    assert caught.value.code == "unusable_url"


def test_the_token_is_sent_to_its_origin_only() -> None:
    """A redirect is not followed, and a request to another host is refused."""
    service = Service(httpx.Response(302, headers={"location": "http://evil.example/"}))
    with pytest.raises(ReceiverApiError) as caught:
        service.client().run("run_1")
    assert (caught.value.code, len(service.requests)) == ("not_a_receiver", 1)
    hook = service.client()._connection.http.event_hooks["request"][0]
    with pytest.raises(httpx.UnsupportedProtocol):
        hook(httpx.Request("GET", "http://evil.example/"))


def test_a_closed_client_is_closed() -> None:
    with ReceiverClient(token="t") as client:
        pass
    assert client._connection.http.is_closed


def test_a_failed_start_names_its_key() -> None:
    """Also where the caller gave none and no response came, so that a repetition starts no second run."""
    lost = Service(httpx.ReadTimeout("late"), ok(start=START))
    with pytest.raises(ReceiverApiError) as caught:
        lost.client().start("tech_1", [])
    key = caught.value.idempotency_key
    assert key == lost.body()["idempotency_key"]
    lost.client().start("tech_1", [], idempotency_key=key)
    assert lost.body(1)["idempotency_key"] == key
    failed = Service(httpx.Response(503, json={"error": {"code": "unavailable"}, "idempotency_key": "k"}))
    with pytest.raises(ReceiverApiError) as caught:
        failed.client().generate({}, idempotency_key="k")
    assert (caught.value.status, caught.value.idempotency_key, caught.value.start) == (503, "k", None)


def test_a_refused_start_is_in_the_error() -> None:
    unknown = {**START, "state": "unknown", "run_id": None, "error": {"code": "key_used_before"}}
    service = Service(httpx.Response(409, json={"error": {"code": "unknown_outcome"}, "start": unknown}))
    with pytest.raises(ReceiverApiError) as caught:
        service.client().start("tech_1", [], idempotency_key="k")
    assert caught.value.start is not None
    assert (caught.value.start["token"], caught.value.start["error"]["code"]) == ("t", "key_used_before")
