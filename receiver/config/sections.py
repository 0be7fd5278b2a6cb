"""The sections of `receiver.toml`, one model each: keys, defaults, limits and help.

The description of a field is its row in the documentation. `settings.py` combines the sections.
"""

from dataclasses import asdict
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetPydanticSchema,
    model_validator,
)
from pydantic_core import core_schema

from receiver.config.values import (
    Count,
    Credential,
    CredentialList,
    DatabaseUrl,
    Duration,
    DurationOrZero,
    ExistingFile,
    FloraUrl,
    Host,
    Port,
    PostgresUrl,
    ProxyUrl,
    Tolerance,
    Words,
    check_not_empty,
    to_lower_case,
    to_tuple,
)
from receiver.model import Event, When
from receiver.net.addresses import parse_host_and_port, parse_network
from receiver.net.database_url import DatabaseUrl as Location
from receiver.net.database_url import parse_database_url

__all__ = [
    "Database",
    "Discover",
    "Dispatching",
    "Downloads",
    "Flora",
    "HandlerEntry",
    "Logging",
    "Operations",
    "Public",
    "Reconcile",
    "Retention",
    "Section",
    "Tls",
    "Workspace",
]


class Section(BaseModel):
    """A table of settings: immutable, with unknown keys forbidden."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True, from_attributes=True)


def _check_networks(values: tuple[str, ...]) -> tuple[str, ...]:
    for value in values:
        try:
            parse_network(value)
        except ValueError:
            raise ValueError("must be IP addresses or networks such as 10.0.0.0/8") from None
    return values


class Public(Section):
    """The public listener, which FLORA calls."""

    host: Host = Field(
        "0.0.0.0",  # noqa: S104  # this listener is public by design
        description="Address to bind (`::` for IPv6 and IPv4), or `unix:/path` for a Unix socket, "
        "which speaks plain HTTP to a proxy on this machine.",
    )
    port: Port = Field(8080, description="Port to bind.")
    max_body_bytes: Count = Field(
        65_536, description="Maximum size of a callback body; a larger one is refused with 413."
    )
    body_timeout_seconds: Duration = Field(
        10, description="Time within which the body of a callback must arrive."
    )
    http: Literal["httptools", "h11"] = Field(
        "httptools",
        description="HTTP parser: `httptools`, which applies the two limits below, or `h11`, which "
        "is slower and applies neither.",
    )
    head_timeout_seconds: Duration = Field(
        10, description="Time within which the headers of a request must arrive (`httptools`)."
    )
    max_connections: Count = Field(
        2000,
        description="Maximum number of open connections; one more closes the oldest unfinished "
        "request, or the longest idle connection (`httptools`). The limit of open files may "
        "lower it.",
    )
    keep_alive_seconds: Count = Field(
        120,
        description="Seconds that an idle connection is kept open: more than a proxy or load "
        "balancer in front keeps it, or its next request may meet a closed connection.",
    )
    trusted_proxies: Annotated[Words, AfterValidator(_check_networks)] = Field(
        ("127.0.0.1", "::1"),
        description="Addresses or networks of proxies whose `X-Forwarded-For` is trusted.",
    )


class Operations(Section):
    """The operations listener: API, dashboard and metrics."""

    host: Host = Field(
        "127.0.0.1", description="Address to bind, or `unix:/path` for a Unix socket, without TLS."
    )
    port: Port = Field(8081, description="Port to bind.")
    token: Credential | None = Field(
        None,
        description="Bearer token; default: generated into `var/ops-token` (loopback only).",
    )
    allow_plaintext: bool = Field(
        default=False,
        description="Allow non-loopback addresses without `[tls]`, behind a proxy that ends TLS.",
    )
    keep_alive_seconds: Count = Field(
        120,
        description="Seconds that an idle connection is kept open: more than a proxy in front keeps it.",
    )
    allowed_hosts: Words = Field(
        (),
        description="Names accepted in `Host`, besides `host` and the names of this machine.",
    )


class Tls(Section):
    """HTTPS without a proxy."""

    cert: ExistingFile | None = Field(None, description="PEM file with the certificate chain.")
    key: ExistingFile | None = Field(None, description="PEM file with the private key.")

    @model_validator(mode="after")
    def _check_both(self) -> Self:
        if (self.cert is None) != (self.key is None):
            raise ValueError("requires both `cert` and `key`, or neither")
        return self


class Database(Section):
    """The ledger."""

    url: DatabaseUrl = Field(
        "sqlite:///var/receiver.db",
        repr=False,
        description="`sqlite:///` with a path, or `postgresql://…`.",
    )
    listen_url: PostgresUrl | None = Field(
        None,
        repr=False,
        description="PostgreSQL URL for `LISTEN`, bypassing a connection pooler; default: `url`.",
    )
    pool_size: Count = Field(8, description="Connections to PostgreSQL that each process keeps open.")

    @property
    def location(self) -> Location:
        """The parts of `url`."""
        return parse_database_url(self.url)


class Flora(Section):
    """FLORA's API, and the verification of its callbacks."""

    base_url: FloraUrl = Field(
        "https://app.flora.ai/api/v1",
        description="Base URL of FLORA's API; the API key is sent to this origin only.",
    )
    api_key: Credential | None = Field(None, description="API key, `sk_live_…` or `sk_test_…`.")
    webhook_secrets: CredentialList = Field(
        (), description="Signing secrets, `whsec_…`; several while one is rotated."
    )
    tolerance_past_seconds: Tolerance = Field(
        900, description='Maximum age of a signature in seconds; `"off"` accepts any.'
    )
    tolerance_future_seconds: Tolerance = Field(
        300,
        description='Maximum seconds a signature may be ahead of the clock; `"off"` accepts any.',
    )
    timeout_seconds: Duration = Field(30, description="Time limit of one API request.")
    ca_file: ExistingFile | None = Field(
        None, description="PEM file with additional CAs to trust for the API."
    )
    proxy: ProxyUrl | None = Field(
        None,
        repr=False,
        description="HTTP proxy for the API: its URL with the port, or `env:HTTPS_PROXY`; default: none, "
        "whatever the environment says.",
    )


