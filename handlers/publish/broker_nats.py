"""NATS JetStream for the handler `publish`.

The stream acknowledges each message, and deduplicates by `Nats-Msg-Id` within its duplicate window.
"""

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
    Message,
    MessageRefusedError,
    SharedConnection,
    excerpt,
)

_TOO_LARGE = {
    10054,
    10097,
}  # JetStream's codes: the message, or its headers, exceed the limit of the stream
_HEADER_OVERHEAD = 32  # bytes of the version line and the blank line around headers
_PEM_BLOCK = "-----BEGIN {0}-----\\s+(\\S+)\\s+-+END {0}-+"


@dataclass(frozen=True, slots=True, eq=False)
class _Session:
    """A connection; `failure` is set, with the reason, when it cannot be used any more."""

    client: Client
    failure: asyncio.Future[str]


class NatsBroker:
    """Publishes to a subject that a stream captures."""

    def __init__(self, access: Access) -> None:
        self._access = access
        self._signer = _parse_credentials(access.credentials) if access.credentials else None
        self._sessions: SharedConnection[_Session] = SharedConnection(self._connect, self._disconnect)

    async def publish(self, message: Message) -> Mapping[str, Any]:
        headers = {"Nats-Msg-Id": _escape(message.id), "Content-Type": "application/json"}
        headers |= {f"ce-{name}": _escape(value) for name, value in message.attributes.items()}
        size = (
            len(message.body)
            + _HEADER_OVERHEAD
            + sum(len(name) + len(value) + 4 for name, value in headers.items())
        )
        session = await self._session()
        if size > session.client.max_payload:
            raise MessageRefusedError(
                f"the message has {size} bytes, more than {self._access.url} accepts: "
                f"raise its max_payload, {session.client.max_payload}"
            )
        try:
            receipt = await self._publish(session, message, headers)
        except NoStreamResponseError as error:
            raise BrokerError(_no_stream(message.to)) from error
        except APIError as error:
            if error.err_code in _TOO_LARGE:
                raise MessageRefusedError(
                    f"the stream accepts no message of {size} bytes: raise its --max-msg-size "
                    f"({excerpt(error.description)})"
                ) from error
            raise BrokerError(f"JetStream did not accept it: {excerpt(error.description)}") from error
        except (ValueError, KeyError, TypeError) as error:
            raise BrokerError(
                f"something other than JetStream responds on the subject {message.to!r}"
            ) from error
        except BaseException as error:  # also after cancellation: the connection may still hold the message
            self._sessions.drop(session)
            if isinstance(error, Error | OSError):
                raise BrokerUnreachableError(f"{self._access.url}: {excerpt(error)}") from error
            raise
        return {"stream": receipt.stream, "sequence": receipt.seq, "duplicate": bool(receipt.duplicate)}

    async def _publish(self, session: _Session, message: Message, headers: dict[str, str]) -> PubAck:
        """Publish and wait for the receipt, or for a lost connection, which nats-py would not."""
        stream = session.client.jetstream()
        publishing = asyncio.ensure_future(
            stream.publish(message.to, message.body, timeout=self._access.answer_seconds, headers=headers)
        )
        waiting: set[asyncio.Future[Any]] = {publishing, session.failure}
        try:
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            if publishing.done():
                return publishing.result()
        finally:
            publishing.cancel()
        raise BrokerUnreachableError(session.failure.result())

    async def check(self, to: str | None) -> None:
        session = await self._session()
        if to is None:
            return
        try:
            await session.client.jetstream(
                timeout=self._access.answer_seconds / 2
            ).find_stream_name_by_subject(to)
        except (NotFoundError, NoStreamResponseError) as error:
            raise BrokerError(_no_stream(to)) from error
        except APIError as error:
            raise BrokerError(f"JetStream of {self._access.url}: {excerpt(error.description)}") from error
        except Error:
            return  # a user who may publish need not have permission to look up streams

    async def close(self) -> None:
        await self._sessions.close()

    async def _session(self) -> _Session:
        session = await self._sessions.get()
        if session.client.is_connected and not session.failure.done():
            return session
        self._sessions.drop(session)
        return await self._sessions.get()

    async def _connect(self) -> _Session:
        """Connect. Reconnecting is off: the client would send messages that were given up."""
        access, client = self._access, Client()
        failure: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        errors: list[Exception] = []

        async def on_error(error: Exception) -> None:
            errors.append(error)
            if "permissions violation" in str(error).lower() and not failure.done():
                failure.set_result(f"{access.url} does not allow it: {excerpt(error)}")

        async def on_close() -> None:
            if not failure.done():
                reason = excerpt(errors[-1] if errors else "no reason")
                failure.set_result(f"{access.url} closed the connection: {reason}")

        def over_tls(secret: str | None) -> Callable[[], str] | None:
            return None if secret is None else lambda: _require_tls(client, access, secret)

        signer = self._signer
        jwt: JWTCallback | None = (
            None if signer is None else lambda: _require_tls(client, access, signer.jwt).encode()
        )
        try:
            async with asyncio.timeout(access.connect_seconds):
                await client.connect(
                    servers=[f"nats://{host}:{port}" for host, port in access.hosts],
                    name="flora-receiver",
                    allow_reconnect=False,
                    max_reconnect_attempts=1,
                    reconnect_time_wait=0,
                    connect_timeout=max(1, round(access.connect_seconds / 2)),
                    error_cb=on_error,
                    closed_cb=on_close,
                    tls=access.tls,
                    user=over_tls(access.user),
                    password=over_tls(access.password),
                    token=over_tls(access.token),
                    user_jwt_cb=jwt,
                    signature_cb=None if signer is None else signer.sign,
                )
            _require_tls(client, access, "")
        except BaseException as error:
            with suppress(Exception):
                await client.close()
            if not isinstance(error, Error | OSError | TimeoutError):
                raise
            cause = errors[0] if isinstance(error, NoServersError) and errors else error
            raise self._to_connect_error(cause) from error
        return _Session(client, failure)

    def _to_connect_error(self, cause: Exception) -> BrokerError:
        url, text = self._access.url, str(cause).lower()
        if "authorization" in text or "authentication" in text:
            return BrokerError(f"{url} refuses our credentials: {excerpt(cause)}")
        return BrokerUnreachableError(f"{url} cannot be reached: {excerpt(cause)}")

    async def _disconnect(self, session: _Session) -> None:
        async with asyncio.timeout(
            1
        ):  # a frozen server reads nothing more; its socket is closed with the client
            await session.client.close()


