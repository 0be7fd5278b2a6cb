"""The objects of the operations API, one model for each. Times are ISO 8601 in UTC.

`web.ops` fills them, `ReceiverClient` reads them, and the OpenAPI document prints their schemas,
where the suffix `View` is left out. Unknown fields are ignored; fields that an older service does
not send have a default.
"""

from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import unquote, urlsplit

from pydantic import (
    AliasChoices,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    WithJsonSchema,
    computed_field,
)

from receiver.model import DispatchState, RunState, StartState

__all__ = ["ArtifactView", "DispatchView", "ErrorView", "OutputView", "RunView", "StartView"]


def _to_pairs(rows: Any) -> Any:
    """Return `[{"field", "message"}]` as pairs; pairs stay as they are."""
    return [
        (str(row.get("field", "")), str(row.get("message", ""))) if isinstance(row, Mapping) else row
        for row in rows or ()
    ]


def _from_pairs(pairs: tuple[tuple[str, str], ...]) -> list[dict[str, str]]:
    return [{"field": field, "message": message} for field, message in pairs]


_FIELDS_SCHEMA = {
    "type": "array",
    "items": {"type": "object", "properties": {"field": {"type": "string"}, "message": {"type": "string"}}},
}

Time = Annotated[datetime, PlainSerializer(datetime.isoformat, when_used="json")]
# The schema lists the states, the type does not: a newer service may have added one.
_RunState = Annotated[str, WithJsonSchema({"type": "string", "enum": [state.value for state in RunState]})]
_DispatchState = Annotated[str, WithJsonSchema({"type": "string", "enum": [*DispatchState]})]
_StartState = Annotated[str, WithJsonSchema({"type": "string", "enum": [*StartState]})]
_Fields = Annotated[
    tuple[tuple[str, str], ...],
    BeforeValidator(_to_pairs),
    PlainSerializer(_from_pairs, when_used="json"),
    WithJsonSchema(_FIELDS_SCHEMA),
]


class Message(BaseModel):
    """A JSON object of the operations API."""

    model_config = ConfigDict(
        defer_build=True,
        frozen=True,
        from_attributes=True,
        hide_input_in_errors=True,
        use_attribute_docstrings=True,
    )

    def to_json(self) -> dict[str, Any]:
        """Return the object as it is sent: the fields that were set, and no computed ones."""
        return self.model_dump(mode="json", exclude_unset=True, round_trip=True)


class ErrorView(Message):
    """Why FLORA or the service refused a request."""

    code: str = "unknown"
    message: str = ""
    status: int | None = None
    """FLORA's HTTP status, if FLORA refused."""
    fields: _Fields = ()
    """The fields at fault and what is wrong with each, as pairs of (field, message)."""
    request_id: str | None = None
    """FLORA's `request-id`, which its support asks for."""


class OutputView(Message):
    """One output of a run."""

    position: int
    output_id: str
    type: str
    value: str = Field(repr=False)
    """The URL of the media, or the text itself if `type` is `text`."""


class ArtifactView(Message):
    """Where a handler stored an output."""

    handler: str
    position: int
    """The position of the output, or -1 for the handler's own manifest of the run."""
    output_id: str
    location: str
    size: int | None
    sha256: str | None
    content_type: str | None
    stored_at: Time | None = None
    """When the bytes were safely stored; null while the location is only reserved."""

    @computed_field  # type: ignore[prop-decorator]  # mypy has no decorated properties
    @property
    def stored(self) -> bool:
        """Whether the bytes are safely stored; False while the location is only reserved."""
        return self.stored_at is not None

    @property
    def path(self) -> Path | None:
        """The file on this machine's disk, or None if it is stored elsewhere."""
        parts = urlsplit(self.location)
        return Path(unquote(parts.path)) if parts.scheme == "file" else None


class DispatchView(Message):
    """One handler's work on one event of a run."""

    handler: str
    event: str
    round: int
    state: _DispatchState
    attempts: int
    """Calls of the handler so far, those before a manual retry included."""
    last_error: str | None
    orphaned: bool = False
    """Whether it waits for a handler that is not configured."""
    result: dict[str, Any] | None = None
    """What the handler returned when it was done. Left out of lists of dispatches."""
    run_id: str | None = None
    due_at: Time | None = None


