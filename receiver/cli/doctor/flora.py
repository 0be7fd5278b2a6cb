"""Asks FLORA's API one question: whether it knows the key; its answer also tells what time it is there."""

import ssl
from collections.abc import Set as AbstractSet
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

import httpx

from receiver.cli.doctor.findings import Finding
from receiver.config import Settings
from receiver.errors import PayloadError
from receiver.flora.messages import parse_page
from receiver.net.clients import api_client, tls_context

_SKEW_SECONDS = 60
"""A fifth of the time that a signature may be ahead of us."""


async def of_flora(settings: Settings, now: datetime | None = None) -> list[Finding]:
    """List one run with each API key. Nothing is started, and nothing costs anything."""
    flora = settings.flora
    keys: dict[str | None, str | None] = {settings.api_key_for(None): None}
    keys |= {settings.api_key_for(each.id): each.id for each in settings.workspaces if each.api_key}
    found: list[Finding] = []
    skew: Finding | None = None
    try:
        tls = tls_context(flora.ca_file)
    except (OSError, ssl.SSLError):
        return [Finding("flora.unreachable", f"[flora] ca_file: {flora.ca_file} holds no certificate in PEM form")]
    async with api_client(flora.base_url, timeout_seconds=10, tls=tls) as client:
        for key, workspace in keys.items():
            if not key:
                continue
            headers = {"Authorization": f"Bearer {key}"}
            try:
                answer = await client.get("technique-runs", params={"limit": 1}, headers=headers)
            except httpx.HTTPError as error:
                found.append(Finding("flora.unreachable", f"{flora.base_url}: {type(error).__name__} {error}".rstrip()))
                break
            found += of_answer(answer, workspace, {owner for owner in keys.values() if owner} - {workspace})
            skew = _of_clock(answer, now or datetime.now(UTC))
    return found if skew is None else [*found, skew]


def of_answer(answer: httpx.Response, workspace: str | None, others: AbstractSet[str] = frozenset()) -> list[Finding]:
    """Say what an answer to a list of runs tells about the key, which is this workspace's (None: any). Pure.

    `others` are the workspaces with keys of their own.
    """
    whose = "FLORA_API_KEY" if workspace is None else f"the API key of {workspace}"
    told = f"{whose}: {answer.status_code}, request-id {answer.headers.get('request-id', 'none')}"
    document = _document(answer)
    if answer.is_success:
        return _of_page(document, told, whose, others if workspace else frozenset())
    refusal = document.get("error") if isinstance(document, dict) else None
    match answer.status_code:
        case 401:
            return [Finding("flora.key_refused", told)]
        case 403 if isinstance(refusal, dict):
            return [Finding("flora.key_forbidden", told)]
        case 429 | 500 | 502 | 503 | 504:
            return [Finding("flora.failing", told)]
        case status if status == 404 or not isinstance(refusal, dict):
            return [Finding("flora.someone_else", told)]
        case _:
            return [Finding("flora.failing", told)]


def _of_page(document: Any, told: str, whose: str, others: AbstractSet[str]) -> list[Finding]:
    try:
        page = parse_page(document)
    except PayloadError as error:
        return [Finding("flora.someone_else", f"{told}: {error}")]
    strangers = {run.workspace_id for run in page.snapshots if run.workspace_id in others}
    return [Finding("secrets.mixed_up", f"{whose} shows runs of {each}") for each in strangers]


def _document(answer: httpx.Response) -> Any:
    try:
        return answer.json()
    except ValueError:
        return None


def _of_clock(answer: httpx.Response, now: datetime) -> Finding | None:
    try:
        seconds = (now - parsedate_to_datetime(answer.headers["date"])).total_seconds()
    except (KeyError, ValueError, TypeError):
        return None
    if abs(seconds) <= _SKEW_SECONDS:
        return None
    return Finding("clock.skewed", f"{abs(seconds):.0f} s {'ahead' if seconds > 0 else 'behind'}")
