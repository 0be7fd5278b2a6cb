"""What a read of a run leaves in the ledger, whatever has answered in FLORA's place. On both databases."""

import json
from collections.abc import AsyncIterator
from datetime import timedelta

import httpx
import pytest

from receiver.flora.client import FloraClient
from receiver.flora.rate_limit import RateLimit
from receiver.model import ReadAttempt, ReadOutcome
from receiver.store import ledger, queries
from receiver.workers.poller import Poller
from tests.support.core import Clock, Core
from tests.support.media import MediaServer, Page, page, serve_media
from tests.support.stand import a_poller, run_readers

RUN = json.dumps({"run_id": "run_1", "status": "running"}).encode()
EMPTY = json.dumps({"run_id": "run_1", "status": "completed", "outputs": []}).encode()
OTHER = json.dumps({"run_id": "run_2", "status": "running"}).encode()
REQUEST_ID = "request-id: req_1"
JSON = "application/json"
HTML = b"<!doctype html><title>Sign in</title>"


def refusal(code: str, message: str) -> bytes:
    return json.dumps({"error": {"code": code, "message": message}}).encode()


@pytest.fixture
async def flora() -> AsyncIterator[MediaServer]:
    """A server in FLORA's place, which sends what the test gives it."""
    async with serve_media() as server:
        yield server


@pytest.fixture
async def poller(core: Core, flora: MediaServer) -> AsyncIterator[Poller]:
    async with httpx.AsyncClient(base_url=flora.url("/"), trust_env=False) as http:
        client = FloraClient(http, "sk_test", RateLimit(8, clock=core.clock), timeout_seconds=0.5)
        yield a_poller(core, run_readers(core, {None: client}))


async def read_once(core: Core, poller: Poller) -> None:
    run = await core.run()
    assert run.next_poll_at is not None
    core.clock.now = max(core.clock.now, run.next_poll_at) + timedelta(seconds=61)
    await poller.tick(core.clock.now)
    await poller.drain()


async def reads(core: Core) -> tuple[ReadAttempt, ...]:
    return await core.database.read(lambda tx: ledger.reads_of_run(tx, "run_1"))


FAILED, NOT_FOUND, RETURNED = ReadOutcome.FAILED, ReadOutcome.NOT_FOUND, ReadOutcome.RETURNED
CASES = {
    "running": (page(RUN, JSON, REQUEST_ID), RETURNED, 200, None),
    "no outputs": (page(EMPTY, JSON, REQUEST_ID), RETURNED, 200, "no outputs that can be fetched"),
    "404": (
        page(refusal("not_found", "No such run"), JSON, REQUEST_ID, status="404 Not Found"),
        NOT_FOUND,
        404,
        "No such run",
    ),
    "401": (
        page(refusal("invalid_api_key", "Bad key"), JSON, REQUEST_ID, status="401 Unauthorized"),
        FAILED,
        401,
        "Bad key",
    ),
    "308": (
        page(
            b"", JSON, REQUEST_ID, "Location: https://elsewhere.example/", status="308 Permanent Redirect"
        ),
        FAILED,
        308,
        "a redirect, which is not followed: check [flora] base_url",
    ),
    "500 in HTML": (
        page(HTML, "text/html", REQUEST_ID, status="500 Oh"),
        FAILED,
        500,
        "without an error object",
    ),
    "HTML": (page(HTML, "text/html; charset=utf-8", REQUEST_ID), FAILED, 200, "it is text/html, not JSON"),
    "half of the JSON": (page(RUN[:20], JSON, REQUEST_ID), FAILED, 200, "cannot be read: not JSON"),
    "a cut body": (
        Page(page(RUN, JSON, REQUEST_ID).raw[:-5]),
        FAILED,
        200,
        "was cut off",
    ),
    "another run": (page(OTHER, JSON, REQUEST_ID), FAILED, 200, "another run"),
    "silence": (Page(b"", hold=True), FAILED, None, "did not respond within 0.5 s"),
    "no HTTP": (Page(b"SSH-2.0-OpenSSH_9.6\r\n"), FAILED, None, "cannot be reached"),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
async def test_each_read_is_kept_with_what_was_wrong(
    core: Core, poller: Poller, flora: MediaServer, case: tuple[Page, ReadOutcome, int | None, str | None]
) -> None:
    """Status, request id, duration and the reason; and only what FLORA answered counts as a read."""
    flora.pages["/runs/run_1"], outcome, status, problem = case
    await core.register()
    await read_once(core, poller)
    (read,) = await reads(core)
    assert (read.source, read.outcome, read.http_status) == ("run", outcome, status)
    assert read.request_id == (None if status is None else "req_1")
    assert problem in (read.problem or "") if problem else read.problem is None
    assert read.requested_at == core.clock.now
    assert read.seconds is not None
    assert read.seconds >= 0
    run = await core.run()
    assert (run.polls, run.failed_polls) == (1, int(outcome is FAILED))


async def test_the_number_of_kept_reads_is_bounded(core: Core, poller: Poller, flora: MediaServer) -> None:
    """A run that is read all day keeps its last reads, failed or not."""
    flora.pages["/runs/run_1"] = page(HTML, "text/html")
    flora.first["/runs/run_1"] = [page(RUN, JSON) for _ in range(8)]
    await core.register()
    for _ in range(14):
        await read_once(core, poller)
    kept = await reads(core)
    assert [read.outcome for read in kept] == [RETURNED] * 4 + [FAILED] * 6
    assert await core.count("run_reads") == ledger.KEPT_READS
    run = await core.run()
    assert (run.polls, run.failed_polls) == (14, 6)


async def test_a_missing_key_is_a_reason_too(core: Core, clock: Clock) -> None:
    """Nothing was sent, and the run says so."""
    await core.register(workspace_id="ws_1")
    poller = a_poller(core, {})
    clock.forward(100)
    await poller.tick(clock.now)
    (read,) = await reads(core)
    assert (read.outcome, read.http_status, read.seconds) == (FAILED, None, None)
    assert "FLORA_API_KEY" in (read.problem or "")


async def test_a_read_in_a_list_is_marked_as_one(core: Core, poller: Poller, flora: MediaServer) -> None:
    """Runs that are found together have the page's request id; one that the list lacks has its reason."""
    rows = [{"generation_id": f"run_{n}", "status": "running"} for n in range(1, 30)]
    flora.pages["/generations?limit=100"] = page(
        json.dumps({"generations": rows, "meta": {"next_cursor": None}}).encode(), JSON, REQUEST_ID
    )
    for number in range(1, 30):
        await core.register(f"run_{number}")
    await read_once(core, poller)
    (read,) = await reads(core)
    assert (read.source, read.outcome, read.run_status, read.request_id) == (
        "list",
        RETURNED,
        "running",
        "req_1",
    )
    details = await core.database.read(lambda tx: queries.run_details(tx, "run_1"))
    assert details is not None
    assert details.reads == (read,)
