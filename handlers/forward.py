"""The handler that posts settled runs to an address of yours as signed JSON. Found by its entry point `forward`.

Signed by Standard Webhooks. `webhook-id` is the dispatch's idempotency key, the same on every attempt and after every
crash: whoever acts once for each `webhook-id` acts once for each run, however often it is posted.
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
    header_value,
    target_url,
    usable_headers,
)

MAX_PAUSE_SECONDS = 3600.0
"""However long `Retry-After` asks us to wait, we look again after this."""
MIN_KEY_BYTES = 24  # what Standard Webhooks asks for
_RESERVED = ("webhook-", "ce-")


def _listed(value: object) -> object:
    return (value,) if isinstance(value, str) else value


def _signing(secrets: tuple[SecretStr, ...]) -> tuple[SecretStr, ...]:
    for secret in secrets:
        try:
            key = base64.b64decode(secret.get_secret_value().removeprefix("whsec_"), validate=True)
        except (binascii.Error, ValueError):
            key = b""
        if len(key) < MIN_KEY_BYTES:
            raise ValueError(
                f"must be whsec_ and at least {MIN_KEY_BYTES} random bytes in base64: "
                '`echo "whsec_$(openssl rand -base64 32)"` makes one'
            )
    return secrets


class ForwardConfig(BaseModel):
    """Where runs are posted to, and how."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    allow_private: bool = False
    """Whether the address may be private, and plain http."""
    url: Secret
    """Where to post: public HTTPS; as the address may be a secret itself, also `env:NAME` or `file:/path`."""
    secret: Annotated[tuple[Secret, ...], BeforeValidator(_listed), AfterValidator(_signing)] = ()
    """Signing secret of Standard Webhooks, `whsec_…`; a list of several signs with each, while one is being rotated."""
    unsigned: bool = False
    """Post without a signature; needed where there is no `secret`."""
    headers: dict[str, Secret] = Field(default_factory=dict)
    """Further headers: names and values, the values secret."""
    answer_seconds: Annotated[float, Field(gt=0, le=300, allow_inf_nan=False)] = 15.0
    """How long connecting and waiting for the answer may take, in seconds."""
    cloudevents: bool = False
    """Whether to add the headers of CloudEvents 1.0 (binary mode)."""
    include_text: bool = True
    """Whether text outputs travel along; else their `text` is null."""
    ca_file: FilePath | None = None
    """PEM file with further CAs to trust for this address."""

    @field_validator("url")
    @classmethod
    def _usable_url(cls, url: SecretStr, info: ValidationInfo) -> SecretStr:
        target_url(url.get_secret_value(), allow_private=info.data.get("allow_private", False))
        return url

    @field_validator("headers")
    @classmethod
    def _usable_headers(cls, headers: Mapping[str, SecretStr]) -> Mapping[str, SecretStr]:
        usable_headers(_revealed(headers), reserved=_RESERVED)
        return headers

    @model_validator(mode="after")
    def _signed_or_not(self) -> "ForwardConfig":
        if not self.secret and not self.unsigned:
            raise ValueError(
                '`secret` is missing: `echo "whsec_$(openssl rand -base64 32)"` makes one, for both sides; '
                "or say `unsigned = true`"
            )
        if self.secret and self.unsigned:
            raise ValueError("`secret` and `unsigned = true` contradict each other")
        return self


class Forward:
    """Posts each run that ends, whatever its end; 24 attempts reach over about seven hours.

    Only 410 and redirects end it at once. Other refusals (401, 404, 422, …) are tried again like an outage: they are
    what a wrong deploy on the other side answers for an hour, and the runs of that hour must not be lost.
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
            headers=_revealed(config.headers),
            allow_private=config.allow_private,
            ca_file=config.ca_file,
            timeout_seconds=config.answer_seconds,
        )

    async def handle(self, run: SettledRun, context: Context) -> Answer:
        document = run_document(
            run, event=context.event, idempotency_key=context.idempotency_key, artifacts=await context.stored()
        )
        if not self._config.include_text:
            document["outputs"] = [{**output, "text": None} for output in document["outputs"]]
        body = run_json(document)
        headers = self._signed(header_value(context.idempotency_key), datetime.now(UTC), body)
        if self._config.cloudevents:
            headers |= _cloudevents(document)
        try:
            posted = await self._poster.post(body, content_type="application/json", headers=headers)
        except PostError as exc:  # a wrong certificate or a moved name, too: they are put right, and nothing is lost
            return Retry(str(exc))
        return self._judged(posted, context.attempt)

    async def check(self) -> None:
        """Connect, and post nothing."""
        try:
            await self._poster.connect()
        except PostFailedError as exc:
            raise TargetUnreachableError(str(exc)) from None

    async def close(self) -> None:
        await self._poster.aclose()

    def _signed(self, message_id: str, now: datetime, body: bytes) -> dict[str, str]:
        headers = {"webhook-id": message_id, "webhook-timestamp": str(int(now.timestamp()))}
        if self._signers:
            signatures = [signer.sign(message_id, now, body.decode()) for signer in self._signers]
            headers["webhook-signature"] = " ".join(signatures)
        return headers

    def _judged(self, posted: Posted, attempt: int) -> Answer:
        told = f"{self._poster.host} answered {posted.status}"
        said = f": {posted.excerpt}" if posted.excerpt else ""
        match posted.status:
            case status if 200 <= status < 300:
                return Done({"status": status})
            case status if 300 <= status < 400:
                where = f" (to {posted.location})" if posted.location else ""
                return Reject(f"{told}{where}; redirects are not followed: put the final address into `url`")
            case 410:
                return Reject(f"{told}: it wants no more of this; remove the handler, or change `url`{said}")
            case 413 if self._config.include_text:
                told = f"{told} (too large; `include_text = false` makes it smaller)"
        return Retry(f"{told}{said}", after_seconds=_pause(posted.retry_after_seconds, attempt))


def _pause(asked: float | None, attempt: int) -> float | None:
    """Wait as long as was asked for, within limits; never shorter than we would have, or the attempts fly by."""
    if asked is None:
        return None
    return min(max(asked, 2.0 ** min(attempt - 1, 11)), MAX_PAUSE_SECONDS)


def _cloudevents(document: Mapping[str, Any]) -> dict[str, str]:
    return {
        "ce-specversion": "1.0",
        "ce-id": header_value(document["idempotency_key"]),
        "ce-source": "/flora-receiver",
        "ce-type": f"flora_receiver.run.{document['event']}",
        "ce-subject": header_value(document["run_id"]),
        "ce-time": document["settled_at"],
    }


def _revealed(headers: Mapping[str, SecretStr]) -> dict[str, str]:
    return {name: value.get_secret_value() for name, value in headers.items()}
