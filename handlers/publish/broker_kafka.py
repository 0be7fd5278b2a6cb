"""Kafka for the handler `publish`. All in-sync replicas acknowledge; the key is the run's id.

Kafka does not deduplicate across attempts: consumers do, on the header `idempotency-key`. The
producer is idempotent, so what it repeats by itself within an attempt is written once.
"""

import asyncio
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from aiokafka import AIOKafkaProducer, conn, errors

from handlers.publish.broker import (
    Access,
    BrokerError,
    BrokerUnreachableError,
    Message,
    MessageRefusedError,
    SharedConnection,
    excerpt,
)

_CREDENTIAL_ERRORS = (
    errors.AuthenticationFailedError,
    errors.IllegalSaslStateError,
    errors.SaslAuthenticationFailed,
    errors.UnsupportedSaslMechanismError,
)
_ABANDON_SECONDS = 1.0
_MAX_REQUEST_BYTES = 64 * 1024 * 1024  # the broker decides what a topic accepts


class KafkaBroker:
    """Produces to a topic, in the partition of the run's id."""

    def __init__(self, access: Access) -> None:
        self._access = access
        self._producers: SharedConnection[Any] = SharedConnection(self._connect, self._abandon)
        protocol = "SSL" if access.tls else "PLAINTEXT"
        self._security: dict[str, Any] = {"security_protocol": protocol, "ssl_context": access.tls}
        if access.user is not None:
            self._security = {
                "security_protocol": f"SASL_{protocol}",
                "ssl_context": access.tls,
                "sasl_mechanism": access.sasl.upper(),
                "sasl_plain_username": access.user,
                "sasl_plain_password": access.password,
            }

    async def publish(self, message: Message) -> Mapping[str, Any]:
        headers = [("idempotency-key", message.id.encode()), ("content-type", b"application/json")]
        headers += [(f"ce_{name}", value.encode()) for name, value in message.attributes.items()]
        producer = await self._producers.get()
        try:
            place = await producer.send_and_wait(
                message.to, message.body, key=message.key.encode(), headers=headers
            )
        except (errors.MessageSizeTooLargeError, errors.RecordListTooLargeError) as error:
            raise MessageRefusedError(
                f"the message of {len(message.body)} bytes is too large for topic {message.to!r}: "
                "raise its max.message.bytes"
            ) from error
        except errors.InvalidTopicError as error:
            raise MessageRefusedError(f"Kafka does not accept the topic name {message.to!r}") from error
        except BaseException as error:  # also after cancellation: a producer never gives up a message
            self._producers.drop(producer)
            if isinstance(error, errors.KafkaError | OSError):
                raise self._to_broker_error(error, message.to) from error
            raise
        return {"topic": place.topic, "partition": place.partition, "offset": place.offset}

    async def check(self, to: str | None) -> None:
        producer = await self._producers.get()
        if to is None:
            return
        try:
            cluster = (
                await producer.client.fetch_all_metadata()
            )  # of all topics: a request for one may create it
        except errors.KafkaError as error:
            self._producers.drop(producer)
            raise self._to_broker_error(error, to) from error
        if to not in cluster.topics(exclude_internal_topics=False):
            raise BrokerUnreachableError(
                _no_topic(to)
            )  # a warning: many clusters create topics on first use

    async def close(self) -> None:
        await self._producers.close()

    async def _connect(self) -> Any:
        producer = AIOKafkaProducer(
            bootstrap_servers=[f"{host}:{port}" for host, port in self._access.hosts],
            client_id="flora-receiver",
            acks="all",
            enable_idempotence=True,
            max_request_size=_MAX_REQUEST_BYTES,
            request_timeout_ms=self._request_ms,
            **self._security,
        )
        try:
            async with asyncio.timeout(self._access.connect_seconds):
                await producer.start()
        except BaseException as error:
            await self._abandon(producer)
            if isinstance(error, errors.KafkaConnectionError):
                raise await self._diagnose() from error
            if isinstance(error, errors.KafkaError | OSError) and not isinstance(error, TimeoutError):
                raise self._to_broker_error(error, None) from error
            if isinstance(error, TimeoutError):
                raise BrokerUnreachableError(
                    f"{self._access.url} cannot be reached: {excerpt(error)}"
                ) from error
            raise
        return producer

    @property
    def _request_ms(self) -> int:
        """Timeout of one request: half of the whole, so that a lost one can be repeated."""
        return max(1, round(self._access.answer_seconds * 500))

    async def _diagnose(self) -> BrokerError:
        """Connect to the first broker to find out what failed: aiokafka does not report it."""
        (host, port), *_ = self._access.hosts
        options = {**self._security, "request_timeout_ms": self._request_ms}
        try:
            connection = await conn.create_conn(host, port, **options)
        except (errors.KafkaError, OSError) as error:
            return self._to_broker_error(error, None)
        connection.close()
        return BrokerUnreachableError(
            f"{self._access.url} cannot be reached: it did not respond to the first request"
        )

    async def _abandon(self, producer: Any) -> None:
        """Stop a producer without delivering its messages.

        Its own `stop` waits for ever for an unreachable broker, since an idempotent producer of
        aiokafka never lets a message expire. So its sender and connections are closed and its
        messages failed first.
        """
        sender, queue = producer._sender, producer._message_accumulator  # noqa: SLF001  # private
        # The sender ends before the connections, or it would open new ones for unsent messages.
        ending = asyncio.ensure_future(sender.close())
        await asyncio.sleep(0)
        with suppress(Exception):
            await producer.client.close()
        queue.fail_all(errors.KafkaError("given up"))
        await asyncio.wait({ending}, timeout=_ABANDON_SECONDS)
        if not ending.done():
            ending.cancel()
        with suppress(Exception):
            async with asyncio.timeout(_ABANDON_SECONDS):
                await producer.stop()

    def _to_broker_error(self, error: Exception, topic: str | None) -> BrokerError:
        url = self._access.url
        if isinstance(error, _CREDENTIAL_ERRORS):
            return BrokerError(f"{url} refuses our credentials: {excerpt(error)}")
        if isinstance(error, errors.UnknownTopicOrPartitionError) and topic:
            return BrokerError(_no_topic(topic))
        if isinstance(error, errors.TopicAuthorizationFailedError | errors.ClusterAuthorizationFailedError):
            return BrokerError(
                f"{url} does not allow it: {excerpt(error)}; the user needs Write, IdempotentWrite"
            )
        if isinstance(error, errors.KafkaConnectionError | OSError):
            return BrokerUnreachableError(f"{url} cannot be reached: {excerpt(error)}")
        return BrokerError(f"{url} did not accept it: {excerpt(error)}")


def _no_topic(topic: str) -> str:
    return (
        f"the topic {topic!r} does not exist: kafka-topics.sh --create --topic {topic}, "
        "unless the cluster creates topics itself"
    )
