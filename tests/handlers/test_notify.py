"""The handler `notify` through real HTTP and SMTP: refusals, hangs, and no secret in a log."""

import asyncio
import email
import email.policy
import json
import logging
import re
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from email.message import EmailMessage
from typing import Any

import pytest
from pydantic import ValidationError

from handlers.notify import Notify, NotifyConfig
from receiver.errors import MissingExtraError
from receiver.handler import Answer, Artifact, Done, Event, Handler, Output, Retry, SettledRun
from tests.support.handler_kit import NOW

ContextOf = Callable[..., Any]
TOKEN = "xoxb-very-secret"
MEDIA = Output(position=0, output_id="hero", type="imageUrl", value="https://media.example/secret")


@dataclass
class Chat:
    """An HTTP server: responds with `statuses`, then 200; waits while `gate` is closed."""

    port: int = 0
    statuses: list[int] = field(default_factory=list)
    messages: list[dict[str, Any]] = field(default_factory=list)
    came: asyncio.Event = field(default_factory=asyncio.Event)
    gate: asyncio.Event = field(default_factory=asyncio.Event)

    def url(self, query: str = "") -> str:
        return f"json://127.0.0.1:{self.port}/{TOKEN}{query}"

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError, asyncio.IncompleteReadError):
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            length = re.search(r"content-length: (\d+)", head, re.IGNORECASE)
            assert length
            body = await reader.readexactly(int(length[1]))
            self.came.set()
            await self.gate.wait()
            status = self.statuses.pop(0) if self.statuses else 200
            if status == 200:
                self.messages.append(json.loads(body))
            writer.write(f"HTTP/1.1 {status} X\r\nContent-Length: 0\r\nConnection: close\r\n\r\n".encode())
            await writer.drain()
        writer.close()


@pytest.fixture
async def chat() -> AsyncIterator[Chat]:
    chat = Chat()
    chat.gate.set()
    server = await asyncio.start_server(chat.answer, "127.0.0.1", 0)
    chat.port = server.sockets[0].getsockname()[1]
    async with server:
        yield chat
        chat.gate.set()


@dataclass
class Post:
    """An SMTP server for one mail; it refuses recipients if `refuses` is set."""

    port: int = 0
    refuses: bool = False
    mails: list[EmailMessage] = field(default_factory=list)

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        def say(line: str) -> None:
            writer.write(f"{line}\r\n".encode())

        say("220 post.example ESMTP")
        with suppress(ConnectionError):
            while line := await reader.readline():
                match line.split()[0].upper():
                    case b"DATA":
                        say("354 go on")
                        raw = (
                            (await reader.readuntil(b"\r\n.\r\n"))
                            .removesuffix(b".\r\n")
                            .replace(b"\r\n..", b"\r\n.")
                        )
                        mail = email.message_from_bytes(raw, policy=email.policy.default)
                        assert isinstance(mail, EmailMessage)
                        self.mails.append(mail)
                        say("250 taken")
                    case b"RCPT" if self.refuses:
                        say(f"550 no such person, {TOKEN}")
                    case b"QUIT":
                        say("221 bye")
                        break
                    case _:
                        say("250 fine")
                await writer.drain()
        writer.close()


@pytest.fixture
async def post() -> AsyncIterator[Post]:
    post = Post()
    server = await asyncio.start_server(post.answer, "127.0.0.1", 0)
    post.port = server.sockets[0].getsockname()[1]
    async with server:
        yield post


def notify(*urls: str, **options: Any) -> Notify:
    return Notify(NotifyConfig.model_validate({"urls": urls, **options}))


async def free(handler: Notify) -> None:
    """Wait until the first target's thread has come back."""
    while handler._targets[0]._is_busy:  # noqa: ASYNC110  # the thread has no event to wait for
        await asyncio.sleep(0)


def reason(answer: Answer) -> str:
    assert isinstance(answer, Retry)
    return answer.reason


def stored_artifact(position: int, location: str) -> Artifact:
    return Artifact("run_1", "storage", position, "hero", location, 3, "ab", "image/png", NOW)


async def test_a_completed_run_is_notified(chat: Chat, run: SettledRun, context_of: ContextOf) -> None:
    """By default: which run, what it cost, where its files are; never a media URL."""
    run = replace(run, outputs=(MEDIA,), charged_cost=0.04)
    context = context_of(
        others=(stored_artifact(-1, "file:///o/run.json"), stored_artifact(0, "s3://bucket/hero.png"))
    )
    handler = notify(chat.url())
    assert isinstance(handler, Handler)
    assert await handler.handle(run, context) == Done({"targets": 1})
    (message,) = chat.messages
    assert message["title"] == "FLORA run completed: run_1"
    assert message["message"] == "tech_1 made 1 output(s), cost 0.04 USD.\ns3://bucket/hero.png"
    assert message["type"] == "success"
    assert "media.example" not in json.dumps(message)


