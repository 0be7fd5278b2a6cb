"""The public listener: status and JSON of each response, and 404 for everything else."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any
from urllib.parse import quote

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from receiver.errors import StoreUnavailableError
from receiver.flora.signature import HEADER, canary_key, sign
from receiver.intake.callbacks import Secret
from receiver.model import RunState
from receiver.store import Database
from receiver.web.public import STATUS, public_app
from tests.support.core import NOW, SECRET, Clock, Core, a_core, callback_body, sign_body, writable

PATH = "/callbacks/flora"


class PublicListener:
    """The app, a client of it, and the reason why it is not ready."""

    def __init__(self, core: Core, **options: Any) -> None:
        self.core = core
        self.not_ready: str | None = None
        app = public_app(core.intake, core.metrics, ready=self.ready, **options)
        transport = httpx.ASGITransport(app=app, client=("192.0.2.1", 1234))
        self.client = httpx.AsyncClient(transport=transport, base_url="http://listener")

    async def ready(self) -> str | None:
        return self.not_ready

    async def post(self, body: Any = b"", *headers: tuple[str, str], path: str = PATH) -> httpx.Response:
        return await self.client.post(path, content=body, headers=list(headers))

    async def call(self, body: bytes, path: str = PATH) -> httpx.Response:
        return await self.post(body, (HEADER, sign_body(body)), path=path)

    def count_responses(self, result: str) -> float:
        return float(self.core.metrics.callbacks.labels(result)._value.get())


@pytest.fixture
async def listener(core: Core) -> AsyncIterator[PublicListener]:
    listener = PublicListener(core, max_body_bytes=1000, body_timeout_seconds=0.05)
    async with listener.client:
        yield listener


def code_of(response: httpx.Response) -> str:
    """Check the form of a refusal and return its code."""
    body = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"code", "message"}
    assert body["error"]["message"]
    assert response.status_code == STATUS[body["error"]["code"]]
    assert response.headers["content-type"] == "application/json"
    return str(body["error"]["code"])


async def test_a_callback_is_accepted_once(listener: PublicListener) -> None:
    """200 in both cases: FLORA must not retry what is committed."""
    for status in ("accepted", "duplicate"):
        response = await listener.call(callback_body())
        assert (response.status_code, response.json()) == (200, {"status": status})
        assert listener.count_responses(status) == 1
    assert (await listener.core.run()).state is RunState.REPORTED


async def test_an_unknown_event_is_ignored(listener: PublicListener) -> None:
    response = await listener.call(callback_body(event="run.paused"))
    assert (response.status_code, response.json()) == (200, {"status": "ignored"})


async def test_a_canary_is_confirmed(listener: PublicListener) -> None:
    """It is counted as a canary, not as a callback."""
    response = await listener.post(
        b"any bytes", (HEADER, sign_body(b"any bytes", secret=canary_key(SECRET)))
    )
    assert (response.status_code, response.json()) == (200, {"status": "canary"})
    assert (listener.count_responses("canary"), listener.count_responses("accepted")) == (1, 0)


@pytest.mark.parametrize(
    "path", [PATH, PATH + "/", PATH + "?start=abc", PATH + "/?start=b&start=%00", PATH + "?start=%ED%A0%80"]
)
async def test_the_path_may_end_in_a_slash(listener: PublicListener, path: str) -> None:
    """FLORA follows no redirect. The query is not signed: what is no token there is no reason to refuse."""
    response = await listener.call(callback_body(), path=path)
    assert (response.status_code, response.json()) == (200, {"status": "accepted"})


@pytest.mark.parametrize(
    ("body", "headers", "status", "expected"),
    [
        (callback_body(), [], 401, "missing_signature"),
        (callback_body(), [(HEADER, "")], 401, "missing_signature"),
        (callback_body(), [(HEADER, "hello")], 400, "malformed_signature"),
        (
            callback_body(),
            [(HEADER, sign_body(callback_body(), secret="whsec_other"))],
            401,
            "signature_mismatch",
        ),
        (callback_body(), [(HEADER, sign_body(callback_body() + b" "))], 401, "signature_mismatch"),
        (
            callback_body(),
            [(HEADER, sign(callback_body(), SECRET, timestamp=1))],
            401,
            "timestamp_out_of_tolerance",
        ),
        (b"{}", [(HEADER, sign_body(b"{}"))], 400, "invalid_payload"),
        (b"x" * 1001, [(HEADER, sign_body(b"x" * 1001))], 413, "body_too_large"),
    ],
)
async def test_refusals(
    listener: PublicListener, body: bytes, headers: Any, status: int, expected: str
) -> None:
    """Each has its status and code, and is recorded; none creates a run."""
    response = await listener.post(body, *headers)
    assert (response.status_code, code_of(response)) == (status, expected)
    assert listener.count_responses(expected) == 1
    assert [(note.code, note.remote) for note in listener.core.intake.rejections] == [
        (expected, "192.0.2.1")
    ]
    assert await listener.core.count("runs") == 0


async def test_a_doubled_header_is_malformed(listener: PublicListener) -> None:
    """FLORA sends one header; a second one is not FLORA's, even if they are equal."""
    body = callback_body()
    good, bad = sign_body(body), sign_body(body, secret="whsec_other")
    for pair in ((good, good), (bad, good), (good, bad)):
        response = await listener.post(body, *((HEADER, value) for value in pair))
        assert code_of(response) == "malformed_signature"


