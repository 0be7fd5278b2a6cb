"""Limits on connections: uvicorn's httptools protocol with bounds on bytes, time and number.

httptools parses three times as fast as h11, but uvicorn on top of it accepts a request head of any
size and waits for it without end. The listener is public, so anyone may take its memory and its
connections like that. `Guard` knows the connections of one listener; `GuardedProtocol` reports to
it what each of them still has to send:

    head ──────────────> body ──────────────> nothing ──> head (the next request)
    since the connection since the head       a response may still be due; uvicorn's
    was opened, or the   was complete         keep-alive timer ends the connection
    next request began                        if no request follows

A connection is closed, without a response, for one of these reasons:

    slow_head   The head took longer than `head_seconds`, counted from its first byte.
    slow_body   The body took longer than `body_seconds`.
    too_large   The head exceeds `head_bytes`; or more comes although the message exceeds
                `message_bytes`, with chunk framing and trailers, which the app does not count.
    too_many    More than `pipelined` requests wait for the response to an earlier one.
    crowded     There are more than `connections`: see `Guard.evict`.

What is not HTTP gets a 400 in JSON before its connection is closed: `malformed`.

Four things are less obvious:

- A message that is too large is closed only when *more* comes. uvicorn stops reading until the app
  has consumed what there is, and the app refuses with 413 first.
- A client may read that response only after it has sent its whole body. What comes after a response
  is therefore read and dropped, up to `discard_bytes`.
- An offer of another protocol (`Upgrade`, which Java and curl send for HTTP/2) is ignored. httptools
  would end such a request at its head and take its body for the other protocol. Behind a proxy that
  would be a request that no caller has sent, and another caller would get its response. So the head
  is parsed again without the offer, by a new parser, which then frames the body like any other.
- What follows on a request that is malformed belongs to no request and is discarded.

A request that arrives in one piece costs a few comparisons. `heads` and `bodies` are dicts in the
order of their times, so `sweep` looks at the first entries only.
"""

import asyncio
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from operator import itemgetter
from typing import Any, Literal

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from receiver.web.connections import UNIX_PEER, is_unix, malformed_response

_SWEEP_SECONDS = 0.5
_PROMPT_SECONDS = 1.0
"""Proper requests are complete within this time, so younger ones are evicted last."""
Reason = Literal["slow_head", "slow_body", "too_large", "too_many", "crowded", "malformed"]
"""Why a connection was closed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Limits of a listener. A head has request line and headers, a message also body and framing."""

    message_bytes: int
    head_seconds: float
    body_seconds: float
    connections: int
    head_bytes: int = 16 * 1024
    discard_bytes: int = 2 * 1024 * 1024
    pipelined: int = 16
    """Requests of one connection that wait for an earlier response.

    A megabyte of short ones takes a gigabyte of memory.
    """