class Reconcile(Section):
    """When runs are read from FLORA's API."""

    first_poll_seconds: DurationOrZero = Field(
        60,
        description="Pause before the first read of a run, unless FLORA estimated its duration.",
    )
    callback_window_seconds: Duration = Field(
        420,
        description="Time after the end of a run until its missing callback makes it `recovered`.",
    )
    deadline_hours: Duration = Field(
        24,
        description="Age at which a run that is not terminal is given up; time in which it could not be read "
        "does not count.",
    )
    ladder_seconds: Annotated[tuple[DurationOrZero, ...], AfterValidator(check_not_empty)] = Field(
        (0, 1, 2, 4, 8, 15, 30, 60),
        description="Pauses between reads after a callback, until the API confirms it.",
    )
    max_gap_seconds: Duration = Field(900, description="Maximum pause between two reads of an open run.")
    cost_seconds: Duration = Field(
        600, description="Time to wait for the final cost after a run has settled."
    )
    concurrency: Count = Field(8, description="Maximum number of concurrent API requests.")


class Discover(Section):
    """Discovery of runs that were not registered, from FLORA's lists."""

    enabled: bool = Field(
        default=False, description="Add runs that FLORA lists and the ledger does not have."
    )
    every_seconds: Duration = Field(
        900, description="Pause between two sweeps; the first one runs at start-up."
    )
    workspace_ids: Words = Field(
        (), description="Workspaces to search; default: all that the API keys can list."
    )
    project_ids: Words = Field((), description="Projects to search; default: all.")
    technique_ids: Words = Field(
        (), description="Techniques to search, without any generations; default: all."
    )
    run_types: Annotated[
        tuple[Literal["technique", "generation"], ...],
        BeforeValidator(to_tuple),
        AfterValidator(check_not_empty),
    ] = Field(
        ("technique", "generation"), description="Types of runs to search: `technique`, `generation`."
    )
    overlap_seconds: DurationOrZero = Field(
        600,
        description="How far a sweep goes back before the newest run that the previous one found.",
    )
    first_hours: Duration = Field(24, description="How far back the first sweep goes.")


class Dispatching(Section):
    """How handlers are called."""

    concurrency: Count = Field(16, description="Maximum number of concurrent calls of any one handler.")
    timeout_seconds: Duration = Field(900, description="Time limit of one call of a handler.")
    max_attempts: Count = Field(12, description="Number of attempts before a dispatch is dead.")
    lease_seconds: Annotated[float, Field(ge=3)] = Field(
        60, description="How long a worker holds a dispatch without renewing its lease."
    )


def _check_pairs(values: tuple[str, ...]) -> tuple[str, ...]:
    for value in values:
        try:
            parse_host_and_port(value)
        except ValueError:
            raise ValueError("must be host:port pairs, as 127.0.0.1:9100 or [::1]:9100") from None
    return values


class Downloads(Section):
    """How outputs are downloaded."""

    allow_private_hosts: Annotated[Words, AfterValidator(_check_pairs)] = Field(
        (),
        description="Exact `host:port` pairs that may be private and http; others: public HTTPS.",
    )
    max_bytes: Count = Field(20 * 1024**3, description="Maximum size of an output.")
    stall_seconds: Duration = Field(
        30, description="Time without a byte after which a download is aborted."
    )
    deadline_seconds: Duration = Field(840, description="Time limit of one download.")
    ca_file: ExistingFile | None = Field(
        None, description="PEM file with additional CAs to trust for downloads."
    )
    proxy: ProxyUrl | None = Field(
        None,
        repr=False,
        description="HTTP proxy for downloads, as in `[flora]`, except for `allow_private_hosts`. Names "
        "are resolved here, and the proxy connects to the address that was checked; default: none.",
    )
    proxy_resolves_names: bool = Field(
        default=False,
        description="Give names to the proxy. This gives up the guard against names that lead to "
        "private addresses: the proxy itself must refuse them.",
    )