async def test_the_header_name_ignores_case(listener: PublicListener) -> None:
    body = callback_body()
    assert (await listener.post(body, ("FLORA-SIGNATURE", sign_body(body)))).status_code == 200


async def test_a_header_that_is_not_ascii_is_malformed(listener: PublicListener) -> None:
    response = await listener.client.post(
        PATH, content=callback_body(), headers={HEADER.encode(): b"t=1,v1=\xff\xfe"}
    )
    assert code_of(response) == "malformed_signature"


async def test_a_secret_is_valid_for_its_workspace_only(database: Database, clock: Clock) -> None:
    listener = PublicListener(a_core(database, clock, secrets=[Secret(SECRET, "ws_other")]))
    async with listener.client:
        response = await listener.call(callback_body())
    assert (response.status_code, code_of(response)) == (401, "workspace_mismatch")


@pytest.mark.parametrize("size", [999, 1000])
async def test_a_body_may_be_as_large_as_the_limit(listener: PublicListener, size: int) -> None:
    """The limit itself is allowed."""
    body = callback_body(pad="")
    body = callback_body(pad="x" * (size - len(body)))
    assert len(body) == size
    assert (await listener.call(body)).status_code == 200


async def test_a_body_without_a_length_is_counted(listener: PublicListener) -> None:
    """Reading a chunked body stops at the limit, not at its end."""
    sent = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal sent
        while True:
            sent += 100
            yield b"x" * 100

    response = await listener.post(endless(), (HEADER, "t=1,v1=00"))
    assert code_of(response) == "body_too_large"
    assert sent <= 1200


@pytest.mark.parametrize("length", ["99999999999999999999999999", "1001"])
async def test_an_announced_length_beyond_the_limit_is_refused_unread(
    listener: PublicListener, length: str
) -> None:
    response = await listener.post(b"x", ("Content-Length", length))
    assert code_of(response) == "body_too_large"


async def test_an_unfinished_body_times_out(listener: PublicListener) -> None:
    async def stalled() -> AsyncIterator[bytes]:
        yield b"{"
        await anext(_never())

    response = await listener.post(stalled())
    assert (response.status_code, code_of(response)) == (408, "body_timeout")


async def test_each_body_has_its_own_time(listener: PublicListener) -> None:
    """Bodies share one timer, and each that is late gets 408; a cancelled request does not."""
    reading: asyncio.Queue[None] = asyncio.Queue()

    async def stalled() -> AsyncIterator[bytes]:
        yield b"{"
        reading.put_nowait(None)
        await anext(_never())

    posts = []
    for _ in range(3):
        posts.append(asyncio.create_task(listener.post(stalled())))
        await reading.get()
    posts[0].cancel()
    with pytest.raises(asyncio.CancelledError):
        await posts[0]
    assert [code_of(await post) for post in posts[1:]] == ["body_timeout", "body_timeout"]
    assert (await listener.call(callback_body())).status_code == 200
    assert code_of(await listener.post(stalled())) == "body_timeout"
    assert listener.count_responses("body_timeout") == 3


async def _never() -> AsyncIterator[bytes]:
    await asyncio.Event().wait()
    yield b""


