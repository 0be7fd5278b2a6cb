"""The handler `forward`: posts settled runs to a URL as JSON, signed as Standard Webhooks asks.

`webhook-id` is the dispatch's idempotency key, the same on every attempt and after a crash. A
target that acts once for each `webhook-id` acts once for each run, however often it is posted.
"""

import base64
import binascii
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Annotated, Any, ClassVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    FilePath,
    SecretStr,
    ValidationInfo,
    field_validator,
    model_validator,
)
from standardwebhooks import Webhook

from handlers.payload import run_document, run_json
from receiver.handler import (
    Answer,
    Context,
    Done,
    Event,
    Posted,
    Poster,
    PostError,
    PostFailedError,
    Reject,
    Retry,
    Secret,
    SettledRun,
    TargetUnreachableError,
    When,
    growing_pause,
    header_value,
    target_url,
    usable_headers,
)

_MIN_KEY_BYTES = 24  # the minimum of Standard Webhooks
_RESERVED_PREFIXES = ("webhook-", "ce-")


def _to_tuple(value: object) -> object:
    return (value,) if isinstance(value, str) else value


def _check_secrets(secrets: tuple[SecretStr, ...]) -> tuple[SecretStr, ...]:
    for secret in secrets:
        try:
            key = base64.b64decode(secret.get_secret_value().removeprefix("whsec_"), validate=True)
        except (binascii.Error, ValueError):
            key = b""
        if len(key) < _MIN_KEY_BYTES:
            raise ValueError(
                f"must be whsec_ and at least {_MIN_KEY_BYTES} random bytes in base64: "
                'create one with `echo "whsec_$(openssl rand -base64 32)"`'
            )
    return secrets


class ForwardConfig(BaseModel):
    """Where and how runs are posted."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    allow_private: bool = False
    """Whether the URL may be private or plain http."""
    url: Secret
    """Where to post: public HTTPS. A secret URL may be `env:NAME` or `file:/path`."""
    secret: Annotated[tuple[Secret, ...], BeforeValidator(_to_tuple), AfterValidator(_check_secrets)] = ()
    """Signing secret of Standard Webhooks, `whsec_…`; a list signs with each, for rotation."""
    unsigned: bool = False
    """Whether to post without a signature; required if there is no `secret`."""
    headers: dict[str, Secret] = Field(default_factory=dict)
    """Additional headers; their values are secrets."""
    answer_seconds: Annotated[float, Field(gt=0, le=300, allow_inf_nan=False)] = 15.0
    """Timeout in seconds for connecting and for the response."""
    cloudevents: bool = False
    """Whether to add CloudEvents 1.0 headers (binary mode)."""
    include_text: bool = True
    """Whether to include the text of text outputs; otherwise `text` is null."""
    ca_file: FilePath | None = None
    """PEM file with additional CAs to trust for this URL."""

    @field_validator("url")
    @classmethod
    def _check_url(cls, url: SecretStr, info: ValidationInfo) -> SecretStr:
        target_url(url.get_secret_value(), allow_private=info.data.get("allow_private", False))
        return url

    @field_validator("headers")
    @classmethod
    def _check_headers(cls, headers: Mapping[str, SecretStr]) -> Mapping[str, SecretStr]:
        usable_headers(_reveal(headers), reserved=_RESERVED_PREFIXES)
        return headers

    @model_validator(mode="after")
    def _check_signing(self) -> "ForwardConfig":
        if not self.secret and not self.unsigned:
            raise ValueError(
                "`secret` is missing: create one for both sides with "
                '`echo "whsec_$(openssl rand -base64 32)"`, or set `unsigned = true`'
            )
        if self.secret and self.unsigned:
            raise ValueError("`secret` and `unsigned = true` contradict each other")
        return self


class Forward:
    """Posts each run that ends. The 24 attempts span about seven hours.

    Only 410 and redirects end it at once. Other refusals (401, 404, 422, …) are retried like an
    outage: a faulty deployment of the target may respond so for an hour, and no run of that hour
    must be lost.
    """

    Config: ClassVar[type[BaseModel]] = ForwardConfig
    on: ClassVar[tuple[Event, ...]] = (Event.SETTLED,)
    when: ClassVar[When] = When()
    max_attempts: ClassVar[int] = 24
    timeout_seconds: ClassVar[float] = 330.0

    def __init__(self, config: ForwardConfig, *, poster: Poster | None = None) -> None:
        self._config = config
        self._signers = [Webhook(secret.get_secret_value()) for secret in config.secret]
        self._poster = poster or Poster(
            config.url.get_secret_value(),
            headers=_reveal(config.headers),
            allow_private=config.allow_private,
            ca_file=config.ca_file,
            timeout_seconds=config.answer_seconds,
        )

    async def handle(self, run: SettledRun, context: Context) -> Answer:
        document = run_document(
            run,
            event=context.event,
            idempotency_key=context.idempotency_key,
            artifacts=await context.stored(),
        )
        if not self._config.include_text:
            document["outputs"] = [{**output, "text": None} for output in document["outputs"]]
        body = run_json(document)
        headers = self._sign(header_value(context.idempotency_key), datetime.now(UTC), body)
        if self._config.cloudevents:
            headers |= _cloudevents(document)
        try:
            posted = await self._poster.post(body, content_type="application/json", headers=headers)
        except PostError as error:  # refusals too: a certificate or a name can be corrected in time
            return Retry(str(error))
        return self._answer(posted, context.attempt)

    async def check(self) -> None:
        """Connect without posting anything."""
        try:
            await self._poster.connect()
        except PostFailedError as error:
            raise TargetUnreachableError(str(error)) from None

    async def close(self) -> None:
        await self._poster.aclose()

    def _sign(self, message_id: str, now: datetime, body: bytes) -> dict[str, str]:
        headers = {"webhook-id": message_id, "webhook-timestamp": str(int(now.timestamp()))}
        if self._signers:
            signatures = [signer.sign(message_id, now, body.decode()) for signer in self._signers]
            headers["webhook-signature"] = " ".join(signatures)
        return headers

    def _answer(self, posted: Posted, attempt: int) -> Answer:
        result = f"{self._poster.host} responded with {posted.status}"
        excerpt = f": {posted.excerpt}" if posted.excerpt else ""
        match posted.status:
            case status if 200 <= status < 300:
                return Done({"status": status})
            case status if 300 <= status < 400:
                where = f" (to {posted.location})" if posted.location else ""
                return Reject(
                    f"{result}{where}; redirects are not followed: set `url` to the final address"
                )
            case 410:
                return Reject(f"{result} (gone): remove the handler, or change `url`{excerpt}")
            case 413 if self._config.include_text:
                result = f"{result} (too large: `include_text = false` makes it smaller)"
        return Retry(f"{result}{excerpt}", after_seconds=growing_pause(posted.retry_after_seconds, attempt))


def _cloudevents(document: Mapping[str, Any]) -> dict[str, str]:
    return {
        "ce-specversion": "1.0",
        "ce-id": header_value(document["idempotency_key"]),
        "ce-source": "/flora-receiver",
        "ce-type": f"flora_receiver.run.{document['event']}",
        "ce-subject": header_value(document["run_id"]),
        "ce-time": document["settled_at"],
    }


def _reveal(headers: Mapping[str, SecretStr]) -> dict[str, str]:
    return {name: value.get_secret_value() for name, value in headers.items()}
