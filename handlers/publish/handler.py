"""The handler that publishes each run to a message broker: NATS JetStream, Redis streams, Kafka. Entry point `publish`.

The message carries the idempotency key as its id and is acknowledged before the answer is `Done`. After a crash between
the two it is published again under the same id: JetStream and Redis know it again and keep one (for as long as the
stream's duplicate window, or `remember_hours`, lasts); Kafka keeps both, and who reads dedupes on the id.
"""

import asyncio
import re
import ssl
from typing import Annotated, ClassVar, Literal, Self, assert_never
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, FilePath, model_validator

from handlers.payload import run_document, run_json
from handlers.publish.broker import Access, Broker, BrokerError, BrokerUnreachableError, Message, MessageRefusedError
from handlers.template import RUN_IDS, FieldKind, Fields, Template
from receiver.handler import (
    Answer,
    Context,
    Done,
    Event,
    Reject,
    Retry,
    Secret,
    SettledRun,
    TargetUnreachableError,
    When,
    needs,
)

Kind = Literal["nats", "redis", "kafka"]
_SCHEMES: dict[str, tuple[Kind, bool, int]] = {
    "nats": ("nats", False, 4222),
    "tls": ("nats", True, 4222),
    "redis": ("redis", False, 6379),
    "rediss": ("redis", True, 6379),
    "kafka": ("kafka", False, 9092),
    "kafka+ssl": ("kafka", True, 9092),
}
_HOST = re.compile(r"(?P<host>\[[0-9a-fA-F:.]+\]|[A-Za-z0-9._-]+)(?::(?P<port>[0-9]{1,5}))?")
_FIELDS: Fields = dict.fromkeys(("event", *RUN_IDS), FieldKind.TEXT)
_NAME = re.compile(r"[A-Za-z0-9_-]+(?:\.[A-Za-z0-9_-]+)*")
_MAX_NAME = 249  # Kafka's limit
_MAX_VALUE = 64
_CHECK_SECONDS = 8.0  # `check` as a whole has ten


def _usable_url(url: str) -> str:
    _parts(url)
    return url


def _parts(url: str) -> tuple[Kind, bool, tuple[tuple[str, int], ...], str]:
    """Return kind, TLS, hosts and path of a broker's URL; ValueError without the URL: a password may be in it."""
    try:
        parts = urlsplit(url)
    except ValueError:
        raise ValueError("is no URL") from None
    if parts.scheme not in _SCHEMES:
        raise ValueError(f"must begin with {', '.join(f'{scheme}://' for scheme in _SCHEMES)}")
    if "@" in parts.netloc:
        raise ValueError("must hold no credentials: they go into `user` and `password`, or `token`")
    if parts.query or parts.fragment:
        raise ValueError("must end after the hosts (for Redis: after the number of the database)")
    kind, tls, port = _SCHEMES[parts.scheme]
    found = [_HOST.fullmatch(host) for host in parts.netloc.split(",")]
    hosts = tuple((each["host"].strip("[]"), int(each["port"] or port)) for each in found if each)
    if len(hosts) < len(found) or not all(0 < number < 65536 for _, number in hosts):
        raise ValueError("must name hosts as host:port, separated by commas")
    if kind == "redis":
        if len(hosts) > 1 or not re.fullmatch(r"/?[0-9]{0,4}", parts.path):
            raise ValueError("must be redis://host:port or redis://host:port/0")
    elif parts.path not in {"", "/"}:
        raise ValueError("must have no path")
    return kind, tls, hosts, parts.path


def _usable_name(template: str) -> str:
    """Check that a template has fields that exist, and characters that every broker takes."""
    if not _NAME.fullmatch(Template(template, _FIELDS).fill(lambda _: "x")):
        raise ValueError("must be words of letters, digits, - and _, separated by dots; fields go in {}")
    return template


