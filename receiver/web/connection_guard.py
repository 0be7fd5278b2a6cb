"""A listener that cannot be held hostage: uvicorn's httptools protocol with limits on bytes and time.

httptools parses three times as fast as h11, and uvicorn on it accepts a head of any size and waits for it for ever. Here a
connection is closed when a request's head exceeds `head_bytes` or takes longer than `head_seconds`, when its body takes
longer than `body_seconds`, when more comes although the message, framing included, exceeds `message_bytes`, or when more
requests come than may wait for answers. At the limit of open connections one gives way, so that honest callers are still
served: see `Guard.make_room`. What the app refused already (413) is read on and thrown away up to `discard_bytes`, so that
the answer is heard.
"""

import asyncio
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from operator import itemgetter
from typing import Any, Literal

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

_SWEEP_SECONDS = 0.5
_PROMPT_SECONDS = 1.0
"""An honest request comes at once, and whole: who is that young gives way last."""
Reason = Literal["slow_head", "slow_body", "too_large", "too_many", "crowded"]
"""Why a connection was closed."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What one connection may take. A head is the request line and headers; a message is head, body and framing."""

    head_bytes: int = 16 * 1024
    message_bytes: int = 96 * 1024
    discard_bytes: int = 2 * 1024 * 1024
    head_seconds: float = 10.0
    body_seconds: float = 10.0
    connections: int = 2000
    pipelined: int = 16
    """Requests of one connection that wait for the answer to an earlier one: a megabyte of short ones is a gigabyte here."""


class Guard:
    """The connections of one listener that owe us something, oldest first. `sweep` closes those that owe it too long."""

    def __init__(
        self,
        limits: Limits,
        *,
        closed: Callable[[Reason], None] = lambda _: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`closed` is told of every connection that the guard closes: for the metrics."""
        self.limits = limits
        self._told = closed
        self._clock = clock
        self.heads: dict[GuardedProtocol, float] = {}
        """Connections whose request line and headers are awaited, and since when."""
        self.bodies: dict[GuardedProtocol, float] = {}
        """Connections whose body is awaited, and since when."""
        self.idle: dict[GuardedProtocol, None] = {}
        """Connections that owe nothing, those that have been quiet for longest first. Some wait for their answer."""
        self.closed = 0
        """Connections closed by this guard."""

    def protocol(self, **given: Any) -> asyncio.Protocol:
        """Make the protocol of one connection; uvicorn's `http` setting."""
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

    def make_room(self, newcomer: "GuardedProtocol", connections: int) -> None:
        """Close one connection if there are more than there may be.

        First the oldest unfinished request; where none is older than an honest one takes, the one that has been idle for
        longest: else whoever sends one request on each of many connections would keep everybody out for as long as
        keep-alive lasts. The newcomer itself, if all others wait for their answers.
        """
        if connections <= self.limits.connections:
            return
        owing = [
            (since, connection)
            for connection, since in (*islice(self.heads.items(), 1), *islice(self.bodies.items(), 1))
            if connection is not newcomer
        ]
        since, oldest = min(owing, key=itemgetter(0), default=(math.inf, newcomer))
        if self._clock() - since <= _PROMPT_SECONDS:
            oldest = next((connection for connection in self.idle if connection.answered), oldest)
        self.close(oldest, "crowded")

    def sweep(self) -> None:
        """Close what has been owed for too long; both tables are in the order of their times."""
        now = self._clock()
        owed: tuple[tuple[dict[GuardedProtocol, float], float, Reason], ...] = (
            (self.heads, self.limits.head_seconds, "slow_head"),
            (self.bodies, self.limits.body_seconds, "slow_body"),
        )
        for waiting, seconds, reason in owed:
            while waiting:
                connection, since = next(iter(waiting.items()))
                if now - since <= seconds:
                    break
                self.close(connection, reason)

    def close(self, connection: "GuardedProtocol", reason: Reason) -> None:
        """Close at once, without an answer: whoever does this is not waiting for one."""
        self.forget(connection)
        self.closed += 1
        self._told(reason)
        if connection.transport is not None:
            connection.transport.abort()

    async def sweep_forever(self) -> None:
        """Sweep until cancelled."""
        while True:
            await asyncio.sleep(_SWEEP_SECONDS)
            self.sweep()


class GuardedProtocol(HttpToolsProtocol):
    """One connection. A request that arrives in one piece costs the guard a few comparisons."""

    def __init__(self, guard: Guard, **given: Any) -> None:
        super().__init__(**given)
        self._guard = guard
        self._in_head = False
        self._in_body = False
        self._complete = False
        self._bytes = 0
        """Received of the message at hand, head and framing included."""
        self._piece = 0
        self._deaf = False
        """Whether all that comes is thrown away, until the connection is closed."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._guard.await_head(self)
        self._guard.make_room(self, len(self.connections))

    def connection_lost(self, exc: Exception | None) -> None:
        self._guard.forget(self)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._deaf:
            return
        guard, limits = self._guard, self._guard.limits
        # Judged before this piece is counted: uvicorn stops reading until the app has seen what came, and may refuse it.
        if self._bytes > limits.message_bytes and (not self.answered or self._bytes > limits.discard_bytes):
            guard.close(self, "too_large")
            return
        self._piece = len(data)
        self._bytes += self._piece
        super().data_received(data)
        if self._in_body:
            guard.await_body(self)
        elif self._in_head:
            if self._bytes > limits.head_bytes:
                guard.close(self, "too_large")
            else:
                guard.await_head(self)
        elif self._complete:  # what comes next is a new message; until then uvicorn's keep-alive timer runs
            self._bytes = 0
            self._complete = False
            guard.await_nothing(self)

    def on_message_begin(self) -> None:
        self._in_head = True
        if self._complete:  # in this very piece: how much of it is the new message's is not known, so it counts nothing
            self._bytes = 0
            self._complete = False
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._in_head = False
        self._in_body = True
        if (
            self._piece + self._bytes > self._guard.limits.head_bytes
            and self._head_size() > self._guard.limits.head_bytes
        ):
            self._guard.close(self, "too_large")
            return
        if len(self.pipeline) >= self._guard.limits.pipelined:
            if not self.transport.is_closing():  # the rest of this very piece is still parsed
                self._guard.close(self, "too_many")
            return
        if self.parser.should_upgrade():
            self._refuse_upgrade()
            return
        super().on_headers_complete()

    def _refuse_upgrade(self) -> None:
        """Answer, and hear no more: httptools takes the body for the other protocol, and uvicorn for the next request.

        Behind a proxy that would be a request that nobody sent, whose answer another caller gets.
        """
        self._deaf = True
        self._in_body = False
        self._guard.forget(self)
        cycle: RequestResponseCycle | None = self.cycle
        if cycle is None or cycle.response_complete:
            self.send_400_response("There is no other protocol here: leave Upgrade out.")
        else:
            self.transport.abort()  # an earlier request's answer would come after this one

    def _unsupported_upgrade_warning(self) -> None:
        pass  # it is refused, and uvicorn's advice is of no use

    def on_message_complete(self) -> None:
        if self._deaf:
            return
        self._in_body = False
        self._complete = True
        super().on_message_complete()

    @property
    def answered(self) -> bool:
        """Whether the last request has its whole answer."""
        cycle: RequestResponseCycle | None = self.cycle  # uvicorn's type does not say that there is none at first
        return cycle is not None and cycle.response_complete

    def _head_size(self) -> int:
        return len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)