@pytest.mark.parametrize(
    ("event", "status", "title", "kind"),
    [
        (Event.SETTLED, "failed", "FLORA run failed: run_1", "failure"),
        (Event.LOST, "lost", "FLORA run lost: run_1", "failure"),
        (Event.DIVERGED, "completed", "FLORA run diverged: run_1", "warning"),
        (Event.DEAD, "completed", "Handler gave up on run_1", "failure"),
    ],
)
async def test_each_occasion_has_words(
    chat: Chat, run: SettledRun, context_of: ContextOf, event: Event, status: str, title: str, kind: str
) -> None:
    """It is the alert channel too: the message says what to do."""
    run = replace(run, status=status, error_code="GPU", error_message="out of memory", outputs=(MEDIA,))
    await notify(chat.url()).handle(run, context_of(event=event))
    (message,) = chat.messages
    assert (message["title"], message["type"]) == (title, kind)
    assert ("out of memory" if status == "failed" else "flora-receiver ") in message["message"]
    assert "media.example" not in json.dumps(message)


async def test_words_of_ones_own(chat: Chat, run: SettledRun, context_of: ContextOf) -> None:
    """Fields, times, metadata; what is left out keeps its default."""
    words = {
        "title": "{metadata[market]} {completed_at:%d.%m.}",
        "body": "{metadata[gone]} {{{event}}} {metadata[n]}",
    }
    handler = notify(chat.url(), completed=words, failed={"title": "oh"})
    run = replace(run, metadata={"market": "DE\r\nBcc: x@y.example\u202e", "n": {"a": [1]}})
    await handler.handle(run, context_of())
    await handler.handle(replace(run, status="failed", error_code="E"), context_of(event=Event.LOST))
    first, second = chat.messages
    assert first["title"] == "DE Bcc: x@y.example 24.11."
    assert first["message"] == '– {settled} {"a": [1]}'
    assert (second["title"], second["message"]) == ("oh", "tech_1: E\n–")


async def test_a_mail_is_a_mail(post: Post, run: SettledRun, context_of: ContextOf) -> None:
    """A complete SMTP conversation; markup from FLORA stays text, in HTML mail too."""
    url = f"mailto://127.0.0.1:{post.port}?from=flora@mail.example&to=team@mail.example&mode=insecure"
    run = replace(run, status="failed", error_code="E", error_message="<b>é</b>\nsecond line")
    assert isinstance(await notify(url).handle(run, context_of()), Done)
    assert isinstance(await notify(f"{url}&format=html").handle(run, context_of()), Done)
    plain, html = post.mails
    assert (plain["Subject"], plain["To"]) == ("FLORA run failed: run_1", "team@mail.example")
    assert plain.get_content_type() == "text/plain"
    assert plain.get_content().split() == ["tech_1:", "E", "<b>é</b>", "second", "line"]
    body = html.get_body(("html",))
    assert body is not None
    assert "&lt;b&gt;é&lt;/b&gt;" in body.get_content()
    post.refuses = True
    answer = await notify(url).handle(run, context_of())
    assert re.match(r"target 1 \(E-?[Mm]ail\) did not accept it", reason(answer))
    assert TOKEN not in reason(answer)


async def test_a_retry_goes_only_where_it_failed(
    chat: Chat, run: SettledRun, context_of: ContextOf
) -> None:
    """Two of three accepted it and do not get it again, the third does; another run is new."""
    handler = notify(chat.url("?method=PUT"), chat.url(), "json://127.0.0.1:1/closed")
    answer = await handler.handle(run, context_of())
    assert reason(answer).startswith("target 3 (JSON) did not accept it")
    assert isinstance(await handler.handle(run, context_of()), Retry)
    assert len(chat.messages) == 2
    await handler.handle(replace(run, run_id="run_2"), context_of("run_2"))
    assert len(chat.messages) == 4


async def test_a_refusal_names_the_status_and_no_token(
    chat: Chat, run: SettledRun, context_of: ContextOf
) -> None:
    chat.statuses = [404]
    handler = notify(chat.url())
    answer = await handler.handle(run, context_of())
    assert "target 1 (JSON) did not accept it with HTTP 404" in reason(answer)
    assert TOKEN not in reason(answer)
    assert isinstance(await handler.handle(run, context_of()), Done)


