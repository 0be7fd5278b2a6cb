"""NATS JetStream for the handler `publish`: acknowledged by the stream, deduplicated by `Nats-Msg-Id` in its window."""

import asyncio
import base64
import binascii
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from nats.aio.client import Client, JWTCallback
from nats.errors import Error, NoServersError
from nats.js.api import PubAck
from nats.js.errors import APIError, NoStreamResponseError, NotFoundError

from handlers.publish.broker import (
    Access,
    BrokerError,
    BrokerUnreachableError,
    Link,
    Message,
    MessageRefusedError,
    excerpt,
)

_TOO_LARGE = {10054, 10097}  # JetStream's codes: the message, or its headers, exceed what the stream takes
_HEADER_ROOM = 32  # the version line and the blank line around headers
_BLOCK = "-----BEGIN {0}-----\\s+(\\S+)\\s+-+END {0}-+"


@dataclass(frozen=True, slots=True, eq=False)
class _Session:
    """A connection, and a future that tells why it is of no use any more."""

    client: Client
    trouble: asyncio.Future[str]


class NatsBroker:
    """Publishes to a subject that a stream listens to."""

    def __init__(self, access: Access) -> None:
        self._access = access
        self._signer = _signer(access.credentials) if access.credentials else None
        self._link: Link[_Session] = Link(self._connect, self._disconnect)

    async def publish(self, message: Message) -> Mapping[str, Any]:
        headers = {"Nats-Msg-Id": _escaped(message.id), "Content-Type": "application/json"}
        headers |= {f"ce-{name}": _escaped(value) for name, value in message.attributes.items()}
        size = len(message.body) + _HEADER_ROOM + sum(len(name) + len(value) + 4 for name, value in headers.items())
        session = await self._session()
        if size > session.client.max_payload:
            raise MessageRefusedError(
                f"the message has {size} bytes, {self._access.url} takes {session.client.max_payload}: raise its max_payload"
            )
        try:
            receipt = await self._acknowledged(session, message, headers)
        except NoStreamResponseError as error:
            raise BrokerError(_no_stream(message.to)) from error
        except APIError as error:
            if error.err_code in _TOO_LARGE:
                raise MessageRefusedError(
                    f"the stream takes no message of {size} bytes ({excerpt(error.description)}): raise its --max-msg-size"
                ) from error
            raise BrokerError(f"JetStream did not take it: {excerpt(error.description)}") from error
        except (ValueError, KeyError, TypeError) as error:
            raise BrokerError(f"something other than JetStream answers on the subject {message.to!r}") from error
        except BaseException as error:  # also when the wait was cancelled: what the connection holds is not known
            self._link.drop(session)
            if isinstance(error, Error | OSError):
                raise BrokerUnreachableError(f"{self._access.url}: {excerpt(error)}") from error
            raise
        return {"stream": receipt.stream, "sequence": receipt.seq, "duplicate": bool(receipt.duplicate)}

    async def _acknowledged(self, session: _Session, message: Message, headers: dict[str, str]) -> PubAck:
        """Wait for the stream's word, or for the end of the connection: nats-py would wait on over that."""
        stream = session.client.jetstream()
        asking = asyncio.ensure_future(
            stream.publish(message.to, message.body, timeout=self._access.answer_seconds, headers=headers)
        )
        waiting: set[asyncio.Future[Any]] = {asking, session.trouble}
        try:
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            if asking.done():
                return asking.result()
        finally:
            asking.cancel()
        raise BrokerUnreachableError(session.trouble.result())

    async def check(self, to: str | None) -> None:
        session = await self._session()
        if to is None:
            return
        try:
            await session.client.jetstream(timeout=self._access.answer_seconds / 2).find_stream_name_by_subject(to)
        except (NotFoundError, NoStreamResponseError) as error:
            raise BrokerError(_no_stream(to)) from error
        except APIError as error:
            raise BrokerError(f"JetStream of {self._access.url}: {excerpt(error.description)}") from error
        except Error:
            return  # users who may publish need not be allowed to ask about streams

    async def close(self) -> None:
        await self._link.close()

    async def _session(self) -> _Session:
        session = await self._link.get()
        if session.client.is_connected and not session.trouble.done():
            return session
        self._link.drop(session)
        return await self._link.get()

    async def _connect(self) -> _Session:
        """Connect without the client's own reconnecting: it would send on, behind our back, what we gave up waiting for."""
        access, client = self._access, Client()
        trouble: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        seen: list[Exception] = []

        async def erred(error: Exception) -> None:
            seen.append(error)
            if "permissions violation" in str(error).lower() and not trouble.done():
                trouble.set_result(f"{access.url} does not allow it: {excerpt(error)}")

        async def closed() -> None:
            if not trouble.done():
                trouble.set_result(f"{access.url} closed the connection: {excerpt(seen[-1] if seen else 'no reason')}")

        def sealed(secret: str | None) -> Callable[[], str] | None:
            return None if secret is None else lambda: _over_tls(client, access, secret)

        signer = self._signer
        jwt: JWTCallback | None = None if signer is None else lambda: _over_tls(client, access, signer.jwt).encode()
        try:
            async with asyncio.timeout(access.connect_seconds):
                await client.connect(
                    servers=[f"nats://{host}:{port}" for host, port in access.hosts],
                    name="flora-receiver",
                    allow_reconnect=False,
                    max_reconnect_attempts=1,
                    reconnect_time_wait=0,
                    connect_timeout=max(1, round(access.connect_seconds / 2)),
                    error_cb=erred,
                    closed_cb=closed,
                    tls=access.tls,
                    user=sealed(access.user),
                    password=sealed(access.password),
                    token=sealed(access.token),
                    user_jwt_cb=jwt,
                    signature_cb=None if signer is None else signer.sign,
                )
            _over_tls(client, access, "")
        except BaseException as error:
            with suppress(Exception):
                await client.close()
            if not isinstance(error, Error | OSError | TimeoutError):
                raise
            cause = seen[0] if isinstance(error, NoServersError) and seen else error
            if "authorization" in str(cause).lower() or "authentication" in str(cause).lower():
                raise BrokerError(f"{access.url} refuses our credentials: {excerpt(cause)}") from error
            raise BrokerUnreachableError(f"{access.url} cannot be reached: {excerpt(cause)}") from error
        return _Session(client, trouble)

    async def _disconnect(self, session: _Session) -> None:
        async with asyncio.timeout(1):  # a frozen server takes nothing more; the socket is closed with its owner
            await session.client.close()


