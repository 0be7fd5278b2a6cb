"""The guard of the public listener, on raw sockets: what it closes, what it leaves alone, and who is served meanwhile."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from receiver.web.connection_guard import Guard, Limits
from receiver.web.server import Server, bind

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]

HONEST = b"POST / HTTP/1.1\r\nHost: t\r\nContent-Length: 5\r\n\r\nhello"


@dataclass
class Clock:
    """Seconds that pass when told to."""

    seconds: float = 0.0

    def __call__(self) -> float:
        return self.seconds


@dataclass
class Stand:
    """A guarded server and its clock."""

    guard: Guard
    clock: Clock
    port: int
    told: list[str]
    """Why connections were closed."""

    async def connect(self) -> Streams:
        return await asyncio.open_connection("127.0.0.1", self.port)

    async def after(self, seconds: float) -> None:
        """Let time pass, and let the guard look."""
        self.clock.seconds += seconds
        self.guard.sweep()


async def _echo(request: Request) -> PlainTextResponse:
    return PlainTextResponse(str(len(await request.body())))


@asynccontextmanager
async def standing(
    limits: Limits, app: Callable[[Request], Awaitable[PlainTextResponse]] = _echo
) -> AsyncIterator[Stand]:
    clock, told = Clock(), list[str]()
    guard = Guard(limits, clock=clock, on_close=told.append)
    server = Server(Starlette(routes=[Route("/", app, methods=["POST"])]), bind("127.0.0.1", 0), guard=guard)
    await server.start()
    try:
        yield Stand(guard, clock, server.port, told)
    finally:
        await server.stop()


@pytest.fixture
async def stand() -> AsyncIterator[Stand]:
    async with standing(Limits()) as stand:
        yield stand


async def closed(reader: asyncio.StreamReader) -> bool:
    """Whether the server closes the connection without a word."""
    async with asyncio.timeout(10):
        try:
            return await reader.read() == b""
        except ConnectionError:
            return True


async def answer(streams: Streams, request: bytes = HONEST) -> bytes:
    """Send a request and return the body of its answer."""
    reader, writer = streams
    writer.write(request)
    async with asyncio.timeout(10):
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
        return await reader.readexactly(length)


async def hang_up(writer: asyncio.StreamWriter) -> None:
    """Close at once, whatever is still to be sent, and be done with it before the loop ends."""
    writer.transport.abort()
    with contextlib.suppress(ConnectionError):
        await writer.wait_closed()


async def known(stand: Stand, waiting: Callable[[], int], count: int) -> None:
    """Wait until the server has seen that many."""
    async with asyncio.timeout(10):
        while waiting() < count:  # noqa: ASYNC110 -- the server runs in this loop
            await asyncio.sleep(0)


async def test_honest_requests_pass_in_one_piece_and_in_many(stand: Stand) -> None:
    """One connection, three requests: whole, byte by byte, and two at once."""
    streams = await stand.connect()
    assert await answer(streams) == b"5"
    for byte in HONEST[:-1]:
        streams[1].write(bytes([byte]))
        await streams[1].drain()
    assert await answer(streams, HONEST[-1:]) == b"5"
    streams[1].write(HONEST)
    assert await answer(streams) == b"5"
    assert await answer(streams, b"") == b"5"
    assert stand.guard.closed == 0
    assert not stand.guard.heads
    assert not stand.guard.bodies
    await hang_up(streams[1])


@pytest.mark.parametrize(
    "start",
    [
        pytest.param(b"", id="nothing at all"),
        pytest.param(b"\r\n\r\n", id="empty lines"),
        pytest.param(b"POST / HTTP/1.1\r\nHost: t\r\nX-A: b", id="half a head"),
        pytest.param(b"POST / HTTP/1.1\r\nHost: t\r\nContent-Length: 5\r\n\r\nhel", id="half a body"),
        pytest.param(b"POST / HTTP/1.1\r\nHost: t\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhel", id="half a chunk"),
    ],
)
async def test_what_is_never_finished_is_closed(stand: Stand, start: bytes) -> None:
    """Slow loris: ten seconds are enough for a head, and ten more for a body."""
    reader, writer = await stand.connect()
    writer.write(start)
    await known(stand, lambda: len(stand.guard.heads) + len(stand.guard.bodies), 1)
    await stand.after(9.9)
    assert stand.guard.closed == 0
    await stand.after(0.2)
    assert await closed(reader)
    assert stand.guard.closed == 1
    await hang_up(writer)


async def test_a_trickle_does_not_buy_time(stand: Stand) -> None:
    """A header every nine seconds: the head is counted from its first byte."""
    reader, writer = await stand.connect()
    writer.write(b"POST / HTTP/1.1\r\n")
    await known(stand, lambda: len(stand.guard.heads), 1)
    await stand.after(9)
    writer.write(b"X-A: b\r\n")
    await writer.drain()
    await stand.after(2)
    assert await closed(reader)
    await hang_up(writer)


async def test_a_second_request_is_timed_like_the_first(stand: Stand) -> None:
    """Keep-alive is no licence: after a good request, half a head is closed too."""
    streams = await stand.connect()
    assert await answer(streams) == b"5"
    await stand.after(60)
    assert stand.guard.closed == 0, "an idle connection is uvicorn's business"
    streams[1].write(b"POST / HT")
    await known(stand, lambda: len(stand.guard.heads), 1)
    await stand.after(10.1)
    assert await closed(streams[0])
    await hang_up(streams[1])


@pytest.mark.parametrize(
    "request_",
    [
        pytest.param(b"POST / HTTP/1.1\r\nHost: t\r\nX-A: " + b"a" * 17_000, id="head without end"),
        pytest.param(b"POST / HTTP/1.1\r\nX-A: " + b"a" * 17_000 + b"\r\n\r\n", id="large head in one piece"),
        pytest.param(b"POST /" + b"a" * 17_000 + b" HTTP/1.1\r\nHost: t\r\n\r\n", id="large request line"),
        pytest.param(b"POST / HTTP/1.1\r\nHost: t\r\nContent-Length: 900000\r\n\r\n" + b"a" * 800_000, id="large body"),
        pytest.param(
            b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n" + (b"1;" + b"x" * 2000 + b"\r\na\r\n") * 400,
            id="small body in large framing",
        ),
        pytest.param(
            b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n" + b"T: " + b"t" * 800_000, id="trailers"
        ),
    ],
)
async def test_what_is_too_large_is_closed(stand: Stand, request_: bytes) -> None:
    """Head 16 KiB, message 96 KiB and the piece in which that is exceeded, whatever the bytes are called."""
    reader, writer = await stand.connect()
    writer.write(request_)
    async with asyncio.timeout(10):
        with contextlib.suppress(ConnectionError):
            while await reader.read(65_536):
                pass
    assert stand.guard.closed == 1
    await hang_up(writer)


async def test_honest_callers_get_through_a_crowd() -> None:
    """500 connections that never finish their head fill every place: the oldest gives way, and the callback is answered."""
    async with standing(Limits(connections=500)) as stand:
        crowd = [await stand.connect() for _ in range(500)]
        for _, writer in crowd:
            writer.write(b"POST / HTTP/1.1\r\nX: ")
        await known(stand, lambda: len(stand.guard.heads), 500)
        for _ in range(20):
            honest = await stand.connect()
            assert await answer(honest) == b"5"
            await hang_up(honest[1])
        assert await closed(crowd[0][0])
        for _, writer in crowd:
            await hang_up(writer)


async def test_odd_but_honest_requests_are_answered(stand: Stand) -> None:
    """One connection: chunks with extensions and trailers, a body that waits to be asked for, one that was refused unread."""
    streams = await stand.connect()
    chunks = b"5;a=b\r\nhello\r\n0\r\nX-Trailer: 1\r\n\r\n"
    assert await answer(streams, b"POST / HTTP/1.1\r\nHost: t\r\nTransfer-Encoding: chunked\r\n\r\n" + chunks) == b"5"
    streams[1].write(b"POST / HTTP/1.1\r\nHost: t\r\nExpect: 100-continue\r\nContent-Length: 5\r\n\r\n")
    async with asyncio.timeout(10):
        assert await streams[0].readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
    assert await answer(streams, b"hello") == b"5"
    refused = b"POST /nowhere HTTP/1.1\r\nHost: t\r\nContent-Length: 300000\r\n\r\n" + b"a" * 300_000
    assert await answer(streams, refused) == b"Not Found"
    assert await answer(streams) == b"5"
    assert stand.guard.closed == 0
    await hang_up(streams[1])


async def test_a_crowd_that_idles_keeps_nobody_out() -> None:
    """One request on each of many connections, then nothing: keep-alive lasts two minutes, and honest callers do not wait."""
    async with standing(Limits(connections=50)) as stand:
        crowd = [await stand.connect() for _ in range(50)]
        for streams in crowd:
            assert await answer(streams) == b"5"
        assert await answer(crowd[0]) == b"5"
        for _ in range(20):
            honest = await stand.connect()
            assert await answer(honest) == b"5"
            await hang_up(honest[1])
        assert await closed(crowd[1][0])
        assert await answer(crowd[0]) == b"5"  # it was not the one that had been quiet for longest
        for _, writer in crowd:
            await hang_up(writer)


async def test_who_has_only_just_begun_does_not_give_way_to_who_idles() -> None:
    """A request in two pieces is honest for a second; after that it goes first."""
    async with standing(Limits(connections=2)) as stand:
        idle, begun = await stand.connect(), await stand.connect()
        assert await answer(idle) == b"5"
        begun[1].write(HONEST[:-3])
        await known(stand, lambda: len(stand.guard.bodies), 1)
        newcomer = await stand.connect()
        assert await closed(idle[0])
        assert await answer(newcomer) == b"5"
        stand.clock.seconds += 1.1
        other = await stand.connect()
        assert await closed(begun[0])
        for streams in (newcomer, other):
            assert await answer(streams) == b"5"
        for _, writer in (idle, begun, newcomer, other):
            await hang_up(writer)


async def test_who_waits_for_an_answer_does_not_give_way() -> None:
    """Where every connection is being worked for, the newcomer goes: the others are owed something."""
    free = asyncio.Event()

    async def slow(_: Request) -> PlainTextResponse:
        await free.wait()
        return PlainTextResponse("done")

    async with standing(Limits(connections=2), slow) as stand:
        waiting = [await stand.connect() for _ in range(2)]
        calls = [asyncio.create_task(answer(streams)) for streams in waiting]
        await known(stand, lambda: len(stand.guard.idle), 2)
        newcomer = await stand.connect()
        assert await closed(newcomer[0])
        free.set()
        assert await asyncio.gather(*calls) == [b"done", b"done"]
        for _, writer in (*waiting, newcomer):
            await hang_up(writer)


async def test_a_few_requests_may_be_sent_ahead_and_many_may_not(stand: Stand) -> None:
    """A piece full of tiny requests, each of which costs a hundred times its bytes here, is not a way to fill memory."""
    few = await stand.connect()
    few[1].write(HONEST * 17)
    assert [await answer(few, b"") for _ in range(17)] == [b"5"] * 17
    many = await stand.connect()
    many[1].write(HONEST * 5000)
    assert await closed(many[0])
    assert stand.guard.closed == 1
    assert stand.told == ["too_many"]
    assert await answer(few) == b"5"
    await hang_up(few[1])
    await hang_up(many[1])
