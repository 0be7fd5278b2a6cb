"""The handler `forward` with an HTTPS server that verifies as Standard Webhooks does."""

import asyncio
import base64
import json
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from standardwebhooks import Webhook
from standardwebhooks.webhooks import WebhookVerificationError

from handlers.forward import Forward, ForwardConfig
from handlers.payload import RunDocument
from receiver.config import Settings
from receiver.handler import (
    Answer,
    Artifact,
    Done,
    Event,
    Output,
    Poster,
    PostRefusedError,
    Reject,
    Retry,
    SettledRun,
    TargetUnreachableError,
)
from receiver.plugins.loader import load_handlers
from tests.support.handler_kit import NOW, MemoryContext
from tests.support.media import Page, certificate
from tests.support.targets import Target, answer, target

SECRET = "whsec_" + base64.b64encode(b"a" * 32).decode()
OTHER = "whsec_" + base64.b64encode(b"b" * 24).decode()
TOKEN = "Bearer tok-s3cret"

ContextOf = Callable[..., MemoryContext]


@dataclass
class Stand:
    """A target over TLS, and handlers that post to it."""

    target: Target
    ca: Path

    def config(self, **options: Any) -> ForwardConfig:
        values = {
            "url": self.target.url,
            "secret": SECRET,
            "allow_private": True,
            "ca_file": self.ca,
            **options,
        }
        return ForwardConfig.model_validate(values, context={"environ": {"TOKEN": TOKEN}})

    async def forward(self, run: SettledRun, context: MemoryContext, **options: Any) -> Answer:
        handler = Forward(self.config(**options))
        try:
            return await handler.handle(run, context)
        finally:
            await handler.close()


@pytest.fixture
async def stand(tmp_path: Path) -> AsyncIterator[Stand]:
    tls, ca = certificate(tmp_path, "localhost")
    async with target("localhost", tls) as made:
        yield Stand(made, ca)


async def test_a_run_arrives_signed(stand: Stand, run: SettledRun, context_of: ContextOf) -> None:
    """The request is complete, and the library accepts its signature, not one of another secret."""
    context = context_of()
    image = Output(position=0, output_id="hero", type="imageUrl", value="https://media.test/a.png")
    text = Output(position=1, output_id="words", type="text", value="Grüße\u2028")
    stored = Artifact("run_1", "storage", 0, "hero", "file:///a.png", 3, "0" * 64, "image/png", NOW)
    context.others = (stored,)
    assert await stand.forward(replace(run, outputs=(image, text)), context) == Done({"status": 200})
    (post,) = stand.target.posts
    document = Webhook(SECRET).verify(post.body, post.headers)
    RunDocument.model_validate_json(post.body, strict=True)
    assert document["outputs"][0]["artifact"]["location"] == "file:///a.png"
    assert document["outputs"][1]["text"] == "Grüße\u2028"
    assert post.headers["webhook-id"] == document["idempotency_key"] == "run_1:test:settled:0"
    assert post.headers["content-type"] == "application/json"
    assert not [name for name in post.headers if name.startswith("ce-")]
    with pytest.raises(WebhookVerificationError):
        Webhook(OTHER).verify(post.body, post.headers)


async def test_the_id_stays_the_same(stand: Stand, run: SettledRun, context_of: ContextOf) -> None:
    """Posted again, after a crash or a lost response, it has the same id."""
    stand.target.answers = [
        Page(b"HTTP/1.1 200"),
        answer(),
    ]  # the first one's answer is cut: it arrived, and we cannot know
    context = context_of()
    assert isinstance(await stand.forward(run, context), Retry)
    context.attempt = 2
    assert isinstance(await stand.forward(run, context), Done)
    first, second = stand.target.posts
    assert (first.headers["webhook-id"], first.body) == (second.headers["webhook-id"], second.body)


async def test_while_a_secret_is_rotated_both_verify(
    stand: Stand, run: SettledRun, context_of: ContextOf
) -> None:
    await stand.forward(run, context_of(), secret=[OTHER, SECRET])
    (post,) = stand.target.posts
    for secret in (SECRET, OTHER):
        assert Webhook(secret).verify(post.body, post.headers)["run_id"] == "run_1"


async def test_a_strange_run_id_is_signed_as_it_is_sent(
    stand: Stand, run: SettledRun, context_of: ContextOf
) -> None:
    """FLORA's ids are opaque: what headers cannot hold is encoded, and signed so."""
    strange = 'run_ü%"\r\nInjected: 1'
    await stand.forward(replace(run, run_id=strange), context_of(strange), cloudevents=True)
    (post,) = stand.target.posts
    assert "injected" not in post.headers
    assert Webhook(SECRET).verify(post.body, post.headers)["run_id"] == strange
    assert post.headers["ce-subject"] == "run_%C3%BC%25%22%0D%0AInjected:%201"


