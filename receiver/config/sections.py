"""The sections of `receiver.toml`, one model each: keys, defaults, limits and help. Built by `config.py`.

Each field's description is what the README says about it; a value's problem is told without the value.
"""

from ipaddress import ip_network
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
    DatabaseUrl,
    ExistingFile,
    FloraUrl,
    Port,
    PostgresUrl,
    Seconds,
    Secret,
    SecretList,
    Span,
    Tolerance,
    Words,
    listed,
    lower_case,
    not_empty,
)
from receiver.model import Event, When

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
    """A table of settings: frozen, without room for a key that nobody reads."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True, from_attributes=True)


def _networks(values: tuple[str, ...]) -> tuple[str, ...]:
    for value in values:
        try:
            ip_network(value, strict=False)
        except ValueError:
            raise ValueError("must be addresses or networks, as 10.0.0.0/8") from None
    return values


class Public(Section):
    """The listener that FLORA reaches."""

    host: str = Field("0.0.0.0", min_length=1, description="Address to bind.")  # noqa: S104  public by purpose
    port: Port = Field(8080, description="Port to bind.")
    max_body_bytes: Count = Field(65_536, description="Largest callback body; beyond it the answer is 413.")
    body_timeout_seconds: Span = Field(10, description="How long a callback's body may take to arrive.")
    http: Literal["httptools", "h11"] = Field(
        "httptools",
        description="HTTP parser: `httptools` within the limits below, or `h11`, slower and without a limit on time.",
    )
    head_timeout_seconds: Span = Field(10, description="How long a request's head may take to arrive (`httptools`).")
    max_connections: Count = Field(
        2000,
        description="Open connections; beyond it the oldest unfinished request gives way, or the longest idle; fewer where "
        "the limit of open files is too low (`httptools`).",
    )
    trusted_proxies: Annotated[Words, AfterValidator(_networks)] = Field(
        ("127.0.0.1", "::1"), description="Addresses or networks of proxies whose `X-Forwarded-For` is believed."
    )


class Operations(Section):
    """The listener for operators: API, dashboard, metrics."""

    host: str = Field("127.0.0.1", min_length=1, description="Address to bind.")
    port: Port = Field(8081, description="Port to bind.")
    token: Secret | None = Field(
        None, description="Bearer token; without one it is generated into `var/ops-token` (loopback only)."
    )
    allow_plaintext: bool = Field(
        default=False, description="Allow a non-loopback address without `[tls]`, behind a proxy that does TLS."
    )
    allowed_hosts: Words = Field(
        (), description="Names, besides `host` and this machine's own, by which the listener may be called."
    )


class Tls(Section):
    """Serve HTTPS directly instead of behind a proxy."""

    cert: ExistingFile | None = Field(None, description="PEM file with the certificate chain.")
    key: ExistingFile | None = Field(None, description="PEM file with the private key.")

    @model_validator(mode="after")
    def _both_or_none(self) -> Self:
        if (self.cert is None) != (self.key is None):
            raise ValueError("needs both `cert` and `key`, or neither")
        return self


class Database(Section):
    """Where the ledger is."""

    url: DatabaseUrl = Field(
        "sqlite:///var/receiver.db", repr=False, description="`sqlite:///` with a path, or `postgresql://…`."
    )
    listen_url: PostgresUrl | None = Field(
        None, repr=False, description="PostgreSQL past a pooler, for wake-ups; without one, `url` is tried."
    )
    pool_size: Count = Field(8, description="Connections to PostgreSQL that one process keeps.")


class Flora(Section):
    """How to reach FLORA, and how to know its callbacks."""

    base_url: FloraUrl = Field(
        "https://app.flora.ai/api/v1", description="FLORA's API; the API key is sent to its origin only."
    )
    api_key: Secret | None = Field(None, description="API key, `sk_live_…` or `sk_test_…`.")
    webhook_secrets: SecretList = Field(
        (), description="Signing secrets, `whsec_…`; several while one is being rotated."
    )
    tolerance_past_seconds: Tolerance = Field(
        900, description='Oldest signature accepted, in seconds; `"off"` accepts any age.'
    )
    tolerance_future_seconds: Tolerance = Field(
        300, description='How far ahead of our clock a signature may be; `"off"` accepts any time.'
    )
    timeout_seconds: Span = Field(30, description="Time limit of one API request.")
    ca_file: ExistingFile | None = Field(None, description="PEM file with further CAs to trust for the API.")


class Reconcile(Section):
    """When runs are read from the API."""

    first_poll_seconds: Seconds = Field(
        60, description="First read of a run whose callback is expected, where FLORA gave no estimate."
    )
    callback_window_seconds: Span = Field(
        420, description="How long after a run's end its callback may come before the run counts as `recovered`."
    )
    deadline_hours: Span = Field(24, description="Age at which a run that is still not terminal is given up.")
    ladder_seconds: Annotated[tuple[Seconds, ...], AfterValidator(not_empty)] = Field(
        (0, 1, 2, 4, 8, 15, 30, 60), description="Pauses between reads after a callback, while the API lags behind it."
    )
    max_gap_seconds: Span = Field(900, description="Longest pause between two reads of an open run.")
    cost_seconds: Span = Field(600, description="How long after settling to wait for the final cost.")
    concurrency: Count = Field(8, description="API requests at the same time.")


class Discover(Section):
    """Whether FLORA's lists are looked through for runs that nobody registered."""

    enabled: bool = Field(default=False, description="Take up runs that FLORA lists and the ledger does not know.")
    every_seconds: Span = Field(900, description="Pause between two sweeps; one is made at start.")
    workspace_ids: Words = Field((), description="Only these workspaces; default: all that the API keys show.")
    project_ids: Words = Field((), description="Only these projects; default: all.")
    technique_ids: Words = Field((), description="Only runs of these techniques, and no generations; default: all.")
    run_types: Annotated[
        tuple[Literal["technique", "generation"], ...], BeforeValidator(listed), AfterValidator(not_empty)
    ] = Field(("technique", "generation"), description="Which runs to look for: `technique`, `generation`.")
    overlap_seconds: Seconds = Field(
        600, description="How far a sweep goes back beyond the newest run that the last one saw."
    )
    first_hours: Span = Field(24, description="How far back the first sweep goes.")


