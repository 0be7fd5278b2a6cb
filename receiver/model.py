"""The values of the service. Every other module may import this one; it imports none of them.

Times are aware UTC datetimes named `*_at`; ids are FLORA's own strings; money is US dollars.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import Any

import msgspec

_UNSTORABLE = re.compile("[\x00\ud800-\udfff]")


class RunState(StrEnum):
    """The state of a run in the ledger. Transitions are the table in `decide/reconcile.py`."""

    OPEN = "open"
    """Known and not terminal. Entered when a run is started, tracked or discovered; left when a
    terminal status is reported."""
    REPORTED = "reported"
    """A verified callback reports the end, and no read has confirmed it. Left by a conclusive
    read."""
    COMPLETED = "completed"
    """Read as completed, with outputs; its dispatches exist. Final."""
    FAILED = "failed"
    """Read as failed; its dispatches exist. Final."""
    LOST = "lost"
    """Given up for a reason. Left by a later callback, a terminal read or a manual refresh."""


class Origin(StrEnum):
    """How a run first became known."""

    STARTED = "started"
    TRACKED = "tracked"
    CALLBACK = "callback"
    DISCOVERED = "discovered"


class Verdict(StrEnum):
    """What a run shows about the callback channel."""

    MATCHED = "matched"
    """Its callback arrived in time and agreed with the API."""
    RECOVERED = "recovered"
    """Its callback was expected and did not arrive in time: polling settled the run."""
    LATE = "late"
    """Its callback arrived after the run had been judged as recovered."""
    DIVERGED = "diverged"
    """Its callback and the API contradict each other, or two callbacks do."""


class CallbackStatus(StrEnum):
    """The status that the callbacks of a run have reported so far."""

    COMPLETED = "completed"
    FAILED = "failed"
    CONFLICTING = "both"
    """Two callbacks contradicted each other, or one contradicted itself."""


class LostReason(StrEnum):
    """Why a run was given up."""

    DEADLINE = "deadline"
    """A read after its deadline showed that it is still not terminal."""
    NOT_FOUND = "not_found"
    """Its own route has repeatedly answered 404."""
    NO_OUTPUTS = "no_outputs"
    """It completed, but its outputs never appeared."""


class Event(StrEnum):
    """What a handler can subscribe to."""

    SETTLED = "settled"
    """The run has completed or failed."""
    COST_FINAL = "cost_final"
    """The cost of a settled run is final: FLORA has stated it, or has not within the time for it."""
    LOST = "lost"
    """The run was given up: it did not end before its deadline, was not found, or has no outputs."""
    DIVERGED = "diverged"
    """The callback and the API contradict each other."""
    DEAD = "dead"
    """A handler has rejected the run, or has used up its attempts."""


class DispatchState(StrEnum):
    """The state of one handler's work on one event of one run."""

    READY = "ready"
    """Waiting for its `due_at`. Entered at settling, after a retry, and when a lease is
    released."""
    LEASED = "leased"
    """A worker holds it until `lease_until`. Left when the handler answers, or after the lease has
    expired."""
    DONE = "done"
    """The handler answered Done. Left only by a manual re-dispatch."""
    DEAD = "dead"
    """The handler rejected it, or its attempts are exhausted. Left only by a manual retry."""
    SKIPPED = "skipped"
    """The handler's filter did not match; `last_error` names the part. Final."""


class Lane(StrEnum):
    """How much a dispatch has to download; see `decide/lanes.py`."""

    LIGHT = "light"
    HEAVY = "heavy"


class OutputType(StrEnum):
    """FLORA's types of outputs. An unknown type is kept as it is and treated as a file."""

    IMAGE = "imageUrl"
    """A picture, by URL."""
    VIDEO = "videoUrl"
    """A video, by URL."""
    AUDIO = "audioUrl"
    """A sound, by URL."""
    DOCUMENT = "documentUrl"
    """A document, by URL."""
    TEXT = "text"
    """A text, which stands in the output itself."""


_MIB = 1024**2
_LIKELY_BYTES: Mapping[str, int] = {
    OutputType.IMAGE: 4 * _MIB,
    OutputType.DOCUMENT: 6 * _MIB,
    OutputType.AUDIO: 8 * _MIB,
    OutputType.VIDEO: 128 * _MIB,
}
"""Typical sizes, since FLORA reports none."""


