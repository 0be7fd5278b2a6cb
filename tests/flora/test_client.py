"""Requests to FLORA: lists page by page, limits obeyed, starts that came too late not sent."""

import gzip
import json
from collections.abc import Callable, Sequence
from typing import Any

import brotli
import httpx
import pytest

from receiver.decide import Listing, Scope
from receiver.errors import FloraError
from receiver.flora.client import FloraClient
from receiver.flora.rate_limit import RateLimit
from tests.support.media import page, serve_media


def a_client(respond: Callable[[httpx.Request], httpx.Response], statuses: list[int | None]) -> FloraClient:
    def send(request: httpx.Request) -> httpx.Response:
        # As from a server: a response of httpx that has its content is read already.
        made = respond(request)
        return httpx.Response(made.status_code, headers=made.headers, stream=httpx.ByteStream(made.content))

    http = httpx.AsyncClient(transport=httpx.MockTransport(send), base_url="http://flora/")
    return FloraClient(http, "sk_test", RateLimit(8), on_response=statuses.append)


class Lists:
    """Responds with the pages of a list; `cursors` are those that follow each page."""

    def __init__(self, *cursors: str | None) -> None:
        self._cursors = list(cursors)
        self.requests: list[httpx.Request] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        row = {"run_id": f"run_{len(self.requests)}", "status": "running"}
        body = {"technique_runs": [row], "meta": {"next_cursor": self._cursors[len(self.requests) - 1]}}
        return httpx.Response(200, json=body)


async def read_all(client: FloraClient, scope: Scope) -> Sequence[str]:
    return [snapshot.run_id async for page in client.pages(scope) for snapshot in page.snapshots]


async def test_pages_are_read_to_the_end_with_their_filters() -> None:
    lists, statuses = Lists("a", "b", None), list[int | None]()
    scope = Scope(Listing.TECHNIQUE_RUNS, "ws_1", "tech_1")
    assert await read_all(a_client(lists, statuses), scope) == ["run_1", "run_2", "run_3"]
    filters = {"limit": "100", "workspace_id": "ws_1", "technique_id": "tech_1"}
    assert [dict(request.url.params) for request in lists.requests] == [
        filters,
        {**filters, "cursor": "a"},
        {**filters, "cursor": "b"},
    ]
    assert {request.url.path for request in lists.requests} == {"/technique-runs"}
    assert statuses == [200, 200, 200]


@pytest.mark.parametrize("cursors", [("a", "a"), ("a", "b", "a")])
async def test_a_cursor_that_repeats_ends_the_list(cursors: tuple[str, ...]) -> None:
    lists = Lists(*cursors)
    found = await read_all(a_client(lists, []), Scope(Listing.GENERATIONS))
    assert len(found) == len(cursors)
    assert lists.requests[0].url.path == "/generations"


async def test_no_page_is_requested_before_it_is_wanted() -> None:
    """Each page is a request of its own: a reader that has seen enough sends no further one."""
    lists = Lists("a", "b")
    async for _ in a_client(lists, []).pages(Scope(Listing.GENERATIONS)):
        break
    assert len(lists.requests) == 1


async def test_a_429_slows_down_all_requests_of_the_key() -> None:
    def respond(_: httpx.Request) -> httpx.Response:
        return httpx.Response(429, headers={"retry-after": "7"}, json={"error": {"code": "rate_limited"}})

    client = a_client(respond, [])
    with pytest.raises(FloraError) as caught:
        await client.run("run_1")
    assert (caught.value.status, caught.value.retry_after) == (429, 7)
    assert client.rate_limit.allowed == 4
    assert client.rate_limit.held_seconds > 6


@pytest.mark.parametrize(
    ("value", "seconds"),
    [("Tue, 24 Nov 2026 12:00:40 GMT", 40), ("Tue, 24 Nov 2099 12:00:00 GMT", 3600), ("9" * 30, 3600)],
)
async def test_retry_after_is_a_date_or_absurd(value: str, seconds: float) -> None:
    """A date counts from the response's own, and what is logged and held is an hour at most."""

    def respond(request: httpx.Request) -> httpx.Response:
        headers = {"retry-after": value, "date": "Tue, 24 Nov 2026 12:00:00 GMT"}
        return httpx.Response(429, headers=headers, json={"error": {"code": "rate_limited"}})

    client = a_client(respond, [])
    with pytest.raises(FloraError) as caught:
        await client.run("run_1")
    assert caught.value.retry_after == seconds
    assert seconds - 1 < client.rate_limit.held_seconds <= seconds


RUN = json.dumps({"run_id": "run_1", "status": "running"}).encode()


@pytest.mark.parametrize(
    ("coding", "body"),
    [
        ("gzip", gzip.compress(RUN)),
        ("br", brotli.compress(RUN)),
        ("gzip", RUN),
        ("base64", RUN),
        ("", RUN),
    ],
    ids=["gzip", "br", "false gzip", "base64", "none"],
)
async def test_responses_are_read_in_every_coding(coding: str, body: bytes) -> None:
    """Also one that a proxy gives a false label."""
    async with serve_media() as flora, httpx.AsyncClient(trust_env=False) as http:
        flora.pages["/runs/run_1"] = page(body, "application/json", f"Content-Encoding: {coding}")
        http.base_url = httpx.URL(flora.url("/"))
        assert (await FloraClient(http, "sk_test", RateLimit(8)).run("run_1")).run_id == "run_1"


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (gzip.compress(bytes(70 * 1024 * 1024)), "larger than the limit"),
        (gzip.compress(RUN)[:-1], "ends in the middle of its coding"),
    ],
    ids=["bomb", "cut"],
)
async def test_responses_that_cannot_be_decoded(body: bytes, reason: str) -> None:
    """A bomb is not kept in memory, and the reason does not claim that FLORA is unreachable."""
    async with serve_media() as flora, httpx.AsyncClient(trust_env=False) as http:
        flora.pages["/runs/run_1"] = page(
            body, "application/json", "Content-Encoding: gzip", "request-id: req_1"
        )
        http.base_url = httpx.URL(flora.url("/"))
        with pytest.raises(FloraError, match=reason) as caught:
            await FloraClient(http, "sk_test", RateLimit(8)).run("run_1")
    assert (caught.value.status, caught.value.request_id) == (200, "req_1")


@pytest.mark.parametrize("start", ["technique", "generate"])
async def test_a_start_that_may_not_be_sent_any_more_is_not_sent(start: str) -> None:
    """The check is made when a slot is free, right before the request."""
    sent: list[httpx.Request] = []

    def respond(request: httpx.Request) -> httpx.Response:
        sent.append(request)
        return httpx.Response(200, json={"run_id": "run_1"})

    client = a_client(respond, [])

    async def begin(**options: Any) -> object:
        if start == "technique":
            return await client.start_technique_run("tech_1", {}, **options)
        return await client.generate({}, **options)

    assert await begin(may_send=lambda: False) is None
    assert not sent
    assert await begin(may_send=lambda: True) is not None
    assert len(sent) == 1