class Start(Message):
    """A request to start a run, committed before FLORA receives it."""

    state: _StartState
    run_id: str | None
    idempotency_key: str
    token: str = Field(repr=False)
    """Names the start for `resolve`."""
    error: ErrorView | None = None
    """Why FLORA refused, or its last error while the state is `asking`."""
    operation: str | None = None
    technique_id: str | None = None
    workspace_id: str | None = None
    created_at: Time | None = None
    asked_again_at: Time | None = None
    """When the request to FLORA is due again; null unless an attempt has failed."""
    attempts: int = 0
    callback_expected: bool = True
    metadata: dict[str, Any] = {}


class HoldView(Message):
    """Why a run is not read from FLORA now, though it may be due."""

    reason: str
    until: Time
    """When the next attempt is made."""


class ReadView(Message):
    """A read of a run from FLORA, and what came of it."""

    requested_at: Time
    source: str
    """What was requested: `run`, or a `list` in which the run was looked for."""
    outcome: str
    """`returned`, `not_found` (FLORA's 404), or `failed`: it has shown nothing about the run."""
    run_status: str | None = None
    """FLORA's status of the run, if it returned the run."""
    http_status: int | None = None
    """Null if no response came, or nothing was sent."""
    problem: str | None = None
    """What was wrong with the response, or with what it says."""
    request_id: str | None = None
    """FLORA's `request-id`, which its support asks for."""
    seconds: float | None = None
    """How long it took."""


class RunView(Message):
    """A run as the ledger has it."""

    run_id: str
    state: _RunState
    settled: bool
    """Whether the final state was read from FLORA."""
    finished: bool = False
    """Whether the run is over and no handler has any work left to do on it."""
    verdict: str | None = None
    """How the callback compares with the run: `matched`, `recovered`, `diverged` and so on."""
    origin: str | None = None
    run_type: str | None = None
    technique_id: str | None = None
    workspace_id: str | None = None
    project_id: str | None = None
    poll_url: str | None = None
    """FLORA's address of the run. The service takes ids from it, and never requests it."""
    progress: int | None = None
    first_seen_at: Time | None = None
    created_at: Time | None = None
    started_at: Time | None = None
    completed_at: Time | None = None
    reported_at: Time | None = None
    settled_at: Time | None = None
    deadline_at: Time | None = None
    next_poll_at: Time | None = None
    polls: int = 0
    """How many reads have shown what FLORA knows of the run."""
    failed_polls: int = 0
    """How many reads have failed: they have shown nothing about the run."""
    reads_held: HoldView | None = None
    """Why it is not read now, such as an API key that FLORA refuses. Left out of lists."""
    callback_expected: bool = True
    callback_status: str | None = Field(None, validation_alias=AliasChoices("callback_status", "told"))
    """What callbacks reported: `completed`, `failed`, or `both` if they contradict each other."""
    told: str | None = Field(None, deprecated=True)
    """The same as `callback_status`, which replaces it."""
    error_code: str | None = None
    error_message: str | None = None
    lost_reason: str | None = None
    charged_cost: float | None = None
    """US dollars, as FLORA bills them; may change until `cost_final`."""
    quoted_cost: float | None = None
    """US dollars."""
    cost_final: bool
    metadata: dict[str, Any] = {}
    outputs: tuple[OutputView, ...] = ()
    """Left out of lists, like the four fields below: read the run by its id."""
    last_reads: tuple[ReadView, ...] = ()
    """The last ten reads, oldest first."""
    artifacts: tuple[ArtifactView, ...] = ()
    dispatches: tuple[DispatchView, ...] = ()
    start: Start | None = None

    @property
    def succeeded(self) -> bool:
        """Whether the run completed and no handler failed."""
        return (
            self.state == "completed"
            and self.finished
            and all(one.state != "dead" for one in self.dispatches)
        )

    @property
    def files(self) -> tuple[ArtifactView, ...]:
        """The stored outputs in order, without the handlers' manifests."""
        return tuple(one for one in self.artifacts if one.stored and one.position >= 0)