def _over_tls(client: Client, access: Access, secret: str) -> str:
    """Return a secret only over TLS where the URL says tls://: nats-py would go on in the clear if the server offers none."""
    if access.tls is not None and not client._server_info.get("tls_required"):  # noqa: SLF001 - it is told nowhere else
        raise BrokerError(f"{access.url} offers no TLS: somebody is in between, or it must be nats://")
    return secret


def _no_stream(subject: str) -> str:
    return (
        f"no stream takes the subject {subject!r} (or JetStream is off, or has no leader now): "
        f"nats stream add FLORA --subjects '{subject}' --dupe-window 1h --defaults"
    )


def _escaped(value: str) -> str:
    return quote(value, safe="!#$&'()*+,-./:;<=>?@[]^_`{|}~")


@dataclass(frozen=True, slots=True)
class _Signer:
    """The two halves of a credentials file: who we are, and the key that proves it."""

    jwt: str
    key: Ed25519PrivateKey

    def sign(self, nonce: str) -> bytes:
        return base64.b64encode(self.key.sign(nonce.encode()))


def _signer(text: str) -> _Signer:
    """Read a `.creds` file, as `nats` and `nsc` write them; ValueError without a word of its content."""
    jwt = re.search(_BLOCK.format("NATS USER JWT"), text)
    seed = re.search(_BLOCK.format("USER NKEY SEED"), text)
    if not jwt or not seed:
        raise ValueError("credentials must be the content of a .creds file: give it as file:/path/to/user.creds")
    try:
        raw = base64.b32decode(seed[1] + "=" * (-len(seed[1]) % 8))
        key = Ed25519PrivateKey.from_private_bytes(raw[2:34])  # two bytes say what it is, two at the end are a checksum
    except (binascii.Error, ValueError):
        raise ValueError("credentials hold a broken seed") from None
    return _Signer(jwt[1], key)
