"""The handler `publish` with real brokers: NATS JetStream, Redis, and a mock of Kafka."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import nats as nats_client
import pytest
from aiokafka import AIOKafkaConsumer
from nats.js.errors import NotFoundError
from redis.asyncio import Redis

from handlers.publish import Publish, PublishConfig
from receiver.handler import Done, Reject, Retry, SettledRun
from tests.support import brokers
from tests.support.patience import PATIENCE_SECONDS

BROKERS = ["nats", "redis", "kafka"]
ContextOf = Callable[..., Any]


@dataclass(frozen=True)
class Stand:
    """A running broker, and how to read its messages as (id, document)."""

    kind: str
    url: str
    server: Any
    read: Callable[[], Awaitable[list[tuple[str, dict[str, Any]]]]]

    def handler(self, **options: Any) -> Publish:
        return Publish(PublishConfig.model_validate({"url": self.url, "answer_seconds": 5, **options}))


async def _nats_messages(url: str) -> list[tuple[str, dict[str, Any]]]:
    client = await nats_client.connect(url)
    stream = client.jetstream()
    found = []
    info = await stream.stream_info("FLORA")
    for sequence in range(info.state.first_seq, info.state.last_seq + 1):
        message = await stream.get_msg("FLORA", sequence)
        assert message.headers
        assert message.data
        found.append((message.headers["Nats-Msg-Id"], json.loads(message.data)))
    await client.close()
    return found


async def _make_stream(url: str, **more: Any) -> None:
    client = await nats_client.connect(url)
    await client.jetstream().add_stream(name="FLORA", subjects=["flora.>"], **more)
    await client.close()


async def _redis_messages(url: str) -> list[tuple[str, dict[str, Any]]]:
    async with Redis.from_url(url) as client:
        entries: Any = await client.xrange("flora.runs")
    return [(fields[b"idempotency_key"].decode(), json.loads(fields[b"data"])) for _, fields in entries]


async def _kafka_messages(hosts: str) -> list[tuple[str, dict[str, Any]]]:
    consumer = AIOKafkaConsumer("flora.runs", bootstrap_servers=hosts, auto_offset_reset="earliest")
    await consumer.start()
    found = []
    try:
        ends = await consumer.end_offsets(consumer.assignment())
        for partition, end in ends.items():
            for _ in range(end):
                message = await consumer.getone(partition)
                found.append((dict(message.headers)["idempotency-key"].decode(), json.loads(message.value)))
                assert message.key == found[-1][1]["run_id"].encode()
    finally:
        await consumer.stop()
    return found


@pytest.fixture(scope="module")
def servers() -> Iterator[dict[str, Any]]:
    """One server of each kind, for all tests that leave it unchanged."""
    with brokers.nats() as nats, brokers.redis() as redis, brokers.kafka() as kafka:
        yield {"nats": nats, "redis": redis, "kafka": kafka}


@pytest.fixture(params=BROKERS)
async def stand(request: pytest.FixtureRequest, servers: dict[str, Any]) -> AsyncIterator[Stand]:
    kind, server = request.param, servers[request.param]
    if kind == "nats":
        url = f"nats://{server.address}"
        session = await nats_client.connect(url)
        with contextlib.suppress(NotFoundError):
            await session.jetstream().delete_stream("FLORA")
        await session.close()
        await _make_stream(url)
        yield Stand(kind, url, server, lambda: _nats_messages(url))
    elif kind == "redis":
        url = f"redis://{server.address}"
        async with Redis.from_url(url) as client:
            await client.flushall()
        yield Stand(kind, url, server, lambda: _redis_messages(url))
    else:
        yield Stand(kind, f"kafka://{server.hosts}", server, lambda: _kafka_messages(server.hosts))


async def test_each_run_is_one_message(stand: Stand, run: SettledRun, context_of: ContextOf) -> None:
    """Acknowledged before it is done; its id is the idempotency key, its body the run document."""
    handler = stand.handler()
    runs = [replace(run, run_id=f"run_{stand.kind}_{n}") for n in range(20)]
    answers = await asyncio.gather(*(handler.handle(each, context_of(each.run_id)) for each in runs))
    assert {type(answer) for answer in answers} == {Done}
    found = [(key, document) for key, document in await stand.read() if f"run_{stand.kind}_" in key]
    assert sorted(key for key, _ in found) == sorted(f"{each.run_id}:test:settled:0" for each in runs)
    assert all(
        document["idempotency_key"] == key and document["status"] == "completed" for key, document in found
    )
    await handler.check()
    await handler.close()


async def test_a_repeated_message_is_stored_once_where_the_broker_deduplicates(
    stand: Stand, run: SettledRun, context_of: ContextOf
) -> None:
    """As after a crash before the result was recorded: NATS and Redis keep one message."""
    run = replace(run, run_id=f"run_again_{stand.kind}")
    results = []
    for _ in range(2):
        handler = stand.handler()
        answer = await handler.handle(run, context_of(run.run_id))
        assert isinstance(answer, Done)
        results.append(answer.result)
        await handler.close()
    found = [key for key, _ in await stand.read() if key.startswith(run.run_id)]
    assert found == [f"{run.run_id}:test:settled:0"] * (2 if stand.kind == "kafka" else 1)
    if stand.kind != "kafka":
        assert [result["duplicate"] for result in results] == [False, True]


@pytest.mark.parametrize("kind", ["nats", "redis"])
async def test_a_broker_comes_back(kind: str, run: SettledRun, context_of: ContextOf) -> None:
    """While it is away, each attempt ends in time; then the handler works, without duplicates."""
    with getattr(brokers, kind)() as server:
        url = f"{kind}://{server.address}"
        if kind == "nats":
            await _make_stream(url)
        handler = Publish(PublishConfig(url=url, answer_seconds=3))
        assert isinstance(await handler.handle(run, context_of()), Done)
        server.kill()
        away = await handler.handle(replace(run, run_id="run_2"), context_of("run_2"))
        assert isinstance(away, Retry)
        assert "cannot be reached" in away.reason or "closed the connection" in away.reason
        server.start()
        assert isinstance(await _until_done(handler, run, context_of), Done)
        assert isinstance(await handler.handle(replace(run, run_id="run_2"), context_of("run_2")), Done)
        read = _nats_messages if kind == "nats" else _redis_messages
        assert [key for key, _ in await read(url)] == ["run_1:test:settled:0", "run_2:test:settled:0"]
        await handler.close()


async def _until_done(handler: Publish, run: SettledRun, context_of: ContextOf) -> Any:
    """Retry as the dispatcher does: JetStream takes a moment to recover its streams."""
    async with asyncio.timeout(PATIENCE_SECONDS):
        while not isinstance(answer := await handler.handle(run, context_of()), Done):
            pass
    return answer


@pytest.mark.parametrize("kind", BROKERS)
async def test_a_frozen_broker_is_a_retry_within_the_time(
    kind: str, run: SettledRun, context_of: ContextOf
) -> None:
    """It responds to nothing; thawed, it is used again, and what it accepted is known."""
    with getattr(brokers, kind)() as server:
        url = f"kafka://{server.hosts}" if kind == "kafka" else f"{kind}://{server.address}"
        if kind == "nats":
            await _make_stream(url)
        handler = Publish(PublishConfig(url=url, answer_seconds=20))
        assert isinstance(await handler.handle(run, context_of()), Done)
        impatient = Publish(PublishConfig(url=url, answer_seconds=3))
        assert isinstance(await impatient.handle(run, context_of()), Done)
        server.freeze()
        try:
            async with asyncio.timeout(PATIENCE_SECONDS):
                answer = await impatient.handle(replace(run, run_id="run_2"), context_of("run_2"))
            assert isinstance(answer, Retry)
        finally:
            server.thaw()
        assert isinstance(await _until_done(handler, replace(run, run_id="run_2"), context_of), Done)
        await impatient.close()
        await handler.close()


async def test_a_subject_without_a_stream_says_which_to_make(
    servers: dict[str, Any], run: SettledRun, context_of: ContextOf
) -> None:
    """The check and the first run name the command to run."""
    handler = Publish(
        PublishConfig(url=f"nats://{servers['nats'].address}", to="elsewhere.runs", answer_seconds=3)
    )
    answer = await handler.handle(run, context_of())
    assert isinstance(answer, Retry)
    assert "nats stream add FLORA --subjects 'elsewhere.runs'" in answer.reason
    with pytest.raises(Exception, match="nats stream add"):
        await handler.check()
    await handler.close()


async def test_what_the_stream_never_accepts_is_rejected(run: SettledRun, context_of: ContextOf) -> None:
    """Larger than the limit of server or stream: a retry cannot help."""
    large = replace(run, metadata={"text": "x" * 40_000})
    for settings, stream, words in (
        ("max_payload: 20000\n", {}, "max_payload"),
        ("", {"max_msg_size": 20_000}, "max-msg-size"),
    ):
        with brokers.nats(settings) as server:
            url = f"nats://{server.address}"
            await _make_stream(url, **stream)
            handler = Publish(PublishConfig(url=url, answer_seconds=3))
            answer = await handler.handle(large, context_of())
            assert isinstance(answer, Reject)
            assert words in answer.reason
            assert isinstance(await handler.handle(run, context_of()), Done)
            await handler.close()


@pytest.mark.parametrize("kind", ["nats", "redis"])
async def test_wrong_credentials_are_reported_and_never_shown(
    kind: str, run: SettledRun, context_of: ContextOf
) -> None:
    """A retry, since credentials can be corrected; the check reports an error."""
    with contextlib.ExitStack() as stack:
        if kind == "nats":
            server = stack.enter_context(
                brokers.nats('authorization { user: "u", password: "right-s3cret" }\n')
            )
        else:
            server = stack.enter_context(brokers.redis("--requirepass", "right-s3cret"))
        url = f"{kind}://{server.address}"
        user: dict[str, Any] = {"user": "u"} if kind == "nats" else {}
        wrong = Publish(
            PublishConfig.model_validate(
                {"url": url, **user, "password": "wrong-s3cret", "answer_seconds": 3}
            )
        )
        answer = await wrong.handle(run, context_of())
        assert isinstance(answer, Retry)
        assert "credentials" in answer.reason
        assert "s3cret" not in answer.reason
        with pytest.raises(Exception, match="credentials"):
            await wrong.check()
        await wrong.close()
        right = Publish(
            PublishConfig.model_validate(
                {"url": url, **user, "password": "right-s3cret", "answer_seconds": 3}
            )
        )
        if kind == "redis":
            assert isinstance(await right.handle(run, context_of()), Done)
        else:
            with pytest.raises(Exception, match="nats stream add"):
                await right.check()
        await right.close()


async def test_events_for_clouds_carry_their_attributes(
    servers: dict[str, Any], run: SettledRun, context_of: ContextOf
) -> None:
    """In binary mode, as `forward` has them: same source, same type, the idempotency key as id."""
    url = f"redis://{servers['redis'].address}"
    handler = Publish(PublishConfig(url=url, to="clouds", cloudevents=True, maxlen=10))
    assert isinstance(await handler.handle(run, context_of()), Done)
    async with Redis.from_url(url) as client:
        entries: Any = await client.xrange("clouds")
        await client.delete("clouds")
    [(_, fields)] = entries
    assert fields[b"ce_source"] == b"/flora-receiver"
    assert fields[b"ce_type"] == b"flora_receiver.run.settled"
    assert fields[b"ce_id"] == b"run_1:test:settled:0"
    assert fields[b"ce_time"].decode() == run.settled_at.isoformat().replace("+00:00", "Z")
    await handler.close()


async def test_a_key_that_is_no_stream_is_reported(servers: dict[str, Any]) -> None:
    url = f"redis://{servers['redis'].address}"
    async with Redis.from_url(url) as client:
        await client.set("taken", "x")
    handler = Publish(PublishConfig(url=url, to="taken"))
    with pytest.raises(Exception, match="not a stream"):
        await handler.check()
    await handler.close()


@pytest.mark.parametrize("kind", BROKERS)
async def test_a_cancelled_attempt_leaves_nothing_behind(
    kind: str, run: SettledRun, context_of: ContextOf
) -> None:
    """As at shutdown with a frozen broker: no task and no connection is left."""
    with getattr(brokers, kind)() as server:
        url = f"kafka://{server.hosts}" if kind == "kafka" else f"{kind}://{server.address}"
        if kind == "nats":
            await _make_stream(url)
        handler = Publish(PublishConfig(url=url, answer_seconds=2 * PATIENCE_SECONDS))
        assert isinstance(await handler.handle(run, context_of()), Done)
        server.freeze()
        try:
            attempt = asyncio.create_task(handler.handle(replace(run, run_id="run_2"), context_of("run_2")))
            await asyncio.wait({attempt}, timeout=0.2)
            attempt.cancel()
            async with asyncio.timeout(PATIENCE_SECONDS):
                with contextlib.suppress(asyncio.CancelledError):
                    await attempt
                await handler.close()
        finally:
            server.thaw()
    assert asyncio.all_tasks() == {asyncio.current_task()}
