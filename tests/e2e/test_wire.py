"""Bad callbacks on the wire: nothing but our own faults answers 5xx, and the next honest callback is answered 200."""

import asyncio
import secrets
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

import httpx
import pytest

from receiver.service.service import Service
from tests.support.patience import PATIENCE_SECONDS
from tests.support.stage import Stage, eventually

LIMIT = 65_536


@dataclass
class Door:
    """A running receiver, a client of it, and raw connections to it."""

    stage: Stage
    service: Service
    client: httpx.AsyncClient

    async def post(self, body: bytes, signature: str | None = None, **headers: str) -> httpx.Response:
        signed = {"Flora-Signature": self.stage.signature(body) if signature is None else signature}
        return await self.client.post(self.stage.url, content=body, headers=signed | headers)

    async def raw(self, request: bytes, *, end: bool = False) -> bytes:
        """Send bytes over TLS and return what comes back until the other side closes, or stops talking."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.stage.port, ssl=self.stage.tls())
        try:
            writer.write(request)
            await writer.drain()
            if end:
                return b""
            async with asyncio.timeout(PATIENCE_SECONDS):
                return await reader.readuntil(b"\r\n\r\n")
        except asyncio.IncompleteReadError as error:
            return error.partial
        except ConnectionError:  # the guard does not say good-bye
            return b""
        finally:
            writer.transport.abort()

    def head(self, *headers: str) -> bytes:
        lines = ["POST /callbacks/flora HTTP/1.1", "Host: receiver", *headers]
        return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n"

    async def is_honest(self) -> None:
        """Send a proper callback: it must be accepted, whatever came before it."""
        answer = await self.post(self.stage.body(f"run_{secrets.token_hex(6)}"))
        assert (answer.status_code, answer.json()) == (200, {"status": "accepted"})


@pytest.fixture
async def door(stage: Stage) -> AsyncIterator[Door]:
    async with stage.service(public={"body_timeout_seconds": 1.5}) as service, stage.client() as client:
        door = Door(stage, service, client)
        yield door
        await door.is_honest()
        assert (await client.get(stage.url.replace("/callbacks/flora", "/readyz"))).status_code == 200


def padded(body: bytes, size: int) -> bytes:
    return body + b" " * (size - len(body))


BAD_BODIES: dict[str, bytes] = {
    "empty": b"",
    "white space": b"  \n",
    "not JSON": b"hello",
    "not UTF-8": b'{"id": "whd_\xff\xfe"}',
    "half": b'{"id": "whd_1", "data": {"run_id": "run_1"',
    "a list": b"[]",
    "null": b"null",
    "a number": b"1e999",
    "NaN": b"NaN",
    "no data": b'{"id": "whd_1"}',
    "data is a list": b'{"id": "whd_1", "data": ["run_id"]}',
    "no run id": b'{"id": "whd_1", "data": {}}',
    "run id is a number": b'{"id": "whd_1", "data": {"run_id": 7}}',
    "run id is empty": b'{"id": "whd_1", "data": {"run_id": ""}}',
    "run id is a path": b'{"id": "whd_1", "data": {"run_id": ".."}}',
    "run id with NUL": b'{"id": "whd_1", "data": {"run_id": "run_\\u0000"}}',
    "run id is a lone surrogate": b'{"id": "whd_1", "data": {"run_id": "run_\\ud800"}}',
    "run id is endless": b'{"id": "whd_1", "data": {"run_id": "' + b"x" * 10_000 + b'"}}',
    "no id": b'{"data": {"run_id": "run_1"}}',
    "id is an object": b'{"id": {}, "data": {"run_id": "run_1"}}',
    "nested lists": b"[" * LIMIT,
    "nested objects": b'{"id":' * (LIMIT // 6),
    "nested and closed": b'{"id": "whd_1", "data": ' + b"[" * 30_000 + b"]" * 30_000 + b"}",
    "a number of 60,000 digits": b'{"id": ' + b"9" * 60_000 + b', "data": {"run_id": "run_1"}}',
}


async def test_signed_bodies_that_are_no_callbacks_are_kept_and_refused(door: Door) -> None:
    """400, once they are stored: FLORA may have changed its format, and the bytes are evidence."""
    for name, body in BAD_BODIES.items():
        for _ in range(2):
            answer = await door.post(body)
            assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_payload"), name
        await door.is_honest()
    rows = door.stage.rows(
        "SELECT * FROM deliveries NATURAL JOIN delivery_bodies WHERE readable = 0 ORDER BY seq"
    )
    assert [(row["duplicates"], row["body"]) for row in rows] == [(1, body) for body in BAD_BODIES.values()]


@pytest.mark.parametrize("size", [LIMIT - 1, LIMIT, LIMIT + 1, LIMIT * 20])
async def test_the_limit_is_64_kib_to_the_byte(door: Door, size: int) -> None:
    """A body of exactly the limit is read, one byte more is 413, announced by a length or not."""
    body = padded(door.stage.body("run_large"), size)
    announced = await door.post(body)

    async def pieces() -> AsyncIterator[bytes]:
        for start in range(0, size, 1000):
            yield body[start : start + 1000]

    other = padded(door.stage.body("run_large"), size)
    body = other
    headers = {"Flora-Signature": door.stage.signature(other)}
    chunked = await door.client.post(door.stage.url, content=pieces(), headers=headers)
    expected = 200 if size <= LIMIT else 413
    assert [announced.status_code, chunked.status_code] == [expected, expected]
    if expected == 413:
        assert announced.json()["error"]["code"] == chunked.json()["error"]["code"] == "body_too_large"


@pytest.mark.parametrize(
    "request_of",
    [
        lambda door: (
            door.head("Transfer-Encoding: chunked", "Flora-Signature: t=1,v1=0") + b"5\r\nhello\r\n"
        ),
        lambda door: door.head("Content-Length: 500") + b"{",
        lambda door: door.head("Content-Length: 500"),
        lambda door: door.head("Content-Length: 500", "Expect: 100-continue") + b"{}",
    ],
    ids=["chunked without end", "slow", "nothing after the head", "waits for 100"],
)
async def test_a_body_that_never_ends_is_let_go(door: Door, request_of: Callable[[Door], bytes]) -> None:
    """408 once the time for a body is over: the connection does not hang with it."""
    answer = await door.raw(request_of(door))
    if answer.startswith(b"HTTP/1.1 100"):
        return  # it was told to go on, and the test does not
    assert answer.startswith(b"HTTP/1.1 408"), answer


@pytest.mark.parametrize(
    "request_of",
    [
        lambda _: b"POST /callbacks/flora HT",
        lambda door: door.head("Content-Length: 500") + b'{"id": ',
        lambda door: door.head("Transfer-Encoding: chunked") + b"1f4\r\n{",
        lambda _: b"",
    ],
    ids=["half a head", "half a body", "half a chunk", "nothing"],
)
async def test_who_hangs_up_in_the_middle_harms_nobody(
    door: Door, request_of: Callable[[Door], bytes]
) -> None:
    """A connection that is cut leaves nothing in the ledger."""
    await door.raw(request_of(door), end=True)
    assert door.stage.rows("SELECT * FROM deliveries") == []


BAD_HTTP: dict[str, Callable[[Door], bytes]] = {
    "no HTTP": lambda _: b"\x16\x03\x01 hello\r\n\r\n",
    "a bare verb": lambda _: b"GET\r\n\r\n",
    "negative length": lambda door: door.head("Content-Length: -1"),
    "two lengths": lambda door: door.head("Content-Length: 5", "Content-Length: 6") + b"hello",
    "endless length": lambda door: door.head("Content-Length: 99999999999999999999999999"),
    "length and chunks": lambda door: (
        door.head("Content-Length: 5", "Transfer-Encoding: chunked") + b"0\r\n\r\n"
    ),
    "bad chunk": lambda door: door.head("Transfer-Encoding: chunked") + b"zz\r\n\r\n",
    "huge signature": lambda door: door.head("Flora-Signature: " + "v1=" * 100_000),
    "5,000 headers": lambda door: door.head(*(f"X-{number}: {number}" for number in range(5_000))),
    "NUL in a header": lambda door: door.head("Flora-Signature: t=1\x00,v1=0", "Content-Length: 0"),
    "no host": lambda _: b"POST /callbacks/flora HTTP/1.1\r\n\r\n",
    "HTTP/2 preface": lambda _: b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "odd path": lambda _: b"POST /callbacks/flor\xe4 HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n",
    "odd target": lambda _: (
        b"POST http://[::1/callbacks/flora HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n"
    ),
    "escaped path": lambda _: b"POST /%00/../%ff%fe HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n",
    "DELETE": lambda _: b"DELETE /callbacks/flora HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n",
    "unknown verb": lambda _: b"BREW /readyz HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n",
}


async def test_bad_http_is_the_senders_fault(door: Door) -> None:
    """4xx, or a closed connection; never 5xx."""
    for name, request_of in BAD_HTTP.items():
        answer = await door.raw(request_of(door))
        assert answer == b"" or answer.startswith(b"HTTP/1.1 4"), (name, answer)
        await door.is_honest()


async def test_garbage_instead_of_tls_is_hung_up_on(door: Door) -> None:
    """Whoever speaks plain HTTP to the TLS port gets nothing."""
    reader, writer = await asyncio.open_connection("127.0.0.1", door.stage.port)
    writer.write(b"POST /callbacks/flora HTTP/1.1\r\n\r\n")
    assert await asyncio.wait_for(reader.read(), PATIENCE_SECONDS) == b""
    writer.transport.abort()


def _signatures(door: Door, body: bytes) -> dict[str, tuple[bytes, int]]:
    good = door.stage.signature(body)
    digest = good.partition("v1=")[2]
    now = good.partition(",")[0]
    return {
        "empty": (b"", 401),
        "a word": (b"hello", 400),
        "no time": (f"v1={digest}".encode(), 400),
        "two times": (f"{now},{now},v1={digest}".encode(), 400),
        "no digest": (now.encode(), 400),
        "upper case": (f"{now},v1={digest.upper()}".encode(), 400),
        "Arabic digits": ("t=١٢٣,v1=".encode() + digest.encode(), 400),
        "latin-1": (b"t=1\xb2,v1=" + digest.encode(), 400),
        "a time without end": (b"t=" + b"9" * 400 + f",v1={digest}".encode(), 400),
        "15 digits": (b"t=" + b"9" * 15 + f",v1={digest}".encode(), 401),
        "negative": (f"t=-1,v1={digest}".encode(), 400),
        "another body's": (door.stage.signature(body + b" ").encode(), 401),
        "17 digests": (f"{now}{',v1=' + '0' * 64}".encode() + (",v1=" + "1" * 64).encode() * 16, 400),
        "8 KiB": (good.encode() + b",v2=" + b"0" * 8192, 400),
        "an hour old": (door.stage.signature(body, age=3600).encode(), 401),
        "an hour ahead": (door.stage.signature(body, age=-3600).encode(), 401),
        "good": (good.encode(), 200),
        "good among others": (f"x=1, v0=2,{now},v1={'0' * 64},v1={digest}".encode(), 200),
    }


async def test_signature_headers_of_every_kind(door: Door) -> None:
    """Headers that FLORA never wrote are refused for what they are, in bytes of any kind."""
    body = door.stage.body("run_signed")
    for name, (header, expected) in _signatures(door, body).items():
        answer = await door.client.post(
            door.stage.url.encode().decode(), content=body, headers=[(b"Flora-Signature", header)]
        )
        assert answer.status_code == expected, (name, answer.text)
        if expected != 200:
            assert set(answer.json()["error"]) == {"code", "message"}


async def test_two_signature_headers_are_refused(door: Door) -> None:
    """FLORA writes one; a proxy that adds another, even the same, makes it unreadable rather than trusted."""
    body = door.stage.body("run_doubled")
    header = (b"Flora-Signature", door.stage.signature(body).encode())
    answer = await door.client.post(door.stage.url, content=body, headers=[header, header])
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "malformed_signature")
    assert door.stage.deliveries("run_doubled") == []


async def test_what_we_do_not_know_is_no_reason_to_refuse(door: Door) -> None:
    """Unknown event types are `ignored` and stored; unknown versions and extra fields do not matter."""
    stage = door.stage
    odd = await door.post(stage.body("run_odd", type="run.paused"))
    newer = await door.post(stage.body("run_newer", api_version="2031-01-01"))
    more = await door.post(
        stage.body("run_more", outputs=[{"url": "https://127.0.0.1/x"}], deep={"a": [1, 2]})
    )
    bare = await door.post(b'{"id": "whd_bare", "type": "run.completed", "data": {"run_id": "run_bare"}}')
    wrong_type = await door.post(stage.body("run_odd_type", api_version=7, created_at="yesterday"))
    assert [each.json()["status"] for each in (odd, newer, more, bare, wrong_type)] == ["ignored"] + [
        "accepted"
    ] * 4
    assert stage.run("run_odd") == {}
    assert [row["event"] for row in stage.deliveries("run_odd")] == ["run.paused"]
    assert stage.run("run_newer")["state"] == "reported"
    assert stage.deliveries("run_newer")[0]["api_version"] == "2031-01-01"


async def test_a_run_that_flora_does_not_know_waits_and_harms_nobody(door: Door) -> None:
    """A verified callback about a run that the API denies: kept as `reported`, asked about, never an empty success."""
    answer = await door.post(door.stage.body("run_unheard_of"))
    assert answer.status_code == 200
    real = door.stage.start()
    await door.stage.over(real)
    assert door.stage.run("run_unheard_of")["state"] == "reported"
    assert door.stage.dispatches("run_unheard_of") == []


async def test_one_delivery_id_with_two_bodies(door: Door) -> None:
    """The second body is a duplicate and replaces nothing, yet the run that it names is looked at."""
    stage = door.stage
    first, second = stage.start(callback=False), stage.start(callback=False)
    one = await door.post(stage.body(first, delivery_id="whd_same"))
    two = await door.post(stage.body(second, delivery_id="whd_same"))
    assert [one.json()["status"], two.json()["status"]] == ["accepted", "duplicate"]
    await stage.over(first, second)
    assert len(stage.rows("SELECT * FROM deliveries")) == 1
    assert stage.deliveries(first)[0]["duplicates"] == 1
    assert [stage.run(each)["verdict"] for each in (first, second)] == ["matched", "matched"]


async def test_deliveries_that_contradict_each_other(door: Door) -> None:
    """The API decides, whichever callback came first; the run is marked `diverged`, its files are stored once."""
    stage = door.stage
    run_id = stage.start(callback=False)
    for status in ("failed", "completed", "failed"):
        assert (await door.post(stage.body(run_id, status=status))).json() == {"status": "accepted"}
    await stage.over(run_id)
    assert (stage.run(run_id)["state"], stage.run(run_id)["verdict"]) == ("completed", "diverged")
    assert len(stage.dispatches(run_id, "log")) == len(
        {row["event"] for row in stage.dispatches(run_id, "log")}
    )
    stage.check_files(run_id)


@pytest.mark.parametrize(("technique", "state"), [("emu-image", "completed"), ("emu-fail", "failed")])
async def test_a_callback_that_contradicts_the_api(door: Door, technique: str, state: str) -> None:
    """FLORA's own contradiction: what the API shows is what happened; `diverged` says that something is odd."""
    stage = door.stage
    run_id = await stage.track(door.service, technique, {"kind": "contradict"})
    await stage.over(run_id)
    assert (stage.run(run_id)["state"], stage.run(run_id)["verdict"]) == (state, "diverged")
    if state == "completed":
        stage.check_files(run_id)
    else:
        assert stage.files(run_id) == {}