def _require_tls(client: Client, access: Access, secret: str) -> str:
    """Return a secret. BrokerError if TLS is configured but not in use, which nats-py ignores."""
    server = client._server_info  # noqa: SLF001  # not public
    if access.tls is not None and not server.get("tls_required"):
        raise BrokerError(
            f"{access.url} offers no TLS: use nats://, unless the connection is being intercepted"
        )
    return secret


def _no_stream(subject: str) -> str:
    return (
        f"no stream captures the subject {subject!r} (or JetStream is off, or has no leader now): "
        f"nats stream add FLORA --subjects '{subject}' --dupe-window 1h --defaults"
    )


def _escape(value: str) -> str:
    return quote(value, safe="!#$&'()*+,-./:;<=>?@[]^_`{|}~")


@dataclass(frozen=True, slots=True)
class _Signer:
    """The two parts of a credentials file: the user's JWT, and the key that signs for it."""

    jwt: str
    key: Ed25519PrivateKey

    def sign(self, nonce: str) -> bytes:
        return base64.b64encode(self.key.sign(nonce.encode()))


def _parse_credentials(text: str) -> _Signer:
    """Parse a `.creds` file, as `nats` and `nsc` write it. ValueError, without its content."""
    jwt = re.search(_PEM_BLOCK.format("NATS USER JWT"), text)
    seed = re.search(_PEM_BLOCK.format("USER NKEY SEED"), text)
    if not jwt or not seed:
        raise ValueError(
            "credentials must be the content of a .creds file: give it as file:/path/to/user.creds"
        )
    try:
        raw = base64.b32decode(seed[1] + "=" * (-len(seed[1]) % 8))
        key = Ed25519PrivateKey.from_private_bytes(raw[2:34])  # between its type, and a checksum
    except (binascii.Error, ValueError):
        raise ValueError("credentials contain an invalid seed") from None
    return _Signer(jwt[1], key)
