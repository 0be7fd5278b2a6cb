"""Who gets in: a token always, names of ours only, nothing from other sites, changes as JSON alone."""

import stat
from collections.abc import Mapping
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
def test_who_gets_in(headers: Mapping[str, str], expected: str | None) -> None:
    """On GET and on a JSON POST alike."""
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
    ("host", "allowed", "called", "gets_in"),
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
def test_names_that_are_ours(host: str, allowed: tuple[str, ...], called: str, gets_in: bool) -> None:
    """Bound to every address, it may be called by any address; a name has to be listed: rebinding needs one."""
    assert (code({**GOOD, "host": called}, access=Access(TOKEN, host, allowed)) is None) == gets_in


@pytest.mark.parametrize(("header", "name"), [("A:1", "a"), ("[::1]:1", "::1"), ("[", ""), (":", ""), ("a.", "a")])
def test_host_headers_are_read(header: str, name: str) -> None:
    assert host_name(header) == name


def test_the_token_is_not_shown() -> None:
    assert TOKEN not in repr(Access(TOKEN))


async def test_every_route_asks_for_the_token(ops: Ops) -> None:
    """Whatever is asked, known or not, by whatever method: without the token there is nothing to see."""
    async with httpx.AsyncClient(base_url=ops.url, trust_env=False) as client:
        for path in ("/", "/healthz", "/metrics", "/api/runs", "/api/openapi.json", "/api/nothing", "/api/runs/run_1"):
            for method in ("GET", "POST", "DELETE", "OPTIONS"):
                answer = await client.request(method, path, headers=JSON)
                assert (answer.status_code, answer.json()["error"]["code"]) == (401, "unauthorized")
                assert answer.headers["www-authenticate"] == "Bearer"


async def test_a_page_in_a_browser_spends_no_money(ops: Ops) -> None:
    """Neither a form, nor a cross-site fetch, nor a rebound name starts a run, though the token were right."""
    body = {"technique_id": "emu-image", "inputs": []}
    form = await ops.http.post("/api/runs", content=b"{}", headers={"Content-Type": "text/plain"})
    fetch = await ops.http.post("/api/runs", json=body, headers={"Origin": "https://evil.example"})
    rebound = await ops.http.post("/api/runs", json=body, headers={"Host": "evil.example"})
    preflight = await ops.http.options("/api/runs", headers={"Access-Control-Request-Method": "POST"})
    assert [form.status_code, fetch.status_code, rebound.status_code, preflight.status_code] == [415, 403, 403, 405]
    assert not [name for name in preflight.headers if name.startswith("access-control")]
    assert ops.stage.emulator.gate.requests.total() == 0


async def test_unknown_paths_and_methods_are_told_in_json(ops: Ops) -> None:
    assert (await ops.get("/api/nothing", 404))["error"]["code"] == "not_found"
    assert (await ops.get("/api/runs/", 404))["error"]["code"] == "not_found"
    answer = await ops.http.delete("/api/runs", headers=JSON)
    assert (answer.status_code, answer.json()["error"]["code"]) == (405, "method_not_allowed")
    assert "POST" in answer.headers["allow"]


WRONG_BODIES = [
    (b"{", 400, "invalid_json"),
    (b"[]", 400, "invalid_json"),
    (b"\xff", 400, "invalid_json"),
    (b'{"wait_seconds": NaN}', 400, "invalid_json"),
    (b'{"metadata": {"a": "\\ud800"}}', 400, "invalid_json"),
    (b"[" * 100_000, 400, "invalid_json"),
    (b'{"a": ' + b"9" * 10_000 + b"}", 400, "invalid_json"),
    (b"{}", 400, "invalid_request"),
    (b"", 400, "invalid_request"),
    (b" " * (4 * 1024 * 1024 + 1), 413, "body_too_large"),
]


async def test_bodies_that_cannot_be_read(ops: Ops) -> None:
    for body, status, code in WRONG_BODIES:
        answer = await ops.http.post("/api/runs", content=body, headers=JSON)
        assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)


async def test_a_body_without_a_length_is_counted(ops: Ops) -> None:
    async def chunks() -> object:
        for _ in range(5):
            yield b" " * 1024 * 1024

    answer = await ops.http.post("/api/runs", content=chunks(), headers=JSON)  # type: ignore[arg-type]
    assert answer.status_code == 413


async def test_trouble_of_our_own_is_told_in_json() -> None:
    """The database away: 503, and when to come back. A bug: 500, and its name alone."""

    async def away(_: Request) -> Response:
        raise StoreUnavailableError("the database cannot be used now: locked")

    async def bug(_: Request) -> Response:
        raise KeyError("sk_live_secret")

    app = ops_app(Access(TOKEN), [Route("/away", away), Route("/bug", bug), Route("/", lambda _: JSONResponse({}))])
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


def test_a_token_is_made_once_and_for_its_owner_alone(tmp_path: Path) -> None:
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


def test_a_token_that_cannot_be_kept_is_a_problem_of_the_settings(tmp_path: Path) -> None:
    (tmp_path / "deep").write_text("a file where the directory should be")
    with pytest.raises(ConfigError, match="RECEIVER_OPS_TOKEN"):
        ensure_token(settings_in(tmp_path))


def test_without_sqlite_it_is_in_var() -> None:
    settings = Settings.model_validate({"database": {"url": "postgresql://db/x"}})
    assert token_path(settings) == Path("var/ops-token")
