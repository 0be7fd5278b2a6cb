"""Checks each API key with one request to FLORA, and this machine's clock by its response."""

import ssl
from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from typing import Any

import httpx

from receiver.cli.doctor.findings import Finding
from receiver.cli.doctor.proxies import find_proxy_variables
from receiver.config import Settings
from receiver.errors import PayloadError
from receiver.flora.messages import parse_page
from receiver.net.clients import api_client, tls_context
from receiver.net.tunnel import route_through

_MAX_SKEW_SECONDS = 60
"""A fifth of how far a signature may be ahead of our clock."""
_FLORA_FAILURES = frozenset(
    {
        HTTPStatus.TOO_MANY_REQUESTS,
        HTTPStatus.INTERNAL_SERVER_ERROR,
        HTTPStatus.BAD_GATEWAY,
        HTTPStatus.SERVICE_UNAVAILABLE,
        HTTPStatus.GATEWAY_TIMEOUT,
    }
)


async def check_flora(
    settings: Settings, now: datetime | None = None, *, environ: Mapping[str, str] | None = None
) -> list[Finding]:
    """List one run with each API key. This starts nothing and costs nothing.

    `environ` may name proxies, which are not used: a failure may be due to that.
    """
    flora = settings.flora
    owners: dict[str | None, str | None] = {settings.api_key_for(None): None}
    owners |= {settings.api_key_for(each.id): each.id for each in settings.workspaces if each.api_key}
    named_owners = {owner for owner in owners.values() if owner}
    findings: list[Finding] = []
    skew: Finding | None = None
    try:
        tls = tls_context(flora.ca_file)
    except (OSError, ssl.SSLError):
        message = f"[flora] ca_file: {flora.ca_file} holds no certificate in PEM form"
        return [Finding("flora.unreachable", message)]
    route = route_through(flora.proxy, tls)
    async with api_client(flora.base_url, timeout_seconds=10, tls=tls, route=route) as client:
        for key, owner in owners.items():
            if not key:
                continue
            headers = {"Authorization": f"Bearer {key}"}
            try:
                response = await client.get("technique-runs", params={"limit": 1}, headers=headers)
            except httpx.HTTPError as error:
                findings.append(_explain_failure(error, settings, environ or {}))
                break
            findings += interpret_response(response, owner, named_owners - {owner})
            skew = _check_clock(response, now or datetime.now(UTC))
    return findings if skew is None else [*findings, skew]


def _explain_failure(error: httpx.HTTPError, settings: Settings, environ: Mapping[str, str]) -> Finding:
    message = f"{settings.flora.base_url}: {type(error).__name__} {error}".rstrip()
    if isinstance(error, httpx.ProxyError):
        return Finding("flora.proxy_failed", message)
    names = find_proxy_variables(environ)
    if names and settings.flora.proxy is None:
        return Finding("flora.proxy_ignored", f"{message}; the environment has {', '.join(names)}")
    return Finding("flora.unreachable", message)


def interpret_response(
    response: httpx.Response, workspace: str | None, others: AbstractSet[str] = frozenset()
) -> list[Finding]:
    """Return what a response to a list request says about the API key. Pure.

    `workspace` is the owner of the key (None: any), `others` the workspaces with other keys.
    """
    whose = "FLORA_API_KEY" if workspace is None else f"the API key of {workspace}"
    request_id = response.headers.get("request-id", "none")
    what = f"{whose}: {response.status_code}, request-id {request_id}"
    document = _parse_json(response)
    if response.is_success:
        return _check_page(document, what, whose, others if workspace else frozenset())
    error = document.get("error") if isinstance(document, dict) else None
    is_flora = isinstance(error, dict)
    status = response.status_code
    if status == HTTPStatus.UNAUTHORIZED:
        kind = "flora.key_refused"
    elif status == HTTPStatus.FORBIDDEN and is_flora:
        kind = "flora.key_forbidden"
    elif status in _FLORA_FAILURES:
        kind = "flora.failing"
    elif status == HTTPStatus.NOT_FOUND or not is_flora:
        kind = "flora.someone_else"
    else:
        kind = "flora.failing"
    return [Finding(kind, what)]


def _check_page(document: Any, what: str, whose: str, others: AbstractSet[str]) -> list[Finding]:
    try:
        page = parse_page(document)
    except PayloadError as error:
        return [Finding("flora.someone_else", f"{what}: {error}")]
    wrong = {run.workspace_id for run in page.snapshots if run.workspace_id in others}
    return [Finding("secrets.mixed_up", f"{whose} lists runs of {each}") for each in wrong]


def _parse_json(response: httpx.Response) -> Any:
    try:
        return response.json()
    except ValueError:
        return None


def _check_clock(response: httpx.Response, now: datetime) -> Finding | None:
    try:
        seconds = (now - parsedate_to_datetime(response.headers["date"])).total_seconds()
    except (KeyError, ValueError, TypeError):
        return None
    if abs(seconds) <= _MAX_SKEW_SECONDS:
        return None
    return Finding("clock.skewed", f"{abs(seconds):.0f} s {'ahead' if seconds > 0 else 'behind'}")
