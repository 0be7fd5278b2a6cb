"""Access: every request needs the token and a known Host; other sites and forms are refused."""

import stat
from collections.abc import AsyncIterator, Mapping
from pathlib import Path

import httpx
import pytest
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from receiver.config import Settings, ensure_token, token_path
from receiver.errors import ConfigError, StoreUnavailableError
from receiver.web.ops.app import ops_app
from receiver.web.ops.auth import Access, host_name
from tests.web.ops.conftest import Ops

TOKEN = "t0ken"
GOOD = {"host": "127.0.0.1:8081", "authorization": f"Bearer {TOKEN}"}
JSON = {"content-type": "application/json"}


def code(headers: Mapping[str, str], method: str = "GET", access: Access | None = None) -> str | None:
    refusal = (access or Access(TOKEN)).refusal(method, headers)
    return None if refusal is None else f"{refusal.status_code} {refusal.code}"


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ({}, None),
        ({"authorization": "bearer t0ken"}, None),
        ({"authorization": ""}, "401 unauthorized"),
        ({"authorization": "Bearer"}, "401 unauthorized"),
        ({"authorization": "Bearer t0ke"}, "401 unauthorized"),
        ({"authorization": "Bearer t0ken2"}, "401 unauthorized"),
        ({"authorization": "Basic t0ken"}, "401 unauthorized"),
        ({"authorization": "Bearer tökén"}, "401 unauthorized"),
        ({"host": "localhost"}, None),
        ({"host": "LOCALHOST.:1"}, None),
        ({"host": "[::1]:8081"}, None),
        ({"host": "127.8.9.1"}, None),
        ({"host": ""}, "403 host_not_allowed"),
        ({"host": "evil.example:8081"}, "403 host_not_allowed"),
        ({"host": "localhost.evil.example"}, "403 host_not_allowed"),
        ({"host": "127.0.0.1.evil.example"}, "403 host_not_allowed"),
        ({"host": "10.0.0.7"}, "403 host_not_allowed"),
        ({"origin": "http://127.0.0.1:8081"}, None),
        ({"origin": "http://127.0.0.1:3000"}, "403 cross_site"),
        ({"origin": "null"}, "403 cross_site"),
        ({"origin": "https://evil.example"}, "403 cross_site"),
        ({"sec-fetch-site": "same-origin"}, None),
        ({"sec-fetch-site": "none"}, None),
        ({"sec-fetch-site": "same-site"}, "403 cross_site"),
        ({"sec-fetch-site": "cross-site"}, "403 cross_site"),
    ],
)
def test_access_is_decided_by_the_headers(headers: Mapping[str, str], expected: str | None) -> None:
    """A GET and a JSON POST are treated alike."""
    assert code({**GOOD, **headers}) == expected
    assert code({**GOOD, **JSON, **headers}, "POST") == expected


@pytest.mark.parametrize(
    ("content_type", "expected"),
    [
        ("application/json", None),
        ("Application/JSON; charset=utf-8", None),
        ("", "415 unsupported_media_type"),
        ("text/plain", "415 unsupported_media_type"),
        ("application/x-www-form-urlencoded", "415 unsupported_media_type"),
        ("multipart/form-data", "415 unsupported_media_type"),
        ("application/json-patch+json", "415 unsupported_media_type"),
    ],
)
def test_a_form_cannot_change_anything(content_type: str, expected: str | None) -> None:
    assert code({**GOOD, "content-type": content_type}, "POST") == expected
    assert code({**GOOD, "content-type": content_type}, "DELETE") == expected


@pytest.mark.parametrize(
    ("host", "allowed", "called", "is_allowed"),
    [
        ("10.0.0.7", (), "10.0.0.7:8081", True),
        ("ops.example", (), "ops.example", True),
        ("ops.example", (), "other.example", False),
        ("127.0.0.1", ("Receiver.Internal",), "receiver.internal:80", True),
        ("0.0.0.0", (), "10.0.0.7:8081", True),
        ("::", (), "[2001:db8::1]:8081", True),
        ("0.0.0.0", (), "evil.example", False),
        ("127.0.0.1", ("fe80::1",), "[fe80::1]:8081", True),
    ],
)
def test_the_host_must_be_a_known_name(
    host: str, allowed: tuple[str, ...], called: str, is_allowed: bool
) -> None:
    """A listener on every address accepts any address as Host, but only names that are listed."""
    assert (code({**GOOD, "host": called}, access=Access(TOKEN, host, allowed)) is None) == is_allowed


@pytest.mark.parametrize(
    ("header", "name"), [("A:1", "a"), ("[::1]:1", "::1"), ("[", ""), (":", ""), ("a.", "a")]
)
def test_the_name_in_a_host_header(header: str, name: str) -> None:
    assert host_name(header) == name


def test_the_token_is_not_shown() -> None:
    assert TOKEN not in repr(Access(TOKEN))