class StartView(Start):
    """The outcome of a start: `started`, or `asking` while FLORA has not responded.

    Other outcomes are raised as ReceiverApiError.
    """

    run: RunView | None = None
    repeated: bool = False
    """Whether the idempotency key was known, so that nothing was started now."""


class DeliveryView(Message):
    """A callback that was received."""

    delivery_id: str
    run_id: str | None
    event: str | None
    api_version: str | None
    received_at: Time
    age_seconds: int
    readable: bool
    duplicates: int
    last_duplicate_at: Time | None
    signature: str | None = None
    """Left out of lists, like `body`."""
    body: str | None = None
    """The raw body; null once it is past its retention."""


class RejectionView(Message):
    """A request to the public listener that was refused."""

    rejected_at: Time
    code: str
    remote: str | None
    size: int


class TechniqueInput(Message):
    """An input that a technique declares."""

    id: str
    type: str
    name: str | None
    optional: bool


class TechniqueOutput(Message):
    """An output that a technique declares."""

    id: str
    type: str
    name: str | None


class TechniqueView(Message):
    """A technique as FLORA describes it."""

    technique_id: str
    slug: str | None
    name: str | None
    inputs: tuple[TechniqueInput, ...]
    outputs: tuple[TechniqueOutput, ...]
    run_cost: float | None
    """US dollars."""


class ChannelHealth(Message):
    """Whether callbacks arrive, and if not, the likely cause and its fix."""

    ok: bool
    matched: int
    recovered: int
    diverged: int
    lost: int
    cause: str | None
    cure: str | None


class ChannelView(Message):
    """The callback channel over the last 24 hours."""

    since: Time
    health: ChannelHealth
    late: int
    arrivals: int
    refusals: dict[str, int]
    """Refused requests by code."""
    hours: tuple[dict[str, Any], ...]
    """One object for each hour: `hour`, and the number of runs by verdict."""


class TimelineEntry(Message):
    """Something that happened to a run; the other fields depend on `kind`."""

    model_config = ConfigDict(extra="allow")

    at: Time
    kind: str


class TimelineView(Message):
    """What happened to a run, oldest entry first."""

    run_id: str
    run: RunView
    reads: int
    """How many reads have shown what FLORA knows of the run."""
    failed_reads: int = 0
    """How many reads have failed. The last ten of both kinds are entries of the kind `read`."""
    entries: tuple[TimelineEntry, ...]


# --- responses ----------------------------------------------------------------------------------


class OneRun(Message):
    """A run."""

    run: RunView


class OneTechnique(Message):
    """A technique."""

    technique: TechniqueView


class OneDelivery(Message):
    """A callback."""

    delivery: DeliveryView


class Started(Message):
    """The outcome of a start."""

    start: Start
    run: RunView | None = None
    repeated: bool = False
    """Whether the idempotency key was known, so that nothing was started now."""


class Armed(Message):
    """How many dispatches are due again."""

    dispatches: int
    armed: tuple[DispatchView, ...]
    """The first hundred."""
    more: bool = False
    """Whether to send the request again for the rest."""
    next_cursor: str | None = None
    """The `cursor` of that request, for `dispatches/retry`; `runs/redispatch` needs none."""


class Backup(Message):
    """A copy of the ledger."""

    path: str
    size: int
    """Bytes."""


class Refused(Message):
    """Why a request was refused."""

    error: ErrorView
    start: Start | None = None
    """The start that was refused. Of `POST /api/runs` and `resolve` alone."""
    idempotency_key: str | None = None
    """Repeats the request without starting a second run. Of `POST /api/runs` alone."""


class Page(Message):
    """One page of a list, newest first."""

    next_cursor: str | None
    """The `cursor` of the next page, or null on the last one."""


class RunPage(Page):
    """A page of runs."""

    runs: tuple[RunView, ...]


class StartPage(Page):
    """A page of starts."""

    starts: tuple[Start, ...]


class DeliveryPage(Page):
    """A page of callbacks."""

    deliveries: tuple[DeliveryView, ...]


class RejectionPage(Page):
    """A page of refused requests."""

    rejections: tuple[RejectionView, ...]


class DispatchPage(Page):
    """A page of dispatches."""

    dispatches: tuple[DispatchView, ...]