async def test_cloudevents_and_own_headers(stand: Stand, run: SettledRun, context_of: ContextOf) -> None:
    """If configured; the values may come from the environment."""
    context = context_of(event=Event.LOST)
    await stand.forward(
        run, context, cloudevents=True, headers={"Authorization": "env:TOKEN", "X-Team": "art"}
    )
    (post,) = stand.target.posts
    assert {name: value for name, value in post.headers.items() if name.startswith("ce-")} == {
        "ce-specversion": "1.0",
        "ce-id": "run_1:test:lost:0",
        "ce-source": "/flora-receiver",
        "ce-type": "flora_receiver.run.lost",
        "ce-subject": "run_1",
        "ce-time": "2026-11-24T12:00:01Z",
    }
    assert (post.headers["authorization"], post.headers["x-team"]) == (TOKEN, "art")


async def test_unsigned_and_without_text(stand: Stand, run: SettledRun, context_of: ContextOf) -> None:
    """Both only if configured."""
    text = Output(position=0, output_id="words", type="text", value="long")
    await stand.forward(
        replace(run, outputs=(text,)), context_of(), secret=[], unsigned=True, include_text=False
    )
    (post,) = stand.target.posts
    assert "webhook-signature" not in post.headers
    assert json.loads(post.body)["outputs"][0]["text"] is None


@pytest.mark.parametrize("status", ["200 OK", "201 Made", "202 Later", "204 Nothing"])
async def test_2xx_is_done(stand: Stand, run: SettledRun, context_of: ContextOf, status: str) -> None:
    stand.target.answers = [answer(status)]
    assert await stand.forward(run, context_of()) == Done({"status": int(status[:3])})


@pytest.mark.parametrize(
    ("status", "words"),
    [("410 Gone", "remove the handler"), ("301 Moved", "redirects are not followed"), ("308 M", "`url`")],
)
async def test_what_ends_it(
    stand: Stand, run: SettledRun, context_of: ContextOf, status: str, words: str
) -> None:
    """410 is final; a redirect is not followed, and the reason says what to do."""
    async with target() as other:
        stand.target.answers = [answer(status, b"", f"Location: {other.url}")]
        found = await stand.forward(run, context_of())
        assert isinstance(found, Reject)
        assert words in found.reason
        assert not other.posts


@pytest.mark.parametrize(
    "status", [400, 401, 403, 404, 405, 408, 409, 413, 418, 422, 429, 500, 502, 503, 504, 599]
)
async def test_what_is_tried_again(
    stand: Stand, run: SettledRun, context_of: ContextOf, status: int
) -> None:
    """A faulty deployment of the target responds with any of these; runs must outlast it."""
    stand.target.answers = [answer(f"{status} No", b"because")]
    found = await stand.forward(run, context_of())
    assert isinstance(found, Retry)
    assert found.after_seconds is None
    assert found.reason.startswith(f"localhost responded with {status}")
    assert found.reason.endswith(": because")


@pytest.mark.parametrize(
    ("value", "attempt", "least", "most"),
    [
        ("30", 1, 30, 30),
        ("0", 1, None, None),
        ("1", 9, 256, 256),
        ("999999999999", 1, 3600, 3600),
        (timedelta(seconds=1000), 1, 100, 1000),
        (timedelta(days=-1), 1, None, None),
        ("nonsense", 1, None, None),
    ],
)
@pytest.mark.parametrize("status", ["429 Slow down", "503 Busy"])
async def test_retry_after_is_obeyed_within_limits(
    stand: Stand,
    run: SettledRun,
    context_of: ContextOf,
    status: str,
    value: str | timedelta,
    attempt: int,
    least: float | None,
    most: float | None,
) -> None:
    """Seconds or date; an hour at most, and not so short that the attempts are used up."""
    retry_after = (
        value if isinstance(value, str) else format_datetime(datetime.now(UTC) + value, usegmt=True)
    )
    stand.target.answers = [answer(status, b"", f"Retry-After: {retry_after}")]
    found = await stand.forward(run, context_of(attempt=attempt))
    assert isinstance(found, Retry)
    if least is None or most is None:
        assert found.after_seconds is None
    else:
        assert found.after_seconds is not None
        assert least <= found.after_seconds <= most


async def test_no_secret_is_ever_reported(stand: Stand, run: SettledRun, context_of: ContextOf) -> None:
    """A server that echoes everything puts no secret into the reason; nor does repr."""
    context = context_of()
    image = Output(position=0, output_id="hero", type="imageUrl", value="https://media.test/a.png")
    echo = f"POST /hooks/flora Authorization: {TOKEN} s3cret {image.value} end".encode()
    options = {"headers": {"Authorization": "env:TOKEN"}}
    for status in ("500 Oops", "410 Gone"):
        stand.target.answers = [answer(status, echo)]
        found = await stand.forward(replace(run, outputs=(image,)), context, **options)
        assert isinstance(found, Retry | Reject)
        assert found.reason.endswith(": POST … Authorization: … s3cret … end")
    shown = repr(stand.config(**options)) + repr(context.log.lines)
    for secret in (SECRET, TOKEN, "/hooks/flora", "media.test"):
        assert secret not in shown