class PublishConfig(BaseModel):
    """Which broker, and where in it."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    url: Annotated[str, AfterValidator(_usable_url)]
    """`nats://`, `tls://` (NATS), `redis://`, `rediss://`, `kafka://` or `kafka+ssl://`, and `host:port`, …"""
    to: Annotated[str, Field(max_length=_MAX_NAME), AfterValidator(_usable_name)] = "flora.runs"
    """The subject, stream or topic; may have fields of the run, as in `flora.{workspace_id}.{status}`."""
    cloudevents: bool = False
    """Whether to add CloudEvents attributes, in binary mode: `ce-…` (NATS), `ce_…` (Redis, Kafka)."""
    user: str | None = None
    """User name, for a broker that wants one."""
    password: Secret | None = None
    """The user's password; Redis also takes one without a user."""
    token: Secret | None = None
    """NATS: a token in place of user and password."""
    credentials: Secret | None = None
    """NATS: the content of a `.creds` file, as `file:/path/to/user.creds`."""
    sasl: Literal["plain", "scram-sha-256", "scram-sha-512"] = "plain"
    """Kafka: how user and password are presented."""
    ca_file: FilePath | None = None
    """PEM file with the CA to trust in place of the system's."""
    cert_file: FilePath | None = None
    """PEM file with our own certificate, for a broker that wants one."""
    key_file: FilePath | None = None
    """PEM file with the key of `cert_file`."""
    answer_seconds: Annotated[float, Field(gt=0, le=300, allow_inf_nan=False)] = 10.0
    """How long connecting and the acknowledgement may take together."""
    maxlen: Annotated[int, Field(ge=1)] | None = None
    """Redis: about how many entries the stream keeps; default: all."""
    remember_hours: Annotated[int, Field(ge=1, le=9600)] = 168
    """Redis: how long an id is remembered, within which a repetition changes nothing."""

    @model_validator(mode="after")
    def _fits_the_broker(self) -> Self:
        kind, tls, _, _ = _parts(self.url)
        only = {"token": "nats", "credentials": "nats", "sasl": "kafka", "maxlen": "redis", "remember_hours": "redis"}
        for name in sorted(only.keys() & self.model_fields_set):
            if only[name] != kind:
                raise ValueError(f"`{name}` is for {only[name]} alone")
        if "{run_id}" in self.to and kind != "nats":
            raise ValueError(
                "`to` may have {run_id} in NATS alone: elsewhere each run would leave a stream or topic behind"
            )
        if not tls and (self.ca_file or self.cert_file):
            raise ValueError("`ca_file` and `cert_file` need tls://, rediss:// or kafka+ssl://")
        if self.key_file and not self.cert_file:
            raise ValueError("`key_file` needs `cert_file`")
        if self.user is not None and self.password is None:
            raise ValueError("`user` needs `password`")
        if self.password is not None and self.user is None and kind != "redis":
            raise ValueError("`password` needs `user`")
        if sum(each is not None for each in (self.user, self.token, self.credentials)) > 1:
            raise ValueError("give one of `user`, `token` and `credentials`")
        return self


