"""The one module that does HTTP to FLORA. Called by the poller and the starter.

Answers become our nouns; whatever is not a good answer becomes one FloraError. The API key goes to the base URL's origin
only: redirects are not followed, and a `poll_url` is never fetched.
"""

import asyncio
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, TypeVar
from urllib.parse import quote

import httpx

from receiver.errors import FloraError, PayloadError
from receiver.flora.messages import (
    Page,
    StartedRun,
    Technique,
    parse_error,
    parse_json,
    parse_page,
    parse_run,
    parse_start,
    parse_technique,
)
from receiver.model import Snapshot

T = TypeVar("T")

PAGE_LIMIT = 100
"""The most rows that FLORA lists at once."""
_MAX_ANSWER = 64 * 1024 * 1024
"""Bytes. A page holds a hundred runs, whose text outputs stand in it in full."""


class FloraClient:
    """FLORA's API as one workspace's key sees it. `http` carries base URL and time-outs; `timeout` bounds a whole call."""

    def __init__(
        self,
        http: httpx.AsyncClient,
        api_key: str,
        *,
        timeout_seconds: float = 30.0,
        answered: Callable[[int | None], None] = lambda _: None,
    ) -> None:
        """`answered` hears the status of each answer, None where none came: for the metrics."""
        self._http = http
        self._answered = answered
        self._headers = {"Authorization": f"Bearer {api_key}", "Accept": "application/json"}
        self._timeout_seconds = timeout_seconds

    async def technique_run(self, technique_id: str, run_id: str) -> Snapshot:
        """`GET /techniques/{technique_id}/runs/{run_id}`."""
        path = f"techniques/{_segment(technique_id)}/runs/{_segment(run_id)}"
        snapshot = await self._call("GET", path, parse=partial(parse_run, technique_id=technique_id))
        return _same_run(snapshot, run_id)

    async def run(self, run_id: str) -> Snapshot:
        """`GET /runs/{run_id}`: generations and actions."""
        return _same_run(await self._call("GET", f"runs/{_segment(run_id)}", parse=parse_run), run_id)

    async def technique_runs(
        self, *, limit: int = PAGE_LIMIT, cursor: str | None = None, **filters: str | None
    ) -> Page:
        """`GET /technique-runs`, newest first. Filters: workspace_id, project_id, technique_id, status."""
        return await self._list("technique-runs", limit, cursor, filters)

    async def generations(self, *, limit: int = PAGE_LIMIT, cursor: str | None = None, **filters: str | None) -> Page:
        """`GET /generations`, newest first. Filters: workspace_id, project_id, status."""
        return await self._list("generations", limit, cursor, filters)

    async def start_technique_run(self, technique_id: str, request: Mapping[str, Any]) -> StartedRun:
        """`POST /techniques/{technique_id}/runs`; `request` is its body: inputs, mode, callback_url, idempotency_key."""
        parse = partial(parse_start, technique_id=technique_id)
        return await self._call("POST", f"techniques/{_segment(technique_id)}/runs", json=request, parse=parse)

    async def generate(self, request: Mapping[str, Any], *, idempotency_key: str | None = None) -> StartedRun:
        """`POST /generate`; idempotency is by header only."""
        headers = {"Idempotency-Key": idempotency_key} if idempotency_key else {}
        parse = partial(parse_start, technique_id=None)
        return await self._call("POST", "generate", json=request, headers=headers, parse=parse)

    async def technique(self, technique_id: str) -> Technique:
        """`GET /techniques/{technique_id}`: declared inputs and outputs, and what a run costs."""
        parse = partial(parse_technique, technique_id=technique_id)
        return await self._call("GET", f"techniques/{_segment(technique_id)}", parse=parse)

    async def _list(self, path: str, limit: int, cursor: str | None, filters: Mapping[str, str | None]) -> Page:
        params: dict[str, str | None] = {"limit": str(limit), "cursor": cursor, **filters}
        given = {key: value for key, value in params.items() if value}
        return await self._call("GET", path, params=given, parse=parse_page)

    async def _call(
        self,
        method: str,
        path: str,
        *,
        parse: Callable[[Any], T],
        json: Mapping[str, Any] | None = None,
        params: Mapping[str, str] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> T:
        """Return what `parse` makes of the JSON of a 2xx answer, or raise FloraError."""
        request = self._http.build_request(
            method, path, json=json, params=params, headers={**self._headers, **(headers or {})}
        )
        try:
            # httpx's own time-outs are per read: an answer that drips a byte at a time needs this one.
            async with asyncio.timeout(self._timeout_seconds):
                status, body, answer_headers = await self._send(request)
        except TimeoutError as error:
            self._answered(None)
            raise FloraError(f"FLORA did not answer within {self._timeout_seconds:g} s") from error
        except (httpx.HTTPError, httpx.StreamError) as error:
            self._answered(None)
            raise FloraError(f"FLORA cannot be reached: {type(error).__name__}") from error
        self._answered(status)
        if not 200 <= status < 300:
            raise parse_error(status, body, answer_headers)
        try:
            return parse(parse_json(body))
        except PayloadError as error:
            request_id = answer_headers.get("request-id")
            raise FloraError(f"FLORA's answer cannot be read: {error}", status=status, request_id=request_id) from error

    async def _send(self, request: httpx.Request) -> tuple[int, bytes, httpx.Headers]:
        response = await self._http.send(request, stream=True)
        try:
            body = bytearray()
            async for chunk in response.aiter_bytes():
                body += chunk
                if len(body) > _MAX_ANSWER:
                    raise FloraError(f"FLORA's answer is larger than {_MAX_ANSWER} bytes", status=response.status_code)
            return response.status_code, bytes(body), response.headers
        finally:
            await response.aclose()


def _segment(identifier: str) -> str:
    return quote(identifier, safe="")


def _same_run(snapshot: Snapshot, run_id: str) -> Snapshot:
    if snapshot.run_id != run_id:
        raise FloraError("FLORA answered with another run than the one asked for")
    return snapshot