class Retention(Section):
    """How long data is kept."""

    bodies_days: Duration = Field(30, description="Raw bodies of callbacks.")
    ledger_days: Duration = Field(400, description="Settled runs, and deliveries for deduplication.")
    rejections: Count = Field(1000, description="Number of refused requests to keep.")


class Logging(Section):
    """What is logged, and in which format."""

    level: Annotated[Literal["debug", "info", "warning", "error"], BeforeValidator(to_lower_case)] = Field(
        "info", description="Lowest level that is logged: `debug`, `info`, `warning` or `error`."
    )
    format: Literal["auto", "console", "json"] = Field(
        "auto", description="`console`, `json`, or `auto`: `console` on a terminal, else `json`."
    )


class Workspace(Section):
    """One of several FLORA workspaces."""

    id: str = Field(min_length=1, description="Id of the workspace in FLORA, `ws_…`.")
    secrets: Annotated[CredentialList, AfterValidator(check_not_empty)] = Field(
        description="Signing secrets: each the secret itself, `env:NAME` or `file:/path`."
    )
    api_key: Credential | None = Field(
        None, description="API key of this workspace; default: `flora.api_key`."
    )


class _WhenTable(Section):
    status: Annotated[
        tuple[Literal["completed", "failed", "lost"], ...] | None, BeforeValidator(to_tuple)
    ] = None
    run_type: Words | None = None
    technique_id: Words | None = None
    workspace_id: Words | None = None
    output_type: Words | None = None
    metadata: dict[str, Any] | None = None


def _to_when(table: _WhenTable) -> When:
    return When(**{name: getattr(table, name) for name in _WhenTable.model_fields})


# The value is the model's own `When`; `_WhenTable` checks it, so that an unknown key has its path.
Filter = Annotated[
    When,
    GetPydanticSchema(
        lambda _, handler: core_schema.no_info_after_validator_function(
            _to_when,
            handler.generate_schema(_WhenTable),
            serialization=core_schema.plain_serializer_function_ser_schema(asdict),
        )
    ),
]


class Pauses(Section):
    """The pauses between the attempts of a dispatch."""

    first_seconds: Duration = 1
    factor: Annotated[float, Field(ge=1, le=100, allow_inf_nan=False)] = 2
    longest_seconds: Annotated[float, Field(gt=0, le=86_400)] = 1800

    @model_validator(mode="after")
    def _check_order(self) -> Self:
        if self.first_seconds > self.longest_seconds:
            raise ValueError("first_seconds must not be greater than longest_seconds")
        return self


class HandlerEntry(Section):
    """One configured handler. Keys that are not listed here are its own, and become `options`."""

    use: str = Field(
        min_length=1,
        description='Entry point name, `"package.module:Class"` or `"package.module:function"`.',
    )
    name: str = Field(
        "",
        pattern=r"^[a-z0-9][a-z0-9_.-]{0,63}$",
        validate_default=False,
        description="Unique name, under which its dispatches are stored; default: `use`.",
    )
    when: Filter | None = Field(
        None,
        description="Filter: `status`, `run_type`, `technique_id`, `workspace_id`, `output_type`, `metadata`.",
    )
    on: Annotated[tuple[Event, ...] | None, BeforeValidator(to_tuple), AfterValidator(check_not_empty)] = (
        Field(
            None,
            description="Any of `settled`, `cost_final`, `lost`, `diverged`, `dead`; default: its own.",
        )
    )
    max_attempts: Count | None = Field(
        None,
        description="Attempts until a dispatch is dead; default: the handler's, else `[dispatch]`.",
    )
    backoff: Pauses | None = Field(
        None,
        description="Pauses: `first_seconds` (1), `factor` (2), `longest_seconds` (1800).",
    )
    timeout_seconds: Duration | None = Field(
        None,
        description="Time limit of one call; default: the handler's, else `[dispatch]`.",
    )
    concurrency: Count | None = Field(
        None, description="Maximum number of concurrent calls; default: the handler's, else 8."
    )
    options: dict[str, Any] = Field(
        default_factory=dict, description="All other keys, which are the handler's own."
    )

    @model_validator(mode="before")
    @classmethod
    def _add_name(cls, data: object) -> object:
        if isinstance(data, dict) and isinstance(data.get("use"), str) and not data.get("name"):
            return {**data, "name": data["use"].lower().replace(":", ".")}
        return data
