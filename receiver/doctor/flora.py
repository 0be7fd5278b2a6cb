"""Asks FLORA's API one question: whether it knows the key; its answer also tells what time it is there."""

from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

import httpx

from receiver.config import Settings
from receiver.doctor.findings import Finding
from receiver.http import api_client, tls_context

_SKEW_SECONDS = 60
"""A fifth of the time that a signature may be ahead of us."""


async def of_flora(settings: Settings, now: datetime | None = None) -> list[Finding]:
    """List one run with each API key. Nothing is started, and nothing costs anything."""
    flora = settings.flora
    keys = {settings.api_key_for(each.id) for each in settings.workspaces} | {settings.api_key_for(None)}
    found: list[Finding] = []
    skew: Finding | None = None
    async with api_client(flora.base_url, timeout_seconds=10, tls=tls_context(flora.ca_file)) as client:
        for key in sorted(key for key in keys if key):
            headers = {"Authorization": f"Bearer {key}"}
            try:
                answer = await client.get("technique-runs", params={"limit": 1}, headers=headers)
            except httpx.HTTPError as error:
                return [Finding("flora.unreachable", f"{flora.base_url}: {type(error).__name__}")]
            found += _of_answer(answer, key)
            skew = _of_clock(answer, now or datetime.now(UTC))
    return found if skew is None else [*found, skew]


def _of_answer(answer: httpx.Response, key: str) -> list[Finding]:
    if answer.is_success:
        return []
    kind = {401: "flora.key_refused", 403: "flora.key_forbidden"}.get(answer.status_code, "flora.failing")
    request_id = answer.headers.get("request-id", "none")
    return [Finding(kind, f"the key {key[:8]}…: {answer.status_code}, request-id {request_id}")]


def _of_clock(answer: httpx.Response, now: datetime) -> Finding | None:
    try:
        seconds = (now - parsedate_to_datetime(answer.headers["date"])).total_seconds()
    except (KeyError, ValueError, TypeError):
        return None
    if abs(seconds) <= _SKEW_SECONDS:
        return None
    return Finding("clock.skewed", f"{abs(seconds):.0f} s {'ahead' if seconds > 0 else 'behind'}")
