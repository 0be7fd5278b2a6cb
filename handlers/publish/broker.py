"""What every message broker offers the handler `publish`: one message out, acknowledged, or an error that says why not.

`broker_nats`, `broker_redis` and `broker_kafka` implement it; each needs an extra, so only `publish` imports them, and late.
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from ssl import SSLContext
from typing import Any, Generic, Protocol, TypeVar

Connection = TypeVar("Connection")
_EXCERPT = 200


@dataclass(frozen=True, slots=True)
class Message:
    """What is published. `id` is the same on every attempt: what a broker, or who reads from it, dedupes on."""

    to: str
    id: str
    key: str
    body: bytes = field(repr=False)
    attributes: Mapping[str, str] = field(default_factory=dict)
    """CloudEvents attributes by their names; empty where none are wanted."""


class BrokerError(Exception):
    """Not now: somebody has to repair something, then the same message can go out. The text says what."""


class BrokerUnreachableError(BrokerError):
    """Nobody answers there now, which may pass by itself."""


class MessageRefusedError(Exception):
    """This message will never be taken. The text says why."""


class Broker(Protocol):
    """A connection to one broker, made when it is first needed."""

    async def publish(self, message: Message) -> Mapping[str, Any]:
        """Return, with what the broker said, once it has acknowledged the message.

        Raises BrokerError and MessageRefusedError. Whoever loses patience cancels: nothing is sent on behind its back
        but what the operating system already holds.
        """

    async def check(self, to: str | None) -> None:
        """Connect, and see whether there is a place called `to` (None: its name is not known yet). Raises BrokerError."""

    async def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Access:
    """Where a broker is and how to get in."""

    url: str
    hosts: tuple[tuple[str, int], ...]
    path: str
    answer_seconds: float
    tls: SSLContext | None = None
    ca_file: Path | None = None
    cert_file: Path | None = None
    key_file: Path | None = None
    user: str | None = None
    password: str | None = field(default=None, repr=False)
    token: str | None = field(default=None, repr=False)
    credentials: str | None = field(default=None, repr=False)
    sasl: str = "plain"
    maxlen: int | None = None
    remember_hours: int = 168

    @property
    def connect_seconds(self) -> float:
        """Less than the whole patience, so that who cannot connect says so."""
        return self.answer_seconds * 0.8


def excerpt(error: object) -> str:
    """Return what a broker or its library says, on one line and short enough for a reason."""
    if isinstance(error, TimeoutError):
        return "no answer in time"
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= _EXCERPT else f"{text[: _EXCERPT - 1]}…"


class Link(Generic[Connection]):
    """One connection that everybody shares: made when first asked for, again when it was dropped.

    It is made in a task of its own, so that who gives up waiting leaves neither the others alone nor half a connection.
    """

    def __init__(
        self,
        connect: Callable[[], Awaitable[Connection]],
        disconnect: Callable[[Connection], Awaitable[None]],
    ) -> None:
        self._connect = connect
        self._disconnect = disconnect
        self._making: asyncio.Task[Connection] | None = None
        self._leaving: set[asyncio.Task[None]] = set()
        self._closed = False

    async def get(self) -> Connection:
        if self._closed:
            raise BrokerUnreachableError("the handler is closed")
        if self._making is None:
            self._making = asyncio.create_task(self._made())
            self._making.add_done_callback(self._forget_failure)
        return await asyncio.shield(self._making)

    def drop(self, connection: Connection) -> None:
        """Trust this connection no more; the next one who asks gets a new one."""
        making = self._making
        if making is not None and making.done() and not making.cancelled() and not making.exception():
            if making.result() is not connection:
                return  # somebody else has dropped it already
            self._making = None
            leaving = asyncio.create_task(self._left(connection))
            self._leaving.add(leaving)
            leaving.add_done_callback(self._leaving.discard)

    async def close(self) -> None:
        self._closed = True
        if self._making is not None and not self._making.done():
            self._making.cancel()
            await asyncio.wait({self._making})
        if self._making is not None and not self._making.cancelled() and not self._making.exception():
            self.drop(self._making.result())
        if self._leaving:
            await asyncio.wait(self._leaving)

    async def _made(self) -> Connection:
        return await self._connect()

    async def _left(self, connection: Connection) -> None:
        with suppress(Exception):  # it is given up anyway
            await self._disconnect(connection)

    def _forget_failure(self, making: asyncio.Task[Connection]) -> None:
        """Let the next one try anew; looking at the exception also keeps asyncio from complaining that nobody did."""
        if (making.cancelled() or making.exception()) and self._making is making:
            self._making = None
