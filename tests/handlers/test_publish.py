"""The handler `publish` without a broker: options, names, and unreachable servers."""

import asyncio
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr, ValidationError

from handlers.publish import Publish, PublishConfig
from handlers.publish.broker import BrokerUnreachableError, SharedConnection
from receiver.handler import (
    Checks,
    Closes,
    Event,
    Handler,
    MissingExtraError,
    Reject,
    Retry,
    SettledRun,
    TargetUnreachableError,
    When,
)
from tests.support.brokers import free_port
from tests.support.patience import PATIENCE_SECONDS

BROKERS = ["nats", "redis", "kafka"]


def refusal(**options: Any) -> str:
    """Return the message with which options are refused."""
    with pytest.raises(ValidationError) as caught:
        PublishConfig.model_validate(options)
    return str(caught.value.errors(include_input=False, include_url=False)[0]["msg"])


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("amqp://host", "must start with nats://, tls://"),
        ("host:4222", "must start with"),
        ("nats://", "must list hosts"),
        ("nats://host:99999", "must list hosts"),
        ("nats://host:0", "must list hosts"),
        ("nats://a,,b", "must list hosts"),
        ("nats://ho st", "must list hosts"),
        ("nats://host/path", "must not have a path"),
        ("redis://a,b", "must be redis://host:port"),
        ("redis://a/name", "must be redis://host:port"),
        ("kafka://a?acks=0", "must end after the hosts"),
        ("redis://[::1", "is not a URL"),
    ],
)
def test_a_url_that_names_no_broker_is_refused(url: str, words: str) -> None:
    assert words in refusal(url=url)


def test_credentials_in_a_url_are_refused_without_showing_them() -> None:
    """URLs are in logs and reasons; secrets have their own options."""
    message = refusal(url="redis://:s3cret@host")
    assert "`password`" in message
    assert "s3cret" not in message


@pytest.mark.parametrize(
    ("to", "words"),
    [
        ("flora.{output_id}", "unknown field {output_id}"),
        ("flora.{}", "unknown field {}"),
        ("flora.{status.__class__}", "unknown field"),
        ("flora.{status:>9}", "takes no format"),
        ("flora.{status!r}", "takes no format"),
        ("flora.>", "must be words"),
        ("flora.*", "must be words"),
        ("flora..runs", "must be words"),
        (".flora", "must be words"),
        ("flora runs", "must be words"),
        ("flora\r\nPUB x", "must be words"),
        ("flora.{{x}}", "must be words"),
        ("flora.{status", "expected '}'"),
        ("", "must be words"),
        ("x" * 250, "at most 249"),
    ],
)
def test_a_name_that_no_broker_takes_is_refused(to: str, words: str) -> None:
    """At the start, not at the first run."""
    assert words in refusal(url="nats://host", to=to)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"url": "redis://h", "token": "t"}, "`token` is for nats only"),
        ({"url": "kafka://h", "maxlen": 5}, "`maxlen` is for redis only"),
        ({"url": "nats://h", "sasl": "plain"}, "`sasl` is for kafka only"),
        ({"url": "redis://h", "to": "flora.{run_id}"}, "with NATS only"),
        ({"url": "nats://h", "user": "u"}, "`user` needs `password`"),
        ({"url": "kafka://h", "password": "p"}, "`password` needs `user`"),
        ({"url": "nats://h", "user": "u", "password": "p", "token": "t"}, "use only one of"),
        ({"url": "tls://h", "key_file": __file__}, "`key_file` needs `cert_file`"),
        ({"url": "nats://h", "ca_file": __file__}, "need tls://"),
        ({"url": "tls://h", "ca_file": "/nowhere/ca.pem"}, "Path does not point to a file"),
        ({"url": "nats://h", "answer_seconds": 0}, "greater than 0"),
        ({"url": "nats://h", "topic": "x"}, "Extra inputs"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options: dict[str, Any], words: str) -> None:
    assert words in refusal(**options)


@pytest.mark.parametrize(
    "options",
    [
        {"url": "nats://a:1,b,[::1]:4222", "to": "flora.{workspace_id}.{run_id}"},
        {"url": "redis://host:6380/3", "password": "p", "maxlen": 1000, "remember_hours": 24},
        {"url": "rediss://host"},
        {"url": "kafka://a:9092,b:9092", "user": "u", "password": "p", "sasl": "scram-sha-512"},
        {"url": "kafka+ssl://host", "to": "flora-{event}-{status}"},
    ],
)
async def test_what_can_be_used_builds(options: dict[str, Any]) -> None:
    """Without connecting, which the first run does."""
    handler = Publish(PublishConfig.model_validate(options))
    assert isinstance(handler, Handler)
    assert isinstance(handler, Checks)
    assert isinstance(handler, Closes)
    assert (handler.on, handler.when) == ((Event.SETTLED,), When())
    await handler.close()


@pytest.mark.parametrize("name", ["ca_file", "cert_file"])
def test_a_file_without_a_certificate_is_refused_when_the_handler_is_built(
    tmp_path: Path, name: str
) -> None:
    (tmp_path / "empty.pem").write_text("nothing\n")
    with pytest.raises(ValueError, match=name):
        Publish(PublishConfig.model_validate({"url": "tls://host", name: tmp_path / "empty.pem"}))


def test_credentials_that_are_none_are_refused_without_showing_them() -> None:
    """A path in place of `file:/path` is the usual mistake."""
    with pytest.raises(ValueError, match=r"file:/path/to/user\.creds") as caught:
        Publish(PublishConfig(url="nats://host", credentials=SecretStr("/etc/secret.creds")))
    assert "secret.creds" not in str(caught.value).replace("user.creds", "")