@pytest.mark.parametrize("error", [RuntimeError(TOKEN), SystemExit(TOKEN), asyncio.CancelledError(TOKEN)])
async def test_a_service_that_raises_is_free_again(
    error: BaseException,
    chat: Chat,
    run: SettledRun,
    context_of: ContextOf,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its message is not passed on, it does not count as busy, and the next attempt uses it."""

    def fail(**_: object) -> bool:
        raise error

    handler = notify(chat.url())
    with monkeypatch.context() as patch:
        patch.setattr(handler._targets[0]._service, "notify", fail)
        assert (
            reason(await handler.handle(run, context_of()))
            == f"target 1 (JSON) failed: {type(error).__name__}"
        )
    assert isinstance(await handler.handle(run, context_of()), Done)


async def test_a_target_that_hangs_delays_only_itself(
    chat: Chat, run: SettledRun, context_of: ContextOf
) -> None:
    """The other gets the message; the hanging one no second thread, and works when it is back."""
    other = Chat()
    other.gate.set()
    server = await asyncio.start_server(other.answer, "127.0.0.1", 0)
    other.port = server.sockets[0].getsockname()[1]
    async with server:
        chat.gate.clear()
        handler = notify(chat.url("?rto=60"), other.url(), seconds=0.2)
        assert "did not answer within 0.2 s" in reason(await handler.handle(run, context_of()))
        assert len(other.messages) == 1
        assert "still busy" in reason(
            await handler.handle(replace(run, run_id="run_2"), context_of("run_2"))
        )
        assert len(other.messages) == 2
        chat.gate.set()
        await free(handler)
        assert isinstance(
            await handler.handle(run, context_of()), Done
        )  # it came late, and is not repeated
        assert len(chat.messages) == 1


async def test_a_cancelled_attempt_is_not_forgotten(
    chat: Chat, run: SettledRun, context_of: ContextOf
) -> None:
    """A message under way cannot be recalled; when it arrives after all, it counts."""
    chat.gate.clear()
    handler = notify(chat.url("?rto=60"))
    attempt = asyncio.create_task(handler.handle(run, context_of()))
    await chat.came.wait()
    attempt.cancel()
    with pytest.raises(asyncio.CancelledError):
        await attempt
    chat.gate.set()
    await free(handler)
    assert isinstance(await handler.handle(run, context_of()), Done)
    assert len(chat.messages) == 1


async def test_waits_for_the_files_of_others(chat: Chat, run: SettledRun, context_of: ContextOf) -> None:
    handler = notify(chat.url(), wait_for=["storage"])
    run = replace(run, outputs=(MEDIA,))
    assert "storage" in reason(await handler.handle(run, context_of()))
    assert chat.messages == []
    assert isinstance(
        await handler.handle(run, context_of(others=(stored_artifact(0, "file:///o/hero.png"),))), Done
    )
    assert isinstance(await handler.handle(run, context_of(event=Event.DEAD)), Done)


async def test_what_a_message_cannot_hold_is_cut(
    chat: Chat, run: SettledRun, context_of: ContextOf
) -> None:
    """Many files, long values, invalid characters."""
    run = replace(run, technique_id="x" * 9999 + "\x00", error_message="\ud800")
    others = tuple(stored_artifact(n, f"s3://b/{n}") for n in range(100))
    body = "{technique_id} {error_message} {outputs}"
    await notify(chat.url(), completed={"title": "{technique_id}", "body": body}).handle(
        run, context_of(others=others)
    )
    (message,) = chat.messages
    assert len(message["title"]) == 200
    assert message["message"].endswith("s3://b/19\n… and 80 more")
    assert len(message["message"]) < 1000


async def test_an_empty_body_is_none(chat: Chat, run: SettledRun, context_of: ContextOf) -> None:
    """Targets refuse messages without text."""
    await notify(chat.url(), completed={"title": "{run_id}", "body": ""}).handle(run, context_of())
    assert chat.messages[0]["message"] == "run_1"


async def test_no_secret_reaches_a_log(
    chat: Chat,
    run: SettledRun,
    context_of: ContextOf,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """At debug level, whether it works, is refused, or the target is unreachable."""
    caplog.set_level(logging.DEBUG)
    chat.statuses = [500]
    handler = notify(chat.url(), f"json://user:{TOKEN}@127.0.0.1:1/{TOKEN}")
    contexts = [context_of(), context_of()]
    answers = [await handler.handle(run, context) for context in contexts]
    out, err = capfd.readouterr()
    output = (
        f"{caplog.text}{out}{err}{answers}{[context.log.lines for context in contexts]}{handler._config!r}"
    )
    assert TOKEN not in output
    assert len(chat.messages) == 1


@pytest.mark.parametrize("url", [f"nonsense://{TOKEN}", TOKEN, "slack://short", "mailto://"])
def test_a_wrong_url_is_refused_at_once(
    url: str, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    """By `check` and at start; the URL is identified by its number only."""
    with pytest.raises(ValueError, match="urls: number 2 ") as caught:
        notify("json://127.0.0.1", url)
    assert TOKEN not in f"{caught.value}{caplog.text}{capfd.readouterr()}"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"urls": []}, "at least 1"),
        ({}, "required"),
        ({"urls": ["json://h"], "seconds": 0}, "greater than 0"),
        ({"urls": ["json://h"], "completed": {"title": "{url}"}}, r"unknown field \{url\}"),
        ({"urls": ["json://h"], "completed": {"title": "{outputs[0]}"}}, "unknown field"),
        ({"urls": ["json://h"], "failed": {"body": "{run_id.__class__}"}}, "unknown field"),
        ({"urls": ["json://h"], "failed": {"body": "{run_id!r}"}}, "no conversion"),
        ({"urls": ["json://h"], "failed": {"body": "{run_id:>9}"}}, "no conversion"),
        ({"urls": ["json://h"], "failed": {"body": "{run_id"}}, "expected '}'"),
        ({"urls": ["json://h"], "sucess": {"body": "x"}}, "Extra"),
    ],
)
def test_a_wrong_configuration_is_refused_at_once(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        NotifyConfig.model_validate(options)


def test_without_apprise_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "apprise", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'flora-receiver\[notify\]'"):
        notify("json://h")