@dataclass(frozen=True, slots=True)
class Output:
    """One output of a run."""

    position: int
    """The place among the run's outputs, from 0. It identifies the output; `output_id` may repeat."""
    output_id: str
    """FLORA's id of the output."""
    type: str
    """An `OutputType`, or a type that FLORA has added since."""
    value: str = field(repr=False)  # media URLs are public: a log line must not contain one
    """The URL of the media; the text itself where `type` is `text`."""

    @property
    def is_text(self) -> bool:
        """Whether `value` is the text itself."""
        return self.type == OutputType.TEXT

    @property
    def likely_bytes(self) -> int:
        """The size to expect before anything is fetched, in bytes: exact for text, else by type."""
        if self.is_text:
            return len(self.value)
        return _LIKELY_BYTES.get(self.type, _LIKELY_BYTES[OutputType.VIDEO])


def unnamed_output_id(position: int) -> str:
    """Return the id of an output to which FLORA gives none."""
    return f"output_{position}"


@dataclass(frozen=True, slots=True)
class Artifact:
    """Something that a handler has stored for a run, or has reserved a location for."""

    run_id: str
    """The run that it belongs to."""
    handler: str
    """The name of the handler that stored it."""
    position: int
    """The position of the output, or a negative number for a manifest or a thumbnail."""
    output_id: str
    """FLORA's id of the output."""
    location: str
    """Where it is stored, in the form that the handler uses."""
    size: int | None
    """Its size in bytes; None until it is stored."""
    sha256: str | None
    """The SHA-256 of its bytes as lower-case hex digits; None until it is stored."""
    content_type: str | None
    """The content type, where the server of the output stated one."""
    stored_at: datetime | None
    """When it was stored; None while the location is only reserved."""


class Run(msgspec.Struct, frozen=True):
    """One row of the run ledger: FLORA's own fields first, then those of the receiver."""

    run_id: str
    state: RunState
    origin: Origin
    first_seen_at: datetime
    deadline_at: datetime
    run_type: str | None = None
    technique_id: str | None = None
    workspace_id: str | None = None
    project_id: str | None = None
    poll_url: str | None = None
    progress: int | None = None
    created_at: datetime | None = None
    started_at: datetime | None = None
    completed_at: datetime | None = None
    error_code: str | None = None
    error_message: str | None = None
    charged_cost: float | None = None
    quoted_cost: float | None = None
    metadata: Mapping[str, Any] = msgspec.field(default_factory=dict)

    callback_expected: bool = True
    callback_status: CallbackStatus | None = None
    reported_at: datetime | None = None
    """When the first verified callback arrived."""
    settled_at: datetime | None = None
    verdict: Verdict | None = None
    verdict_due_at: datetime | None = None
    """Set while a settled run still waits for its callback; after it, the callback has expired."""
    lost_reason: LostReason | None = None
    losses: int = 0
    """How often the run was given up; numbers the rounds of its `lost` dispatches."""

    next_poll_at: datetime | None = None
    """When to read the run next; None if it need not be read again."""
    polls: int = 0
    """Reads, whatever came of them."""
    failed_polls: int = 0
    """Those of them that have shown nothing about the run."""
    unconfirmed_reads: int = 0
    """Reads since the run was first reported as terminal that did not confirm it."""
    failures: int = 0
    """Consecutive reads that failed."""
    missing: int = 0
    """Consecutive 404s on a route that must know the run."""
    missing_since: datetime | None = None
    cost_due_at: datetime | None = None
    """Set while the cost of a settled run is unknown; after it, the cost is not read again."""
    version: int = 0
    """Guards every write: if a row has changed in the meantime, the decision is made again."""


class Snapshot(msgspec.Struct, frozen=True):
    """A run as one response of the API shows it."""

    run_id: str
    status: str
    """FLORA's own: `pending`, `running`, `completed` or `failed`; others count as not terminal."""
    run_type: str | None = None
    technique_id: str | None = None
    workspace_id: str | None = None
    project_id: str | None = None
    poll_url: str | None = None
    progress: int | None = None
    created_at: datetime | None = None
    started_at: datetime | None = None
    completed_at: datetime | None = None
    error_code: str | None = None
    error_message: str | None = None
    charged_cost: float | None = None
    outputs: tuple[Output, ...] = ()
    unnamed: frozenset[int] = frozenset()
    """The positions of outputs to which FLORA gives no id."""