async def test_errors_of_the_service_are_503(listener: PublicListener) -> None:
    """Never 4xx, which FLORA might take as final; with Retry-After, and the retry is accepted."""
    await writable(listener.core.database, False)
    response = await listener.call(callback_body())
    assert (response.status_code, code_of(response)) == (503, "unavailable")
    assert response.headers["retry-after"].isdecimal()
    assert listener.count_responses("unavailable") == 1
    await writable(listener.core.database, True)
    assert (await listener.call(callback_body())).json() == {"status": "accepted"}


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "PATCH", "OPTIONS"])
async def test_other_methods_are_405_in_json(listener: PublicListener, method: str) -> None:
    response = await listener.client.request(method, PATH)
    assert (response.status_code, code_of(response)) == (405, "method_not_allowed")
    assert "POST" in response.headers["allow"]


@pytest.mark.parametrize(
    "path",
    [
        "/",
        "/callbacks",
        "/callbacks/flora/x",
        "/callbacks//flora",
        "/metrics",
        "/docs",
        "/openapi.json",
        "/%00",
    ],
)
@pytest.mark.parametrize("method", ["GET", "POST"])
async def test_other_paths_are_404(listener: PublicListener, method: str, path: str) -> None:
    """404 as JSON, without a redirect and without anything of the operations API."""
    response = await listener.client.request(method, path)
    assert (response.status_code, code_of(response)) == (404, "not_found")


async def test_health_and_readiness(listener: PublicListener) -> None:
    """A process that cannot commit is alive but not ready: it gets no callbacks, and lives."""
    assert (await listener.client.get("/healthz")).json() == {"status": "ok"}
    assert (await listener.client.get("/readyz")).json() == {"status": "ready"}
    listener.not_ready = "stopping"
    response = await listener.client.get("/readyz")
    assert (response.status_code, code_of(response)) == (503, "unavailable")
    assert response.json()["error"]["message"] == "stopping"
    assert (await listener.client.get("/healthz")).status_code == 200


async def test_the_token_of_a_start_reaches_the_intake(
    listener: PublicListener, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The URL of a callback names the start that it belongs to."""
    seen: list[Any] = []
    accept = listener.core.intake.accept

    async def record(*args: Any, **options: Any) -> Any:
        seen.append(options.get("start"))
        return await accept(*args, **options)

    monkeypatch.setattr(listener.core.intake, "accept", record)
    token = "0123456789abcdef" * 2
    for query in (token, "abc", "%00", token + "0"):
        await listener.call(callback_body(), path=f"{PATH}?start={query}")
    assert seen == [token, None, None, None]


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(codec=None)),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(st.characters(codec=None)), inner, max_size=3)
    ),
    max_leaves=5,
)
CALLBACKS = st.fixed_dictionaries(
    {"id": st.sampled_from(["whd_1", "whd_\0"]) | JSON_VALUES, "data": JSON_VALUES},
    optional=dict.fromkeys(("type", "api_version", "created_at"), JSON_VALUES),
) | st.builds(
    lambda data, event: {"id": "whd_2", "type": event, "data": {"run_id": "run_1", **data}},
    st.dictionaries(
        st.sampled_from(["run_id", "status", "run_type", "workspace_id", "error_code", "error_message"]),
        JSON_VALUES,
    ),
    st.sampled_from(["run.completed", "run.failed"]) | JSON_VALUES,
)


async def test_no_authentic_request_breaks_the_listener(listener: PublicListener) -> None:
    """Whatever FLORA signs, and whatever stands in the query: the status is documented, and no 5xx."""
    codes: set[int] = set()

    @settings(max_examples=100, deadline=None, derandomize=True, database=None)
    @given(
        st.lists(
            st.tuples(CALLBACKS, st.text() | st.sampled_from(["start=%00", "start=" + "%ff" * 16])),
            max_size=3,
        )
    )
    def send(requests: list[tuple[Any, str]]) -> None:
        batches.append([(json.dumps(body).encode(), query) for body, query in requests])

    batches: list[list[tuple[bytes, str]]] = []
    send()
    for batch in batches:  # in one transaction: a callback that breaks it must not take others along
        calls = (listener.call(body, path=f"{PATH}?{quote(query, safe='=%')}") for body, query in batch)
        codes |= {response.status_code for response in await asyncio.gather(*calls)}
    assert codes <= {200, 400, 413}, codes
    assert {200, 400} <= codes


def test_every_code_has_a_status() -> None:
    """4xx for errors of the sender, 5xx for those of the service."""
    assert {code for code, status in STATUS.items() if status >= 500} == {"unavailable"}
    assert isinstance(StoreUnavailableError("x"), Exception)
    assert NOW.tzinfo is not None
