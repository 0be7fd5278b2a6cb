"""The handler `publish`: sends each run to NATS JetStream, Redis streams or Kafka.

The id of the message is the idempotency key, and the broker acknowledges it before the handler
returns `Done`. After a crash in between it is published again with the same id. JetStream and Redis
then keep one message (within the stream's duplicate window, or `remember_hours`); Kafka keeps both,
and consumers deduplicate on the id.
"""

import asyncio
import re
import ssl
from typing import Annotated, ClassVar, Literal, Self, assert_never
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, FilePath, model_validator

from handlers.payload import run_document, run_json
from handlers.publish.broker import (
    Access,
    Broker,
    BrokerError,
    BrokerUnreachableError,
    Message,
    MessageRefusedError,
)
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
_HOST_AND_PORT = re.compile(r"(?P<host>\[[0-9a-fA-F:.]+\]|[A-Za-z0-9._-]+)(?::(?P<port>[0-9]{1,5}))?")
_FIELDS: Fields = dict.fromkeys(("event", *RUN_IDS), FieldKind.TEXT)
_NAME = re.compile(r"[A-Za-z0-9_-]+(?:\.[A-Za-z0-9_-]+)*")
_MAX_NAME = 249  # Kafka's limit
_MAX_VALUE = 64
_CHECK_SECONDS = 8.0  # less than the ten that the service allows


def _check_url(url: str) -> str:
    _parse_url(url)
    return url


def _parse_url(url: str) -> tuple[Kind, bool, tuple[tuple[str, int], ...], str]:
    """Return kind, TLS, hosts and path. ValueError without the URL, which may hold a password."""
    try:
        parts = urlsplit(url)
    except ValueError:
        raise ValueError("is not a URL") from None
    if parts.scheme not in _SCHEMES:
        raise ValueError(f"must start with {', '.join(f'{scheme}://' for scheme in _SCHEMES)}")
    if "@" in parts.netloc:
        raise ValueError("must not contain credentials: use `user` and `password`, or `token`")
    if parts.query or parts.fragment:
        raise ValueError("must end after the hosts (for Redis: after the database number)")
    kind, tls, port = _SCHEMES[parts.scheme]
    found = [_HOST_AND_PORT.fullmatch(host) for host in parts.netloc.split(",")]
    hosts = tuple((each["host"].strip("[]"), int(each["port"] or port)) for each in found if each)
    if len(hosts) < len(found) or not all(0 < number < 65536 for _, number in hosts):
        raise ValueError("must list hosts as host:port, separated by commas")
    if kind == "redis":
        if len(hosts) > 1 or not re.fullmatch(r"/?[0-9]{0,4}", parts.path):
            raise ValueError("must be redis://host:port or redis://host:port/0")
    elif parts.path not in {"", "/"}:
        raise ValueError("must not have a path")
    return kind, tls, hosts, parts.path


def _check_name(template: str) -> str:
    """Check that a template has fields that exist, and characters that every broker accepts."""
    if not _NAME.fullmatch(Template(template, _FIELDS).fill(lambda _: "x")):
        raise ValueError("must be words of letters, digits, - and _, separated by dots; fields are in {}")
    return template