async def test_silence_is_tried_again(stand: Stand, run: SettledRun, context_of: ContextOf) -> None:
    """A response that trickles in does not exceed the timeout."""
    stand.target.answers = [Page(b"HTTP/1.1 200 OK\r\nX-", hold=True)]
    assert await stand.forward(run, context_of(), answer_seconds=0.1) == Retry(
        "localhost: no answer within 0.1 s"
    )


async def test_cancellation_hangs_up(stand: Stand, run: SettledRun, context_of: ContextOf) -> None:
    """The end of the attempt or of the service leaves no connection open."""
    stand.target.answers = [Page(b"", hold=True)]
    task = asyncio.create_task(stand.forward(run, context_of()))
    await stand.target.held.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await stand.target.gone.wait()


async def test_check_connects_and_posts_nothing(
    stand: Stand, run: SettledRun, context_of: ContextOf
) -> None:
    """An unreachable target is a warning; a wrong certificate or a private address is an error."""
    await Forward(stand.config()).check()
    assert not stand.target.posts
    with pytest.raises(PostRefusedError, match="ca_file"):
        await Forward(stand.config(ca_file=None)).check()

    async def inside(host: str, port: int) -> Sequence[str]:
        return ["192.168.0.1"]

    moved = Forward(stand.config(), poster=Poster("https://hooks.test/", resolve=inside))
    with pytest.raises(PostRefusedError, match=r"hooks\.test is at 192\.168\.0\.1"):
        await moved.check()
    assert isinstance(
        await moved.handle(run, context_of()), Retry
    )  # names are put right, and nothing is lost
    stand.target.port = 1
    nobody = Forward(stand.config())
    with pytest.raises(TargetUnreachableError):
        await nobody.check()
    assert isinstance(await nobody.handle(run, context_of()), Retry)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"url": "http://example.com/x"}, "plain http"),
        ({"url": "https://10.0.0.1/x"}, "allow_private"),
        ({"url": "https://user:pass@example.com/x"}, "Authorization"),
        ({"secret": []}, "unsigned = true"),
        ({"unsigned": True}, "contradict"),
        ({"secret": "whsec_short"}, "24 random bytes"),
        ({"secret": "not base64 at all, is it? not at all."}, "openssl"),
        ({"secret": [SECRET, "whsec_"]}, "24 random bytes"),
        ({"headers": {"Webhook-Id": "1"}}, "Webhook-Id is set by"),
        ({"headers": {"ce-id": "1"}}, "ce-id is set by"),
        ({"headers": {"Connection": "close"}}, "belongs to the connection"),
        ({"headers": {"X": "a\r\nB: 1"}}, "no header can hold"),
        ({"headers": {"X": "env:ABSENT"}}, "ABSENT is not set"),
        ({"answer_seconds": 0}, "greater than 0"),
        ({"answer_seconds": float("nan")}, "finite"),
        ({"ca_file": "/does/not/exist"}, "file"),
        ({"redirects": True}, "Extra"),
    ],
)
def test_a_wrong_configuration_is_refused_before_the_first_run(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        ForwardConfig.model_validate(
            {"url": "https://example.com/x", "secret": SECRET, **options}, context={"environ": {}}
        )


def test_every_option_is_explained() -> None:
    assert all(field.description for field in ForwardConfig.model_fields.values())


async def test_several_targets_are_several_handlers(
    stand: Stand, run: SettledRun, context_of: ContextOf
) -> None:
    """Each has its name, key and result: what one refuses, the other has accepted."""
    options = {"secret": SECRET, "allow_private": True, "ca_file": str(stand.ca)}
    async with target() as other:
        other.answers = [answer("500 Oops")]
        settings = Settings.model_validate(
            {
                "handlers": [
                    {"use": "forward", "name": "shop", "options": {**options, "url": stand.target.url}},
                    {"use": "forward", "name": "press", "options": {**options, "url": other.url}},
                ]
            }
        )
        answers = []
        for loaded in load_handlers(settings):
            registration = loaded.registration
            answers.append(await registration.handler.handle(run, context_of(handler=registration.name)))
            assert isinstance(registration.handler, Forward)
            await registration.handler.close()
        assert [type(each) for each in answers] == [Done, Retry]
        ids = [post.headers["webhook-id"] for post in (*stand.target.posts, *other.posts)]
        assert ids == ["run_1:shop:settled:0", "run_1:press:settled:0"]
