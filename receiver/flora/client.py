"""All HTTP requests to FLORA. Called by the run reader and the starter.

Responses become values of the model, and failures of any kind one FloraError. The API key is sent
to the base URL's origin only: redirects are not followed, and a `poll_url` is never fetched.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from typing import Any, TypeVar
from urllib.parse import quote

import httpx

from receiver.decide import Listing, Scope
from receiver.errors import CodingError, FloraError, PayloadError
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
from receiver.flora.rate_limit import RateLimit
from receiver.model import Snapshot
from receiver.net.codings import BodyDecoder, parse_codings

T = TypeVar("T")

PAGE_LIMIT = 100
"""The most rows that FLORA lists at once."""
_MAX_RESPONSE = 64 * 1024 * 1024
"""Bytes. A page holds a hundred runs, whose text outputs stand in it in full."""


def _always() -> bool:
    return True


@dataclass(frozen=True, slots=True)
class Exchange:
    """One request and what came of it, as far as it came."""

    status: int | None
    request_id: str | None
    seconds: float


Observe = Callable[[Exchange], None]
"""Gets every exchange of a call, also one that fails."""


def _ignore(_: Exchange) -> None:
    pass


class FloraClient:
    """FLORA's API as one workspace's key sees it.

    `http` carries base URL and time-outs; `timeout` bounds a whole call.
    """

    def __init__(
        self,
        http: httpx.AsyncClient,
        api_key: str,
        rate_limit: RateLimit,
        *,
        timeout_seconds: float = 30.0,
        on_response: Callable[[int | None], None] = lambda _: None,
    ) -> None:
        """`on_response` gets the status of each response, and None where none came."""
        self.rate_limit = rate_limit
        """Shared by all clients with this API key: FLORA counts by key."""
        self.api_key = api_key
        self._http = http
        self._on_response = on_response
        self._headers = {"Authorization": f"Bearer {api_key}", "Accept": "application/json"}
        self._timeout_seconds = timeout_seconds

    async def technique_run(
        self, technique_id: str, run_id: str, *, observe: Observe = _ignore
    ) -> Snapshot:
        """`GET /techniques/{technique_id}/runs/{run_id}`."""
        path = f"techniques/{_segment(technique_id)}/runs/{_segment(run_id)}"
        parse = partial(parse_run, technique_id=technique_id)
        return _same_run(await self._get(path, parse=parse, observe=observe), run_id)

    async def run(self, run_id: str, *, observe: Observe = _ignore) -> Snapshot:
        """`GET /runs/{run_id}`: generations and actions."""
        path = f"runs/{_segment(run_id)}"
        return _same_run(await self._get(path, parse=parse_run, observe=observe), run_id)

    async def pages(
        self, scope: Scope, *, limit: int = PAGE_LIMIT, observe: Observe = _ignore
    ) -> AsyncIterator[Page]:
        """Yield the pages of `GET /technique-runs` or `GET /generations`, newest run first.

        Ends with the last page, and where FLORA repeats a cursor: that one leads nowhere.
        """
        path = "technique-runs" if scope.listing is Listing.TECHNIQUE_RUNS else "generations"
        filters = {
            "limit": str(limit),
            "workspace_id": scope.workspace_id,
            "project_id": scope.project_id,
            "technique_id": scope.technique_id,
        }
        params = {name: value for name, value in filters.items() if value}
        seen: set[str] = set()
        while True:
            page = await self._get(path, params=params, parse=parse_page, observe=observe)
            yield page
            cursor = page.next_cursor
            if cursor is None or cursor in seen:
                return
            seen.add(cursor)
            params["cursor"] = cursor

    async def start_technique_run(
        self, technique_id: str, request: Mapping[str, Any], *, may_send: Callable[[], bool] = _always
    ) -> StartedRun | None:
        """`POST /techniques/{technique_id}/runs`.

        Its body has inputs, mode, callback_url, idempotency_key.

        Returns None if `may_send` was False once a slot was free; then nothing was sent.
        """
        parse = partial(parse_start, technique_id=technique_id)
        async with self.rate_limit.request():
            if not may_send():
                return None
            return await self._exchange(
                "POST", f"techniques/{_segment(technique_id)}/runs", json=request, parse=parse
            )

    async def generate(
        self,
        request: Mapping[str, Any],
        *,
        idempotency_key: str | None = None,
        may_send: Callable[[], bool] = _always,
    ) -> StartedRun | None:
        """`POST /generate`; its idempotency key is a header.

        Returns None as `start_technique_run` does.
        """
        headers = {"Idempotency-Key": idempotency_key} if idempotency_key else {}
        parse = partial(parse_start, technique_id=None)
        async with self.rate_limit.request():
            if not may_send():
                return None
            return await self._exchange("POST", "generate", json=request, headers=headers, parse=parse)

    async def technique(self, technique_id: str) -> Technique:
        """`GET /techniques/{technique_id}`: declared inputs and outputs, and what a run costs."""
        parse = partial(parse_technique, technique_id=technique_id)
        return await self._get(f"techniques/{_segment(technique_id)}", parse=parse)

    async def _get(
        self,
        path: str,
        *,
        parse: Callable[[Any], T],
        params: Mapping[str, str] | None = None,
        observe: Observe = _ignore,
    ) -> T:
        async with self.rate_limit.request():
            return await self._exchange("GET", path, params=params, parse=parse, observe=observe)

    async def _exchange(
        self,
        method: str,
        path: str,
        *,
        parse: Callable[[Any], T],
        json: Mapping[str, Any] | None = None,
        params: Mapping[str, str] | None = None,
        headers: Mapping[str, str] | None = None,
        observe: Observe = _ignore,
    ) -> T:
        """Return what `parse` makes of the JSON of a 2xx response. Raises FloraError."""
        request = self._http.build_request(
            method, path, json=json, params=params, headers={**self._headers, **(headers or {})}
        )
        heads: list[httpx.Response] = []
        started = time.perf_counter()
        try:
            return await self._send_and_parse(request, parse, heads)
        finally:
            status, request_id = (
                (heads[0].status_code, heads[0].headers.get("request-id")) if heads else (None, None)
            )
            observe(Exchange(status, request_id, time.perf_counter() - started))

    async def _send_and_parse(
        self, request: httpx.Request, parse: Callable[[Any], T], heads: list[httpx.Response]
    ) -> T:
        """Return what `parse` makes of a response, whose head is added to `heads` as it comes."""
        try:
            # httpx's time-outs are per read, and do not end a response of a byte at a time.
            async with asyncio.timeout(self._timeout_seconds):
                status, body, response_headers = await self._send(request, heads)
        except TimeoutError as error:
            self._on_response(None)
            raise FloraError(f"FLORA did not respond within {self._timeout_seconds:g} s") from error
        except httpx.ProxyError as error:
            self._on_response(None)
            raise FloraError(f"FLORA cannot be reached: {error}") from error
        except (httpx.HTTPError, httpx.StreamError) as error:
            self._on_response(None)
            raise FloraError(f"FLORA cannot be reached: {type(error).__name__}") from error
        self._on_response(status)
        if not 200 <= status < 300:
            raise parse_error(status, body, response_headers, datetime.now(UTC))
        try:
            return parse(parse_json(body))
        except PayloadError as error:
            request_id = response_headers.get("request-id")
            reason = _describe_type(response_headers) or str(error)
            raise FloraError(
                f"FLORA's response cannot be read: {reason}", status=status, request_id=request_id
            ) from error

    async def _send(
        self, request: httpx.Request, heads: list[httpx.Response]
    ) -> tuple[int, bytes, httpx.Headers]:
        response = await self._http.send(request, stream=True)
        heads.append(response)
        try:
            return response.status_code, await _read_body(response), response.headers
        except (httpx.HTTPError, httpx.StreamError) as error:
            self._on_response(None)
            raise FloraError(f"FLORA's response was cut off: {type(error).__name__}") from error
        except CodingError as error:
            status, request_id = response.status_code, response.headers.get("request-id")
            raise FloraError(
                f"FLORA's response cannot be read: {error}", status=status, request_id=request_id
            ) from error
        finally:
            await response.aclose()


async def _read_body(response: httpx.Response) -> bytes:
    """Return the body without its content codings. Raises CodingError, also where it is too large."""
    codings = parse_codings(response.headers.get("content-encoding", ""))
    decoder = BodyDecoder(codings.decodable, max_bytes=_MAX_RESPONSE)
    body = bytearray()
    async for chunk in response.aiter_raw():
        for piece in decoder.decode(chunk):
            body += piece
        if len(body) > _MAX_RESPONSE:
            raise CodingError(f"it is larger than {_MAX_RESPONSE} bytes", is_too_large=True)
    for piece in decoder.finish():
        body += piece
    return bytes(body)


def _describe_type(headers: httpx.Headers) -> str | None:
    """Return that a response is no JSON, if it says so itself: another server answers in FLORA's place."""
    content_type = headers.get("content-type", "").partition(";")[0].strip().lower()
    if not content_type or "json" in content_type:
        return None
    return f"it is {content_type[:100]}, not JSON: a proxy, a login page or another server has responded"


def _segment(identifier: str) -> str:
    return quote(identifier, safe="")


def _same_run(snapshot: Snapshot, run_id: str) -> Snapshot:
    if snapshot.run_id != run_id:
        raise FloraError("FLORA responded with another run than the requested one")
    return snapshot