def test_every_option_says_what_it_is() -> None:
    assert [name for name, field in PublishConfig.model_fields.items() if not field.description] == []


@pytest.mark.parametrize(("kind", "module"), [("nats", "nats"), ("redis", "redis"), ("kafka", "aiokafka")])
def test_a_missing_extra_says_what_to_install(
    kind: str, module: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The handler's own module is imported without any of them."""
    for name in [name for name in sys.modules if name.split(".")[0] == module]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delitem(sys.modules, f"handlers.publish.broker_{kind}", raising=False)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingExtraError, match=rf"pip install 'flora-receiver\[{kind}\]'"):
        Publish(PublishConfig(url=f"{kind}://host"))


@pytest.mark.parametrize("kind", BROKERS)
async def test_a_broker_that_is_down_is_a_retry(
    run: SettledRun, context_of: Callable[..., Any], kind: str, recwarn: pytest.WarningsRecorder
) -> None:
    """And a warning of the check, since this may pass. The reason names it."""
    handler = Publish(PublishConfig(url=f"{kind}://127.0.0.1:{free_port()}", answer_seconds=3))
    answer = await handler.handle(run, context_of())
    assert isinstance(answer, Retry)
    assert f"{kind}://127.0.0.1" in answer.reason
    assert "cannot be reached" in answer.reason
    with pytest.raises(TargetUnreachableError, match="cannot be reached"):
        await handler.check()
    await handler.close()
    assert isinstance(await handler.handle(run, context_of()), Retry)
    assert not recwarn.list


@pytest.mark.parametrize("kind", BROKERS)
async def test_a_silent_server_is_a_retry_within_the_time(
    run: SettledRun, context_of: Callable[..., Any], kind: str
) -> None:
    """Eight concurrent runs take as long as one: none queues behind a connection."""
    held: list[asyncio.StreamWriter] = []
    silent = await asyncio.start_server(lambda _, writer: held.append(writer), "127.0.0.1", 0)
    port = silent.sockets[0].getsockname()[1]
    handler = Publish(PublishConfig(url=f"{kind}://127.0.0.1:{port}", answer_seconds=2))
    async with asyncio.timeout(14):  # one after the other would take 16 s
        answers = await asyncio.gather(*(handler.handle(run, context_of(f"run_{n}")) for n in range(8)))
    assert {type(answer) for answer in answers} == {Retry}
    async with asyncio.timeout(PATIENCE_SECONDS):
        await handler.close()
    silent.close()
    for writer in held:
        writer.transport.abort()


@pytest.mark.parametrize("kind", BROKERS)
async def test_garbage_in_place_of_a_broker_is_a_retry(
    run: SettledRun, context_of: Callable[..., Any], kind: str
) -> None:
    """A web server on the port, for example."""

    async def answer_rubbish(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n")
        await writer.drain()
        writer.close()

    other = await asyncio.start_server(answer_rubbish, "127.0.0.1", 0)
    port = other.sockets[0].getsockname()[1]
    handler = Publish(PublishConfig(url=f"{kind}://127.0.0.1:{port}", answer_seconds=1))
    assert isinstance(await handler.handle(run, context_of()), Retry)
    await handler.close()
    other.close()


async def test_a_name_that_grows_too_long_is_rejected(
    run: SettledRun, context_of: Callable[..., Any]
) -> None:
    """Before anything is sent."""
    to = ".".join(["{technique_id}"] * 4)
    handler = Publish(PublishConfig(url="nats://127.0.0.1:1", to=to))
    answer = await handler.handle(replace(run, technique_id="x" * 500), context_of())
    assert isinstance(answer, Reject)
    assert "use fewer fields" in answer.reason
    await handler.close()


class Doors:
    """Connections that are counted."""

    def __init__(self) -> None:
        self.opened = 0
        self.closed: list[object] = []
        self.gate = asyncio.Event()

    async def open(self) -> object:
        self.opened += 1
        await self.gate.wait()
        return object()

    async def shut(self, connection: object) -> None:
        self.closed.append(connection)


async def test_a_link_is_made_once_for_all_who_wait() -> None:
    """A cancelled caller does not affect the others."""
    doors = Doors()
    link = SharedConnection(doors.open, doors.shut)
    waiting = [asyncio.create_task(link.get()) for _ in range(3)]
    await asyncio.wait(waiting, timeout=0)
    waiting[0].cancel()
    doors.gate.set()
    first, second = await asyncio.gather(*waiting[1:])
    assert first is second
    assert doors.opened == 1
    link.drop(first)
    link.drop(first)
    assert await link.get() is not first
    link.drop(first)
    await link.close()
    assert (doors.opened, len(doors.closed)) == (2, 2)


async def test_a_link_that_failed_is_tried_again() -> None:
    """A failure concerns only those who waited for it."""
    answers: list[object] = [OSError("down"), "connection"]
    left: list[object] = []

    async def connect() -> object:
        answer = answers.pop(0)
        if isinstance(answer, OSError):
            raise answer
        return answer

    async def disconnect(connection: object) -> None:
        left.append(connection)

    link = SharedConnection(connect, disconnect)
    with pytest.raises(OSError, match="down"):
        await link.get()
    assert await link.get() == "connection"
    await link.close()
    assert left == ["connection"]
    with pytest.raises(BrokerUnreachableError):
        await link.get()


async def test_a_link_that_is_being_made_is_not_left_behind() -> None:
    doors = Doors()
    link = SharedConnection(doors.open, doors.shut)
    waiting = asyncio.create_task(link.get())
    await asyncio.wait({waiting}, timeout=0)
    await link.close()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert asyncio.all_tasks() == {asyncio.current_task()}