class CallbackReceived(msgspec.Struct, frozen=True):
    """Report: a verified callback said that a run is terminal."""

    run_id: str
    callback_status: CallbackStatus
    received_at: datetime
    run_type: str | None = None
    workspace_id: str | None = None
    error_code: str | None = None
    error_message: str | None = None


class ReadOutcome(StrEnum):
    """What a read of a run has shown."""

    RETURNED = "returned"
    """FLORA returned the run."""
    NOT_FOUND = "not_found"
    """FLORA answered 404: it does not know the run, or not on this route."""
    FAILED = "failed"
    """There is no answer about the run; `problem` says why."""


class ReadAttempt(msgspec.Struct, frozen=True):
    """One read of a run and what came of it. The ledger keeps the last of each run."""

    requested_at: datetime
    source: str
    """What was requested: `run`, or a `list` in which the run was looked for."""
    outcome: ReadOutcome
    run_status: str | None = None
    """FLORA's status of the run, if it returned the run."""
    http_status: int | None = None
    """None if no response came, or nothing was sent."""
    problem: str | None = None
    """What was wrong with the response, or with what it says."""
    request_id: str | None = None
    """FLORA's `request-id`, which its support asks for."""
    seconds: float | None = None
    """How long the request took."""


class RunRead(msgspec.Struct, frozen=True):
    """Report: the API returned the run. `requested_at` is when the request was sent."""

    snapshot: Snapshot
    requested_at: datetime
    origin: Origin | None = None
    """Set if the run is to be added to the ledger, should it be unknown."""
    attempt: ReadAttempt | None = None

    @property
    def run_id(self) -> str:
        return self.snapshot.run_id


class RunNotFound(msgspec.Struct, frozen=True):
    """Report: the API answered 404. Counts only if `conclusive`: the route must know the run."""

    run_id: str
    requested_at: datetime
    conclusive: bool
    attempt: ReadAttempt | None = None


class ReadFailed(msgspec.Struct, frozen=True):
    """Report: a read had no result (401, 403, 429, 5xx, timeout, invalid body, not in the list)."""

    run_id: str
    requested_at: datetime
    retry_after: float | None = None
    """In seconds, if FLORA named one."""
    attempt: ReadAttempt | None = None
    stays_due: bool = False
    """Whether the run is to be read as soon as its API key is accepted."""


class RunRegistered(msgspec.Struct, frozen=True):
    """Report: a run was started or is to be tracked. Has the fields that callbacks do not carry."""

    run_id: str
    origin: Origin
    registered_at: datetime
    callback_expected: bool = True
    run_type: str | None = None
    technique_id: str | None = None
    workspace_id: str | None = None
    project_id: str | None = None
    poll_url: str | None = None
    quoted_cost: float | None = None
    estimated_seconds: float | None = None
    metadata: Mapping[str, Any] = msgspec.field(default_factory=dict)


class ReadRequested(msgspec.Struct, frozen=True):
    """Report: a read is requested, by an operator or after a callback with a wrong timestamp."""

    run_id: str
    requested_at: datetime


class CallbackExpired(msgspec.Struct, frozen=True):
    """Report: FLORA no longer tries to deliver the callback of a run."""

    run_id: str


Report = (
    RunRegistered | CallbackReceived | RunRead | RunNotFound | ReadFailed | ReadRequested | CallbackExpired
)


class Delivery(msgspec.Struct, frozen=True):
    """One verified callback as received. `delivery_id` is FLORA's, the same on every retry."""

    delivery_id: str
    body: bytes
    signature: str
    received_at: datetime
    age: int
    """Seconds between signing and arrival; negative if FLORA's clock is ahead."""
    secret: int
    """Index of the configured secret that verified it."""
    event: str | None = None
    api_version: str | None = None
    run_id: str | None = None
    readable: bool = True
    """False if the body could not be parsed; `delivery_id` is then made from its hash."""

    def __repr__(self) -> str:
        return _repr_without(self, "body")