class Publish:
    """One message for each settled run, acknowledged by the broker."""

    Config: ClassVar[type[BaseModel]] = PublishConfig
    on: ClassVar[tuple[Event, ...]] = (Event.SETTLED,)
    when: ClassVar[When] = When()
    timeout_seconds: ClassVar[float] = 330.0

    def __init__(self, config: PublishConfig) -> None:
        self._config = config
        self._to = Template(config.to, _FIELDS)
        kind, self._access = _access(config)
        self._broker = _broker(kind, self._access)

    async def handle(self, run: SettledRun, context: Context) -> Answer:
        to = self._name(run, context)
        if len(to) > _MAX_NAME:
            return Reject(f"`to` becomes {len(to)} characters long, {_MAX_NAME} are possible: use fewer fields")
        document = run_document(
            run, event=context.event, idempotency_key=context.idempotency_key, artifacts=await context.stored()
        )
        message = Message(
            to=to,
            id=context.idempotency_key,
            key=run.run_id,
            body=run_json(document),
            attributes=_attributes(run, context) if self._config.cloudevents else {},
        )
        seconds = self._config.answer_seconds
        try:
            async with asyncio.timeout(seconds):
                receipt = await self._broker.publish(message)
        except MessageRefusedError as error:
            return Reject(str(error))
        except BrokerError as error:
            return Retry(str(error))
        except TimeoutError:
            return Retry(f"{self._access.url} did not acknowledge within {seconds:g} s: is it overloaded, or frozen?")
        return Done({"to": to, **receipt})

    async def check(self) -> None:
        to = self._config.to
        try:
            async with asyncio.timeout(min(self._config.answer_seconds, _CHECK_SECONDS)):
                await self._broker.check(None if "{" in to else to)
        except BrokerUnreachableError as error:
            raise TargetUnreachableError(str(error)) from error
        except TimeoutError as error:
            raise TargetUnreachableError(f"{self._access.url} does not answer") from error

    async def close(self) -> None:
        await self._broker.close()

    def _name(self, run: SettledRun, context: Context) -> str:
        return self._to.fill(
            lambda field: context.event.value if field.name == "event" else _word(getattr(run, field.name))
        )


def _word(value: str | None) -> str:
    """Make a value one word of a name: what comes from outside must not choose levels, wildcards or control characters."""
    return re.sub(r"[^A-Za-z0-9_-]", "_", value or "")[:_MAX_VALUE] or "_"


def _attributes(run: SettledRun, context: Context) -> dict[str, str]:
    """Describe the message as CloudEvents 1.0 asks; source and id together are unique."""
    return {
        "specversion": "1.0",
        "id": context.idempotency_key,
        "source": "/flora-receiver",
        "type": f"flora_receiver.run.{context.event.value}",
        "subject": run.run_id,
        "time": run.settled_at.isoformat().replace("+00:00", "Z"),
        "datacontenttype": "application/json",
    }


def _access(config: PublishConfig) -> tuple[Kind, Access]:
    kind, tls, hosts, path = _parts(config.url)
    return kind, Access(
        url=config.url,
        hosts=hosts,
        path=path,
        answer_seconds=config.answer_seconds,
        tls=_trust(config) if tls else None,
        ca_file=config.ca_file,
        cert_file=config.cert_file,
        key_file=config.key_file,
        user=config.user,
        password=_plain(config.password),
        token=_plain(config.token),
        credentials=_plain(config.credentials),
        sasl=config.sasl,
        maxlen=config.maxlen,
        remember_hours=config.remember_hours,
    )


def _plain(secret: Secret | None) -> str | None:
    return None if secret is None else secret.get_secret_value()


def _trust(config: PublishConfig) -> ssl.SSLContext:
    """Build the TLS context, so that a file that holds no certificate is an error of the configuration."""
    try:
        context = ssl.create_default_context(cafile=config.ca_file)
    except ssl.SSLError as error:
        raise ValueError(f"`ca_file` holds no certificate in PEM: {error.reason}") from error
    if config.cert_file:
        try:
            context.load_cert_chain(config.cert_file, config.key_file)
        except ssl.SSLError as error:
            raise ValueError(f"`cert_file` and `key_file` do not fit together: {error.reason}") from error
    return context


def _broker(kind: Kind, access: Access) -> Broker:
    """Build the broker of a kind; only who uses one needs its library."""
    match kind:
        case "nats":
            with needs("flora-receiver[nats]"):
                from handlers.publish.broker_nats import NatsBroker  # noqa: PLC0415
            return NatsBroker(access)
        case "redis":
            with needs("flora-receiver[redis]"):
                from handlers.publish.broker_redis import RedisBroker  # noqa: PLC0415
            return RedisBroker(access)
        case "kafka":
            with needs("flora-receiver[kafka]"):
                from handlers.publish.broker_kafka import KafkaBroker  # noqa: PLC0415
            return KafkaBroker(access)
    assert_never(kind)