async def test_every_route_needs_the_token(ops: Ops) -> None:
    """Without the token, known and unknown paths give the same response to every method."""
    async with httpx.AsyncClient(base_url=ops.url, trust_env=False) as client:
        for path in (
            "/",
            "/healthz",
            "/metrics",
            "/api/runs",
            "/api/openapi.json",
            "/api/nothing",
            "/api/runs/run_1",
        ):
            for method in ("GET", "POST", "DELETE", "OPTIONS"):
                response = await client.request(method, path, headers=JSON)
                assert (response.status_code, response.json()["error"]["code"]) == (401, "unauthorized")
                assert response.headers["www-authenticate"] == "Bearer"


async def test_a_page_in_a_browser_starts_no_run(ops: Ops) -> None:
    """A form, a cross-site fetch and a rebound name are refused even with the right token."""
    body = {"technique_id": "emu-image", "inputs": []}
    form = await ops.http.post("/api/runs", content=b"{}", headers={"Content-Type": "text/plain"})
    fetch = await ops.http.post("/api/runs", json=body, headers={"Origin": "https://evil.example"})
    rebound = await ops.http.post("/api/runs", json=body, headers={"Host": "evil.example"})
    preflight = await ops.http.options("/api/runs", headers={"Access-Control-Request-Method": "POST"})
    assert [form.status_code, fetch.status_code, rebound.status_code, preflight.status_code] == [
        415,
        403,
        403,
        405,
    ]
    assert not [name for name in preflight.headers if name.startswith("access-control")]
    assert ops.stage.emulator.gate.requests.total() == 0


async def test_unknown_paths_and_methods_get_json(ops: Ops) -> None:
    assert (await ops.get("/api/nothing", 404))["error"]["code"] == "not_found"
    assert (await ops.get("/api/runs/", 404))["error"]["code"] == "not_found"
    response = await ops.http.delete("/api/runs", headers=JSON)
    assert (response.status_code, response.json()["error"]["code"]) == (405, "method_not_allowed")
    assert "POST" in response.headers["allow"]


WRONG_BODIES = [
    (b"{", 400, "invalid_json"),
    (b"[]", 400, "invalid_json"),
    (b"\xff", 400, "invalid_json"),
    (b'{"wait_seconds": NaN}', 400, "invalid_json"),
    (b'{"metadata": {"a": "\\ud800"}}', 400, "invalid_request"),
    (b"[" * 100_000, 400, "invalid_json"),
    (b'{"a": ' + b"9" * 10_000 + b"}", 400, "invalid_json"),
    (b"{}", 400, "invalid_request"),
    (b"", 400, "invalid_request"),
    (b" " * (4 * 1024 * 1024 + 1), 413, "body_too_large"),
]


async def test_malformed_bodies_are_refused(ops: Ops) -> None:
    for body, status, code in WRONG_BODIES:
        response = await ops.http.post("/api/runs", content=body, headers=JSON)
        assert (response.status_code, response.json()["error"]["code"]) == (status, code)


async def test_a_body_without_a_length_is_counted(ops: Ops) -> None:
    async def chunks() -> AsyncIterator[bytes]:
        for _ in range(5):
            yield b" " * 1024 * 1024

    response = await ops.http.post("/api/runs", content=chunks(), headers=JSON)
    assert response.status_code == 413


async def test_errors_of_the_service_are_json() -> None:
    """A database that is unavailable is 503 with Retry-After; a bug is 500 with its name alone."""

    async def unavailable_store(_: Request) -> Response:
        raise StoreUnavailableError("the database cannot be used now: locked")

    async def bug(_: Request) -> Response:
        raise KeyError("sk_live_secret")

    app = ops_app(
        Access(TOKEN),
        [Route("/away", unavailable_store), Route("/bug", bug), Route("/", lambda _: JSONResponse({}))],
    )
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost", headers=GOOD) as client:
        unavailable, broken = await client.get("/away"), await client.get("/bug")
    assert (unavailable.status_code, unavailable.json()["error"]["code"]) == (503, "unavailable")
    assert unavailable.headers["retry-after"]
    assert (broken.status_code, broken.json()["error"]["code"]) == (500, "internal_error")
    assert "sk_live" not in broken.text


def settings_in(directory: Path, **operations: object) -> Settings:
    return Settings.model_validate(
        {"database": {"url": f"sqlite:///{directory / 'deep' / 'receiver.db'}"}, "operations": operations}
    )


def test_a_token_is_created_once_and_readable_by_its_owner_alone(tmp_path: Path) -> None:
    settings = settings_in(tmp_path)
    token = ensure_token(settings)
    path = token_path(settings)
    assert path == tmp_path / "deep" / "ops-token"
    assert len(token) > 40
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    path.chmod(0o644)
    assert ensure_token(settings) == token
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    path.write_text("\n")
    assert ensure_token(settings) not in {"", token}
    assert ensure_token(settings_in(tmp_path, token="given")) == "given"
    assert [each.name for each in path.parent.iterdir()] == ["ops-token"]


def test_a_token_that_cannot_be_stored_is_a_settings_error(tmp_path: Path) -> None:
    (tmp_path / "deep").write_text("a file where the directory should be")
    with pytest.raises(ConfigError, match="RECEIVER_OPS_TOKEN"):
        ensure_token(settings_in(tmp_path))


def test_without_sqlite_the_token_is_in_var() -> None:
    settings = Settings.model_validate({"database": {"url": "postgresql://db/x"}})
    assert token_path(settings) == Path("var/ops-token")