class Dispatching(Section):
    """How handlers are run."""

    concurrency: Count = Field(16, description="Most calls of any one handler at the same time.")
    timeout_seconds: Span = Field(900, description="Time limit of one handler call.")
    max_attempts: Count = Field(12, description="Attempts before a dispatch is dead.")
    lease_seconds: Annotated[float, Field(ge=3)] = Field(
        60, description="How long a worker owns a dispatch without renewing."
    )


class Downloads(Section):
    """How output URLs are fetched."""

    allow_private_hosts: Words = Field(
        (), description="Exact `host:port` pairs that may be private and plain http; else public HTTPS only."
    )
    max_bytes: Count = Field(20 * 1024**3, description="Largest output.")
    stall_seconds: Span = Field(30, description="Give up when no byte arrives for this long.")
    deadline_seconds: Span = Field(840, description="Time limit of one download.")
    ca_file: ExistingFile | None = Field(None, description="PEM file with further CAs to trust for downloads.")


class Retention(Section):
    """How long things are kept."""

    bodies_days: Span = Field(30, description="Raw callback bodies.")
    ledger_days: Span = Field(400, description="Settled runs, and deliveries for deduplication.")
    rejections: Count = Field(1000, description="How many refused requests to remember.")


class Logging(Section):
    """What is logged, and how."""

    level: Annotated[Literal["debug", "info", "warning", "error"], BeforeValidator(lower_case)] = Field(
        "info", description="Least severe level shown: `debug`, `info`, `warning` or `error`."
    )
    format: Literal["auto", "console", "json"] = Field(
        "auto", description="`console`, `json`, or `auto`: console on a terminal, else JSON."
    )


class Workspace(Section):
    """One FLORA workspace, where there are several."""

    id: str = Field(min_length=1, description="FLORA's id of it, `ws_…`.")
    secrets: Annotated[SecretList, AfterValidator(not_empty)] = Field(
        description="Its signing secrets: the secret itself, `env:NAME` or `file:/path`."
    )
    api_key: Secret | None = Field(None, description="Its own API key; without one, `[flora] api_key`.")


class _When(Section):
    status: Annotated[tuple[Literal["completed", "failed", "lost"], ...] | None, BeforeValidator(listed)] = None
    run_type: Words | None = None
    technique_id: Words | None = None
    workspace_id: Words | None = None
    output_type: Words | None = None
    metadata: dict[str, Any] | None = None


def _as_filter(checked: _When) -> When:
    return When(**{name: getattr(checked, name) for name in _When.model_fields})


# Typed as the model's own noun, checked by a model of ours, so that an unknown key is an error with its path.
Filter = Annotated[
    When,
    GetPydanticSchema(
        lambda _, handler: core_schema.no_info_after_validator_function(_as_filter, handler.generate_schema(_When))
    ),
]


class Pauses(Section):
    """How long to wait between the attempts of a dispatch."""

    first_seconds: Span = 1
    factor: Annotated[float, Field(ge=1, le=100, allow_inf_nan=False)] = 2
    longest_seconds: Annotated[float, Field(gt=0, le=86_400)] = 1800

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.first_seconds > self.longest_seconds:
            raise ValueError("first_seconds must not be greater than longest_seconds")
        return self


class HandlerEntry(Section):
    """One configured handler. Keys not listed here are the handler's own and land in `options`."""

    use: str = Field(
        min_length=1, description='Entry point name, or `"package.module:Class"`, or `"package.module:function"`.'
    )
    name: str = Field(
        "",
        pattern=r"^[a-z0-9][a-z0-9_.-]{0,63}$",
        validate_default=False,
        description="Unique name, the key of its dispatches; default: `use`.",
    )
    when: Filter | None = Field(
        None, description="Filter: `status`, `run_type`, `technique_id`, `workspace_id`, `output_type`, `metadata`."
    )
    on: Annotated[tuple[Event, ...] | None, BeforeValidator(listed), AfterValidator(not_empty)] = Field(
        None,
        description="Events: `settled`, `cost_final`, `lost`, `diverged`, `dead`; default: the handler's own choice.",
    )
    max_attempts: Count | None = Field(
        None, description="Attempts before it is dead; default: the handler's own, else `[dispatch]`."
    )
    backoff: Pauses | None = Field(
        None, description="Pauses between attempts: `first_seconds` (1), `factor` (2), `longest_seconds` (1800)."
    )
    timeout_seconds: Span | None = Field(
        None, description="Time limit of one call; default: the handler's own, else `[dispatch]`."
    )
    concurrency: Count | None = Field(
        None, description="Calls of this handler at the same time; default: the handler's own, else 8."
    )
    options: dict[str, Any] = Field(default_factory=dict, description="Every further key: the handler's own.")

    @model_validator(mode="before")
    @classmethod
    def _name_it(cls, data: object) -> object:
        if isinstance(data, dict) and isinstance(data.get("use"), str) and not data.get("name"):
            return {**data, "name": data["use"].lower().replace(":", ".")}
        return data