class Guard:
    """The connections of one listener, by what they still have to send."""

    def __init__(
        self,
        limits: Limits,
        *,
        on_close: Callable[[Reason], None] = lambda _: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`on_close` is called for every connection that the guard closes."""
        self.limits = limits
        self._on_close = on_close
        self._clock = clock
        self.heads: dict[GuardedProtocol, float] = {}
        """Connections whose head is incomplete, and since when; oldest first."""
        self.bodies: dict[GuardedProtocol, float] = {}
        """Connections whose body is incomplete, and since when; oldest first."""
        self.idle: dict[GuardedProtocol, None] = {}
        """Connections with nothing to send, longest idle first; a response may still be due."""
        self.closed = 0
        """Connections closed by this guard."""

    def protocol(self, **given: Any) -> asyncio.Protocol:
        """Return the protocol of one connection; uvicorn's `http` setting."""
        return GuardedProtocol(self, **given)

    def await_head(self, connection: "GuardedProtocol") -> None:
        self.idle.pop(connection, None)
        self.heads.setdefault(connection, self._clock())

    def await_body(self, connection: "GuardedProtocol") -> None:
        self.idle.pop(connection, None)
        self.heads.pop(connection, None)
        self.bodies.setdefault(connection, self._clock())

    def await_nothing(self, connection: "GuardedProtocol") -> None:
        self.forget(connection)
        self.idle[connection] = None

    def forget(self, connection: "GuardedProtocol") -> None:
        self.heads.pop(connection, None)
        self.bodies.pop(connection, None)
        self.idle.pop(connection, None)

    def evict(self, newcomer: "GuardedProtocol", connections: int) -> None:
        """Close one connection if there are more than `limits.connections`.

        The oldest unfinished request is closed first. If that is still young, the longest idle
        connection is closed instead: otherwise one request on each of many connections would keep
        others out for as long as keep-alive lasts. If all others wait for a response, the newcomer
        is closed.
        """
        if connections <= self.limits.connections:
            return
        unfinished = [
            (since, connection)
            for connection, since in (*islice(self.heads.items(), 1), *islice(self.bodies.items(), 1))
            if connection is not newcomer
        ]
        since, chosen = min(unfinished, key=itemgetter(0), default=(math.inf, newcomer))
        if self._clock() - since <= _PROMPT_SECONDS:
            chosen = next((connection for connection in self.idle if connection.has_responded), chosen)
        self.close(chosen, "crowded")

    def sweep(self) -> None:
        """Close the connections whose head or body has been incomplete for too long."""
        now = self._clock()
        overdue: tuple[tuple[dict[GuardedProtocol, float], float, Reason], ...] = (
            (self.heads, self.limits.head_seconds, "slow_head"),
            (self.bodies, self.limits.body_seconds, "slow_body"),
        )
        for waiting, seconds, reason in overdue:
            while waiting:
                connection, since = next(iter(waiting.items()))
                if now - since <= seconds:
                    break
                self.close(connection, reason)

    def close(self, connection: "GuardedProtocol", reason: Reason) -> None:
        """Close at once, without a response: such a client does not wait for one."""
        self.count(connection, reason)
        if connection.transport is not None:
            connection.transport.abort()

    def count(self, connection: "GuardedProtocol", reason: Reason) -> None:
        """Count a connection that is closed for a reason, and watch it no longer."""
        self.forget(connection)
        self.closed += 1
        self._on_close(reason)

    async def sweep_forever(self) -> None:
        """Sweep until cancelled."""
        while True:
            await asyncio.sleep(_SWEEP_SECONDS)
            self.sweep()


class GuardedProtocol(HttpToolsProtocol):
    """One connection."""

    def __init__(self, guard: Guard, **given: Any) -> None:
        super().__init__(**given)
        self._guard = guard
        self._in_head = False
        self._in_body = False
        self._complete = False
        self._bytes = 0
        """Bytes of the current message so far, head and framing included."""
        self._piece = 0
        """Bytes of the piece that is being parsed."""
        self._discards = False
        """Whether everything that comes is discarded until the connection is closed."""
        self._offers = False
        """Whether the head that was just parsed offers another protocol."""

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        if self.client is None and is_unix(transport):
            self.client = UNIX_PEER
        self._guard.await_head(self)
        self._guard.evict(self, len(self.connections))

    def connection_lost(self, exc: Exception | None) -> None:
        self._guard.forget(self)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._discards:
            return
        guard, limits = self._guard, self._guard.limits
        # Before this piece is counted: uvicorn stops reading until the app has consumed what came.
        if self._bytes > limits.message_bytes and (
            not self.has_responded or self._bytes > limits.discard_bytes
        ):
            guard.close(self, "too_large")
            return
        self._piece = len(data)
        self._bytes += self._piece
        self._unset_keepalive_if_required()
        self._feed(data)
        if self._in_body:
            guard.await_body(self)
        elif self._in_head:
            if self._bytes > limits.head_bytes:
                guard.close(self, "too_large")
            else:
                guard.await_head(self)
        elif (
            self._complete
        ):  # the next piece begins a new message; until then uvicorn's keep-alive timer runs
            self._bytes = 0
            self._complete = False
            guard.await_nothing(self)

    def on_message_begin(self) -> None:
        self._in_head = True
        if (
            self._complete
        ):  # in this same piece, whose share of the new message is unknown and counts as none
            self._bytes = 0
            self._complete = False
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._in_head = False
        if (
            self._piece + self._bytes > self._guard.limits.head_bytes
            and self._head_size() > self._guard.limits.head_bytes
        ):
            self._guard.close(self, "too_large")
            return
        if len(self.pipeline) >= self._guard.limits.pipelined:
            if not self.transport.is_closing():  # the rest of this piece is still parsed
                self._guard.close(self, "too_many")
            return
        if self.parser.should_upgrade():
            self._offers = True
            return
        super().on_headers_complete()
        self._in_body = True
        self.headers = []  # trailers, which are no headers of the request

    def _feed(self, data: bytes) -> None:
        """Parse a piece; replaces uvicorn's loop around the parser."""
        while True:
            try:
                self.parser.feed_data(data)
            except httptools.HttpParserUpgrade as offer:
                if not self._offers:
                    return  # the connection is being closed
                self._offers = False
                if (method := self.parser.get_method()) == b"CONNECT":
                    self._refuse("this is no proxy: CONNECT is not supported")
                    return
                data = self._head_without_offer(method) + data[offer.args[0] :]
                self.parser = httptools.HttpRequestParser(self)
                self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn does
            except httptools.HttpParserError as error:
                self._refuse(_describe(error))
                return
            else:
                return

    def _head_without_offer(self, method: bytes) -> bytes:
        """Return the head that was just parsed without its `Upgrade` headers."""
        lines = [b"%s %s HTTP/%s" % (method, self.url, self.parser.get_http_version().encode())]
        lines += [b"%s: %s" % header for header in self.headers if header[0] != b"upgrade"]
        return b"\r\n".join((*lines, b"", b""))

    def _refuse(self, message: str) -> None:
        """Respond with 400, close, and discard what follows."""
        cycle, is_own = self._last_cycle, self._in_body
        self._discards = True
        self._in_head = self._in_body = self._complete = False
        if self.transport.is_closing():
            return
        self._guard.count(self, "malformed")
        if cycle is not None and not is_own and not cycle.response_complete:
            cycle.keep_alive = False  # earlier requests get their responses, and nothing comes after
            return
        if cycle is not None and is_own:
            cycle.disconnected = True  # its app may wait for the rest of the body
            if cycle.response_started or self.pipeline:
                self.transport.close()  # a second response would be taken for another request's
                return
        self.transport.write(malformed_response(message, self.server_state.default_headers))
        self.transport.close()

    def on_message_complete(self) -> None:
        if self._offers:
            return  # httptools ends the message at its head; it is parsed again
        self._in_body = False
        self._complete = True
        super().on_message_complete()

    @property
    def has_responded(self) -> bool:
        """Whether the response to the last request is complete."""
        cycle = self._last_cycle
        return cycle is not None and cycle.response_complete

    @property
    def _last_cycle(self) -> RequestResponseCycle | None:
        return self.cycle  # None at first, which uvicorn's type does not say

    def _head_size(self) -> int:
        return len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)


def _describe(error: httptools.HttpParserError) -> str:
    """Return what is wrong with a request, in the parser's own words where it has any."""
    if isinstance(error, httptools.HttpParserCallbackError):
        return "the target of the request is not a URL"
    if "PRI" in str(error):
        return "HTTP/2 is not supported: use HTTP/1.1"
    return f"this is not valid HTTP/1.1: {error}"