async def test_a_callback_that_lies_about_a_running_run_settles_nothing(door: Door) -> None:
    """`completed` while the API says running: no dispatch before the API agrees, then everything as usual."""
    stage = door.stage
    run_id = stage.start("emu-image", {"kind": "run_seconds", "seconds": 2.5}, callback=False)
    assert (await door.post(stage.body(run_id))).status_code == 200

    async def read_three_times() -> bool:
        return bool(stage.run(run_id)["polls"] >= 3)

    await eventually(read_three_times)
    assert stage.run(run_id)["state"] == "reported"
    assert stage.dispatches(run_id) == []
    await stage.over(run_id)
    assert stage.run(run_id)["state"] == "completed"
    stage.check_files(run_id)


async def test_a_callback_that_the_api_never_confirms_is_diverged_and_loud(door: Door) -> None:
    """Past the ladder a run that is still running is `diverged`: an alert, never an empty success; it still settles."""
    stage = door.stage
    run_id = stage.start("emu-image", {"kind": "run_seconds", "seconds": 6}, callback=False)
    assert (await door.post(stage.body(run_id, status="failed"))).status_code == 200
    await stage.at(run_id, verdict="diverged", state="reported")
    await stage.over(run_id)
    assert (stage.run(run_id)["state"], stage.run(run_id)["verdict"]) == ("completed", "diverged")


async def test_a_flood_of_everything_at_once(door: Door) -> None:
    """Hundreds of good, repeated, forged and broken callbacks at the same time: each gets the answer it deserves."""
    stage, body = door.stage, door.stage.body("run_same", delivery_id="whd_flood")
    good = [stage.body(f"run_{number}") for number in range(60)]
    shots = (
        [(each, None, 200) for each in good]
        + [(body, None, 200)] * 40
        + [(each, "t=1,v1=" + "0" * 64, 401) for each in good[:20]]
        + [(each, "rubbish", 400) for each in good[:20]]
        + [(b"{" * number, None, 400) for number in range(1, 21)]
    )
    answers = await asyncio.gather(*(door.post(each, signature) for each, signature, _ in shots))
    assert [answer.status_code for answer in answers] == [expected for *_, expected in shots]
    said = [answer.json()["status"] for answer in answers if answer.status_code == 200]
    assert (said.count("accepted"), said.count("duplicate")) == (61, 39)
    assert stage.deliveries("run_same")[0]["duplicates"] == 39
    assert len(stage.rows("SELECT * FROM runs")) == 61