@dataclass(frozen=True, slots=True)
class When:
    """A handler's filter. Every field that is given must match; None matches every run."""

    status: tuple[str, ...] | None = None
    """Any of these statuses."""
    run_type: tuple[str, ...] | None = None
    """Any of these run types."""
    technique_id: tuple[str, ...] | None = None
    """Any of these techniques."""
    workspace_id: tuple[str, ...] | None = None
    """Any of these workspaces."""
    output_type: tuple[str, ...] | None = None
    """At least one output has any of these types."""
    metadata: Mapping[str, Any] | None = None
    """The run's metadata contains all of these keys with these values."""


@dataclass(frozen=True, slots=True)
class Subscription:
    """The name, events and filter of one configured handler."""

    handler: str
    on: tuple[Event, ...] = (Event.SETTLED,)
    when: When = field(default_factory=When)


class Dispatch(msgspec.Struct, frozen=True):
    """One handler's work on one event of one run; `round` counts re-dispatches with `--again`."""

    run_id: str
    handler: str
    event: Event
    round: int
    state: DispatchState
    due_at: datetime
    attempts: int = 0
    """Those that count against the limit: made since it was last retried by hand."""
    last_error: str | None = None
    lease_token: str | None = None
    lease_until: datetime | None = None
    lane: Lane = Lane.LIGHT
    result: Mapping[str, Any] | None = None
    """The details that the handler gave with `Done`."""
    last_attempt: int = 0
    """The number of its latest attempt in its history, which goes on when it is retried by hand."""

    @property
    def idempotency_key(self) -> str:
        return f"{self.run_id}:{self.handler}:{self.event}:{self.round}"


class StartState(StrEnum):
    """The state of an intent to start a run."""

    ASKING = "asking"
    """Committed; the request is being sent to FLORA, or will be repeated. Left by FLORA's response
    or the run's own callback."""
    STARTED = "started"
    """`run_id` names the run. Final."""
    REFUSED = "refused"
    """FLORA refused the start. Left by a new request with the same key."""
    UNKNOWN = "unknown"
    """FLORA may have started a run, and it is not known which. Left by its callback or by an
    operator."""


class Operation(StrEnum):
    """FLORA's two ways to start a run."""

    TECHNIQUE_RUN = "technique_run"
    """`POST /techniques/{technique_id}/runs`"""
    GENERATE = "generate"
    """`POST /generate`"""


class Start(msgspec.Struct, frozen=True):
    """The intent to start a run, committed before the request is sent to FLORA.

    The key is (workspace_id, operation, technique_id, idempotency_key). `token` is part of the
    callback's URL and links a callback to its start even if FLORA's response never arrived.
    """

    token: str
    workspace_id: str
    """The workspace whose API key is used; empty for the default key."""
    operation: Operation
    technique_id: str
    """Empty for `generate`."""
    idempotency_key: str
    request: str
    """The JSON body sent to FLORA, byte for byte the same on every attempt."""
    request_hash: str
    """SHA-256 of the caller's request: the same key with another request is a conflict."""
    metadata: Mapping[str, Any]
    callback_expected: bool
    state: StartState
    created_at: datetime
    due_at: datetime
    attempts: int = 0
    run_id: str | None = None
    error_status: int | None = None
    error_code: str | None = None
    error_message: str | None = None
    error_fields: tuple[tuple[str, str], ...] = ()
    request_id: str | None = None
    """FLORA's `request-id` of the last response, for inquiries to its support."""

    def __repr__(self) -> str:
        return _repr_without(self, "token", "request")


class Rejection(msgspec.Struct, frozen=True):
    """One refused request; never its body."""

    rejected_at: datetime
    code: str
    remote: str | None
    size: int


def is_storable(text: str) -> bool:
    """Return whether every database stores a text: it holds no NUL and no lone surrogate."""
    return _UNSTORABLE.search(text) is None


def storable_text(text: str) -> str:
    """Return a text with U+FFFD in place of NUL and lone surrogates, which no database stores."""
    return _UNSTORABLE.sub("\ufffd", text)


def parse_strict_json(text: str) -> Any:
    """Return the value of a JSON text. NaN and Infinity are refused.

    Raises ValueError or RecursionError if the text is not JSON.
    """
    return json.loads(text, parse_constant=_refuse_constant)


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _repr_without(value: msgspec.Struct, *hidden: str) -> str:
    """Return the usual `repr` of a value without fields that must not be logged."""
    shown = (f"{name}={getattr(value, name)!r}" for name in value.__struct_fields__ if name not in hidden)
    return f"{type(value).__name__}({', '.join(shown)})"
