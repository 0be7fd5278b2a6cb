"""The media server: the outputs of ended runs under `/media`, with ranges and faults."""

import asyncio
import re
from dataclasses import dataclass
from datetime import UTC, datetime

from starlette.requests import Request
from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from receiver.emulator.faults import Family, Fault, FaultBook, retry_after_headers
from receiver.emulator.media import Media, encode_media, file_type, make_media
from receiver.emulator.runs import RunBook

__all__ = ["MediaServer"]

_RANGE = re.compile(r"bytes=([0-9]{0,18})-([0-9]{0,18})", re.ASCII)


@dataclass(frozen=True, slots=True)
class _Wire:
    """How a body is sent: up to `stop`, with a pause at `stall_at`.

    The connection is closed where `stop` is before the end.
    """

    stop: int
    stall_at: int | None = None
    stall_seconds: float = 0.0


class MediaServer:
    """Serves the outputs of ended runs. `closing` ends stalls, so that a server can stop."""

    def __init__(self, runs: RunBook, faults: FaultBook) -> None:
        self.closing = asyncio.Event()
        self._runs = runs
        self._faults = faults

    def routes(self) -> list[Route]:
        return [Route("/media/{run_id}/{name}", self.output)]

    async def output(self, request: Request) -> Response:
        run_id = request.path_params["run_id"]
        run = self._runs.find(run_id)
        place, _, extension = request.path_params["name"].partition(".")
        outputs = run.outputs if run is not None and self._runs.clock() >= run.ends_at else ()
        if not place.isdecimal() or int(place) >= len(outputs) or outputs[int(place)].type == "text":
            return PlainTextResponse("not found", 404)
        output = outputs[int(place)]
        expected, content_type = file_type(output.type)
        if f".{extension}" != expected:
            return PlainTextResponse("not found", 404)
        media = make_media(output.type, f"{run_id}/{place}", output.size)
        headers: dict[str, str] = {}
        faults = self._faults.take(
            Family.MEDIA, run_id=run_id, path=request.url.path, method=request.method
        )
        for fault in faults:
            if fault.kind == "expired":
                return PlainTextResponse("expired", int(fault.number("status")))
            if fault.kind == "unavailable":
                pause = retry_after_headers(fault, datetime.now(UTC))
                return PlainTextResponse("unavailable", int(fault.number("status")), pause)
            if fault.kind == "redirect":
                return RedirectResponse(fault.text("url"), int(fault.number("status")))
            if fault.kind == "content_type":
                content_type = fault.text("value")
            if fault.kind == "content_encoding":
                headers["content-encoding"] = fault.text("value")
                media = encode_media(media, fault.text("value")) if fault.options["apply"] else media
        headers |= {"content-type": content_type, "etag": f'"{run_id}-{place}-{media.size}"'}
        return self._respond(request, media, headers, faults)

    def _respond(
        self, request: Request, media: Media, headers: dict[str, str], faults: tuple[Fault, ...]
    ) -> Response:
        headers, etag = {**headers, "accept-ranges": "bytes"}, headers["etag"]
        start, stop, status = 0, media.size, 200
        if (requested := request.headers.get("range")) is not None and request.headers.get(
            "if-range", etag
        ) == etag:
            found = _parse_range(requested, media.size)
            if found is None:
                headers["content-range"] = f"bytes */{media.size}"
                return PlainTextResponse("range not satisfiable", 416, headers)
            if found != (0, 0):
                (start, stop), status = found, 206
                headers["content-range"] = f"bytes {start}-{stop - 1}/{media.size}"
        length, wire = _plan(start, stop, faults)
        headers["content-length"] = str(length)
        return _MediaResponse(media, start, wire, status, headers, self.closing)


def _parse_range(header: str, size: int) -> tuple[int, int] | None:
    """Return the range as (start, stop).

    (0, 0) stands for a header to ignore, None for a range outside the file.
    """
    found = _RANGE.fullmatch(header.strip())
    if found is None or not (found[1] or found[2]):
        return 0, 0
    if not found[1]:
        wanted = int(found[2])
        return (max(0, size - wanted), size) if wanted else None
    start = int(found[1])
    stop = min(size, int(found[2]) + 1) if found[2] else size
    if found[2] and int(found[2]) < start:
        return 0, 0
    return (start, stop) if start < size else None


def _plan(start: int, stop: int, faults: tuple[Fault, ...]) -> tuple[int, _Wire]:
    """Return the Content-Length to announce, and what is sent."""
    length, end = stop - start, stop
    stall_at, stall_seconds = None, 0.0
    for fault in faults:
        if fault.kind == "wrong_length":
            # Too small, and the file seems to end there; too large, and it seems cut.
            length = max(0, length + int(fault.number("delta")))
            end = min(stop, start + length)
        elif fault.kind == "cut":
            end = min(end, start + int(fault.number("after_bytes")))
        elif fault.kind == "stall":
            stall_at, stall_seconds = start + int(fault.number("after_bytes")), fault.number("seconds")
    return length, _Wire(end, stall_at, stall_seconds)


class _MediaResponse(Response):
    """Streams a range of a file. A fault may make what it announces and what it sends differ."""

    def __init__(
        self,
        media: Media,
        start: int,
        wire: _Wire,
        status: int,
        headers: dict[str, str],
        closing: asyncio.Event,
    ) -> None:
        self._media = media
        self._start = start
        self._wire = wire
        self._closing = closing
        super().__init__(None, status, headers)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        if scope["method"] == "HEAD":
            await send({"type": "http.response.body", "body": b""})
            return
        wire, position = self._wire, self._start
        if wire.stall_at is not None:
            first = min(wire.stall_at, wire.stop)
            await self._stream(send, position, first)
            await self._stall(receive)
            position = first
        await self._stream(send, position, wire.stop)
        if wire.stop - self._start >= int(self.headers["content-length"]):
            await send({"type": "http.response.body", "body": b""})
        # Else the server closes the connection, and the client misses bytes.

    async def _stream(self, send: Send, start: int, stop: int) -> None:
        for piece in self._media.read(start, stop):
            await send({"type": "http.response.body", "body": piece, "more_body": True})

    async def _stall(self, receive: Receive) -> None:
        """Wait for the end of the stall, the client's disconnect or the emulator's end."""
        disconnect = asyncio.ensure_future(_wait_for_disconnect(receive))
        closing = asyncio.ensure_future(self._closing.wait())
        try:
            await asyncio.wait(
                (disconnect, closing), timeout=self._wire.stall_seconds, return_when=asyncio.FIRST_COMPLETED
            )
        finally:
            disconnect.cancel()
            closing.cancel()


async def _wait_for_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
