"""The interface of message brokers for the handler `publish`, and what their implementations share.

`broker_nats`, `broker_redis` and `broker_kafka` implement it. Each needs an extra, so the handler
imports only the one that is configured.
"""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from ssl import SSLContext
from typing import Any, Generic, Protocol, TypeVar

Connection = TypeVar("Connection")
_MAX_EXCERPT = 200


@dataclass(frozen=True, slots=True)
class Message:
    """A message. `id` is the same on every attempt: brokers or consumers deduplicate by it."""

    to: str
    id: str
    key: str
    body: bytes = field(repr=False)
    attributes: Mapping[str, str] = field(default_factory=dict)
    """CloudEvents attributes by name; empty if not configured."""


class BrokerError(Exception):
    """Publishing failed, but may work once something is repaired. The message says what."""


class BrokerUnreachableError(BrokerError):
    """The broker does not answer. This may pass."""


class MessageRefusedError(Exception):
    """The broker will never accept this message. The text says why."""


class Broker(Protocol):
    """A client of one broker, which connects when first used."""

    async def publish(self, message: Message) -> Mapping[str, Any]:
        """Publish a message and return the broker's receipt, once it has acknowledged it.

        Raises BrokerError or MessageRefusedError. After cancellation nothing more is sent, except
        what the operating system already holds.
        """

    async def check(self, to: str | None) -> None:
        """Connect, and check that `to` exists (None: not known yet). Raises BrokerError."""

    async def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Access:
    """The address of a broker, credentials and limits."""

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
        """Less than the whole timeout, so that a failure to connect is reported as such."""
        return self.answer_seconds * 0.8


def excerpt(error: object) -> str:
    """Return the message of an error on one line, short enough for a reason."""
    if isinstance(error, TimeoutError):
        return "no answer in time"
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= _MAX_EXCERPT else f"{text[: _MAX_EXCERPT - 1]}…"


class SharedConnection(Generic[Connection]):
    """One shared connection, made when first needed and again after it was dropped.

    It is made in its own task: a caller that is cancelled affects neither other callers nor the
    connection.
    """

    def __init__(
        self,
        connect: Callable[[], Coroutine[Any, Any, Connection]],
        disconnect: Callable[[Connection], Awaitable[None]],
    ) -> None:
        self._connect = connect
        self._disconnect = disconnect
        self._connecting: asyncio.Task[Connection] | None = None
        self._disconnecting: set[asyncio.Task[None]] = set()
        self._is_closed = False

    async def get(self) -> Connection:
        if self._is_closed:
            raise BrokerUnreachableError("the handler is closed")
        if self._connecting is None:
            self._connecting = asyncio.create_task(self._connect())
            self._connecting.add_done_callback(self._forget_failure)
        return await asyncio.shield(self._connecting)

    def drop(self, connection: Connection) -> None:
        """Give up a connection that failed; the next caller gets a new one."""
        if self._current_connection() is not connection:
            return  # it was dropped before
        self._connecting = None
        task = asyncio.create_task(self._disconnect_quietly(connection))
        self._disconnecting.add(task)
        task.add_done_callback(self._disconnecting.discard)

    async def close(self) -> None:
        self._is_closed = True
        if self._connecting is not None and not self._connecting.done():
            self._connecting.cancel()
            await asyncio.wait({self._connecting})
        if (connection := self._current_connection()) is not None:
            self.drop(connection)
        if self._disconnecting:
            await asyncio.wait(self._disconnecting)

    def _current_connection(self) -> Connection | None:
        task = self._connecting
        if task is None or not task.done() or task.cancelled() or task.exception():
            return None
        return task.result()

    async def _disconnect_quietly(self, connection: Connection) -> None:
        with suppress(Exception):  # it is given up anyway
            await self._disconnect(connection)

    def _forget_failure(self, task: asyncio.Task[Connection]) -> None:
        """Let the next caller connect anew. An exception that is read is not logged by asyncio."""
        if (task.cancelled() or task.exception()) and self._connecting is task:
            self._connecting = None