class PublishConfig(BaseModel):
    """The broker, and where in it messages go."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    url: Annotated[str, AfterValidator(_check_url)]
    """`nats://host:port,…`, `tls://…` (NATS), `redis[s]://…`, `kafka://…` or `kafka+ssl://…`."""
    to: Annotated[str, Field(max_length=_MAX_NAME), AfterValidator(_check_name)] = "flora.runs"
    """Subject, stream or topic; may contain fields, as in `flora.{workspace_id}.{status}`."""
    cloudevents: bool = False
    """Whether to add CloudEvents attributes (binary mode): `ce-…` (NATS), `ce_…` (Redis, Kafka)."""
    user: str | None = None
    """User name, if the broker requires one."""
    password: Secret | None = None
    """Password of `user`; Redis also accepts one without a user."""
    token: Secret | None = None
    """NATS: a token instead of user and password."""
    credentials: Secret | None = None
    """NATS: content of a `.creds` file, as `file:/path/to/user.creds`."""
    sasl: Literal["plain", "scram-sha-256", "scram-sha-512"] = "plain"
    """Kafka: SASL mechanism for user and password."""
    ca_file: FilePath | None = None
    """PEM file with the CA to trust instead of the system's."""
    cert_file: FilePath | None = None
    """PEM file with a client certificate, if the broker requires one."""
    key_file: FilePath | None = None
    """PEM file with the private key of `cert_file`."""
    answer_seconds: Annotated[float, Field(gt=0, le=300, allow_inf_nan=False)] = 10.0
    """Timeout in seconds for connecting and the acknowledgement together."""
    maxlen: Annotated[int, Field(ge=1)] | None = None
    """Redis: approximate number of entries that the stream keeps. Default: all."""
    remember_hours: Annotated[int, Field(ge=1, le=9600)] = 168
    """Redis: how many hours an id is remembered, in which it is not published again."""

    @model_validator(mode="after")
    def _check_fits_broker(self) -> Self:
        kind, tls, _, _ = _parse_url(self.url)
        only = {
            "token": "nats",
            "credentials": "nats",
            "sasl": "kafka",
            "maxlen": "redis",
            "remember_hours": "redis",
        }
        for name in sorted(only.keys() & self.model_fields_set):
            if only[name] != kind:
                raise ValueError(f"`{name}` is for {only[name]} only")
        if "{run_id}" in self.to and kind != "nats":
            raise ValueError(
                "`to` may contain {run_id} with NATS only: each run would create a stream or topic"
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
            raise ValueError("use only one of `user`, `token` and `credentials`")
        return self


class Publish:
    """Publishes one message for each settled run."""

    Config: ClassVar[type[BaseModel]] = PublishConfig
    on: ClassVar[tuple[Event, ...]] = (Event.SETTLED,)
    when: ClassVar[When] = When()
    timeout_seconds: ClassVar[float] = 330.0

    def __init__(self, config: PublishConfig) -> None:
        self._config = config
        self._to = Template(config.to, _FIELDS)
        kind, self._access = _to_access(config)
        self._broker = _create_broker(kind, self._access)

    async def handle(self, run: SettledRun, context: Context) -> Answer:
        to = self._fill_name(run, context)
        if len(to) > _MAX_NAME:
            return Reject(f"`to` is {len(to)} characters long, the limit is {_MAX_NAME}: use fewer fields")
        document = run_document(
            run,
            event=context.event,
            idempotency_key=context.idempotency_key,
            artifacts=await context.stored(),
        )
        message = Message(
            to=to,
            id=context.idempotency_key,
            key=run.run_id,
            body=run_json(document),
            attributes=_cloudevents(run, context) if self._config.cloudevents else {},
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
            return Retry(f"{self._access.url} did not acknowledge within {seconds:g} s: is it overloaded?")
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

    def _fill_name(self, run: SettledRun, context: Context) -> str:
        return self._to.fill(
            lambda field: (
                context.event.value if field.name == "event" else _to_word(getattr(run, field.name))
            )
        )


def _to_word(value: str | None) -> str:
    """Return a value as one word of a name, without dots, wildcards and control characters."""
    return re.sub(r"[^A-Za-z0-9_-]", "_", value or "")[:_MAX_VALUE] or "_"


def _cloudevents(run: SettledRun, context: Context) -> dict[str, str]:
    """Return the CloudEvents 1.0 attributes; source and id together are unique."""
    return {
        "specversion": "1.0",
        "id": context.idempotency_key,
        "source": "/flora-receiver",
        "type": f"flora_receiver.run.{context.event.value}",
        "subject": run.run_id,
        "time": run.settled_at.isoformat().replace("+00:00", "Z"),
        "datacontenttype": "application/json",
    }


def _to_access(config: PublishConfig) -> tuple[Kind, Access]:
    kind, tls, hosts, path = _parse_url(config.url)
    return kind, Access(
        url=config.url,
        hosts=hosts,
        path=path,
        answer_seconds=config.answer_seconds,
        tls=_create_tls_context(config) if tls else None,
        ca_file=config.ca_file,
        cert_file=config.cert_file,
        key_file=config.key_file,
        user=config.user,
        password=_reveal(config.password),
        token=_reveal(config.token),
        credentials=_reveal(config.credentials),
        sasl=config.sasl,
        maxlen=config.maxlen,
        remember_hours=config.remember_hours,
    )


def _reveal(secret: Secret | None) -> str | None:
    return None if secret is None else secret.get_secret_value()


def _create_tls_context(config: PublishConfig) -> ssl.SSLContext:
    """Create the TLS context. ValueError if a configured file holds no certificate."""
    try:
        context = ssl.create_default_context(cafile=config.ca_file)
    except ssl.SSLError as error:
        raise ValueError(f"`ca_file` contains no PEM certificate: {error.reason}") from error
    if config.cert_file:
        try:
            context.load_cert_chain(config.cert_file, config.key_file)
        except ssl.SSLError as error:
            raise ValueError(f"`cert_file` and `key_file` do not match: {error.reason}") from error
    return context


def _create_broker(kind: Kind, access: Access) -> Broker:
    """Create the client of a broker. MissingExtraError if its library is not installed."""
    match kind:
        case "nats":
            with needs("flora-receiver[nats]"):
                from handlers.publish.broker_nats import NatsBroker  # an extra
            return NatsBroker(access)
        case "redis":
            with needs("flora-receiver[redis]"):
                from handlers.publish.broker_redis import RedisBroker  # an extra
            return RedisBroker(access)
        case "kafka":
            with needs("flora-receiver[kafka]"):
                from handlers.publish.broker_kafka import KafkaBroker  # an extra
            return KafkaBroker(access)
    assert_never(kind)
