"""`flora-receiver trigger`: sends one callback, signed or spoiled on purpose, to any receiver and shows the answer."""

import asyncio
import json
import os
import secrets
import ssl
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import httpx
import typer

from receiver.cli.output import WRONG, explained, fail, show
from receiver.config import load
from receiver.errors import ConfigError, Problem
from receiver.flora.signature import HEADER, sign
from receiver.http import probe_client


@dataclass(frozen=True, slots=True)
class Shot:
    """What goes over the wire, and which code the receiver should answer it with (None: 200)."""

    body: bytes
    headers: Mapping[str, str]
    expected: str | None = None


def _signed(body: bytes, secret: str, *, age: int = 0) -> dict[str, str]:
    return {HEADER: sign(body, secret, timestamp=int(time.time()) - age)}


def _plain(body: bytes, secret: str) -> Shot:
    return Shot(body, _signed(body, secret))


CASES: Mapping[str, Callable[[bytes, str], Shot]] = {
    "completed": _plain,
    "failed": _plain,
    "missing_signature": lambda body, _: Shot(body, {}, "missing_signature"),
    "malformed_signature": lambda body, _: Shot(body, {HEADER: "hello"}, "malformed_signature"),
    "signature_mismatch": lambda body, _: Shot(body, _signed(body, "whsec_another"), "signature_mismatch"),
    "timestamp_out_of_tolerance": lambda body, secret: Shot(
        body, _signed(body, secret, age=3600), "timestamp_out_of_tolerance"
    ),
    "invalid_payload": lambda _, secret: Shot(b"{", _signed(b"{", secret), "invalid_payload"),
    "body_too_large": lambda body, secret: Shot(
        body + b" " * 70_000, _signed(body + b" " * 70_000, secret), "body_too_large"
    ),
}
"""Every case by name: how a callback of this kind is made."""


def run(
    url: str,
    case: str,
    *,
    run_id: str | None,
    delivery_id: str | None,
    secret: str | None,
    ca: Path | None,
    json: bool,
) -> None:
    with explained(as_json=json):
        if case not in CASES:
            raise ConfigError([Problem("--case", f"there is no case {case!r}; there are: {', '.join(CASES)}")])
        if not _is_web_url(url):
            raise ConfigError([Problem("URL", f"{url!r} is not an http or https URL")])
        if ca is not None:
            _check_ca(ca)
        secret = secret or _configured_secret()
        shot = CASES[case](_body(case, run_id, delivery_id), secret)
        try:
            response = asyncio.run(_send(url, shot, ca))
        except httpx.HTTPError as error:
            fail({"error": type(error).__name__, "url": url}, f"No answer from {url}: {_why(error)}", as_json=json)
            raise typer.Exit(WRONG) from error
        as_expected = _code(response) == shot.expected and (response.status_code == 200) == (shot.expected is None)  # noqa: PLR2004
        data = {"case": case, "status": response.status_code, "body": response.text[:2000], "as_expected": as_expected}
        verdict = "as it should be" if as_expected else f"expected {shot.expected or '200'}"
        show(data, f"{response.status_code} {response.text[:2000]}\n{case}: {verdict}", as_json=json)
        if not as_expected:
            raise typer.Exit(WRONG)


def _is_web_url(text: str) -> bool:
    try:
        url = httpx.URL(text)
    except httpx.InvalidURL:
        return False
    return url.scheme in {"http", "https"} and bool(url.host)


def _check_ca(ca: Path) -> None:
    try:
        ssl.create_default_context(cafile=ca)
    except (OSError, ssl.SSLError) as error:
        raise ConfigError([Problem("--ca", f"{ca} holds no certificate in PEM form")]) from error


def _why(error: httpx.HTTPError) -> str:
    """Say what went wrong on the way, and what to do about it."""
    if isinstance(error, httpx.TimeoutException):
        return "it took too long"
    if "CERTIFICATE_VERIFY_FAILED" in str(error):
        return "its certificate is not trusted here; give its CA with --ca"
    if isinstance(error, httpx.ConnectError):
        return f"{error}. Is it running, and is this its address (https or http)?"
    return str(error) or type(error).__name__


def _configured_secret() -> str:
    configured = load(None, os.environ, need_secrets=False).secrets_by_workspace()
    if not configured:
        raise ConfigError([Problem("FLORA_WEBHOOK_SECRET", "is not set: give the secret there, or by --secret")])
    return configured[0][0]


def _body(case: str, run_id: str | None, delivery_id: str | None) -> bytes:
    """Return a callback's body as FLORA writes it."""
    status = "failed" if case == "failed" else "completed"
    data = {
        "run_id": run_id or f"run_{secrets.token_hex(8)}",
        "run_type": "generation",
        "workspace_id": "ws_trigger",
        "status": status,
    }
    if status == "failed":
        data |= {"error_code": "provider_error", "error_message": "sent by flora-receiver trigger"}
    payload = {
        "id": delivery_id or f"whd_{secrets.token_hex(8)}",
        "type": f"run.{status}",
        "api_version": "2026-06-11",
        "created_at": int(time.time() * 1000),
        "data": data,
    }
    return json.dumps(payload, separators=(",", ":")).encode()


async def _send(url: str, shot: Shot, ca: Path | None) -> httpx.Response:
    async with probe_client(ca=ca) as client:
        return await client.post(url, content=shot.body, headers={"Content-Type": "application/json", **shot.headers})


def _code(response: httpx.Response) -> str | None:
    try:
        return response.json().get("error", {}).get("code")  # type: ignore[no-any-return]
    except (ValueError, AttributeError):
        return None
