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
    """Where a run stands in our ledger. Who enters and who leaves is the table in `decide.py`."""

    OPEN = "open"
    """Known and not terminal. Entered when a run is started, tracked or discovered; left by any terminal report."""
    REPORTED = "reported"
    """A verified callback says terminal, not read yet. Entered by a callback; left by a conclusive read."""
    COMPLETED = "completed"
    """Read as completed, with outputs; dispatches exist. Never left."""
    FAILED = "failed"
    """Read as failed; dispatches exist. Never left."""
    LOST = "lost"
    """Given up, with a reason. Left by a later callback, a terminal read or a manual refresh."""


class Origin(StrEnum):
    """How we first heard of a run."""

    STARTED = "started"
    TRACKED = "tracked"
    CALLBACK = "callback"
    DISCOVERED = "discovered"


class Verdict(StrEnum):
    """What a run tells about the callback channel."""

    MATCHED = "matched"
    """Its callback came in time and agreed with the API."""
    RECOVERED = "recovered"
    """Its callback was expected and never came in time: polling settled it."""
    LATE = "late"
    """Its callback came after it had been written off as recovered."""
    DIVERGED = "diverged"
    """Callback and API contradict each other, or two callbacks do."""


class CallbackStatus(StrEnum):
    """What the callbacks of a run have said so far."""

    COMPLETED = "completed"
    FAILED = "failed"
    CONFLICTING = "both"
    """Two callbacks contradicted each other, or one contradicted itself."""


class LostReason(StrEnum):
    """Why a run was given up."""

    DEADLINE = "deadline"
    """Past its deadline, and a read after it said that it is still not terminal."""
    NOT_FOUND = "not_found"
    """Its own route answered 404 again and again."""
    NO_OUTPUTS = "no_outputs"
    """It completed, and its outputs never appeared."""


class Event(StrEnum):
    """What a handler can be told about a run."""

    SETTLED = "settled"
    COST_FINAL = "cost_final"
    LOST = "lost"
    DIVERGED = "diverged"
    DEAD = "dead"


class DispatchState(StrEnum):
    """Where one handler's work on one event of one run stands."""

    READY = "ready"
    """Waiting for its `due_at`. Entered at settling, after a retry, and when a lease is given back."""
    LEASED = "leased"
    """A worker is on it until `lease_until`. Left by the worker's answer, or by anyone once the lease ran out."""
    DONE = "done"
    """The handler answered Done. Left only by a manual re-dispatch."""
    DEAD = "dead"
    """The handler rejected it, or its attempts are used up. Left only by a manual retry."""
    SKIPPED = "skipped"
    """The handler's filter did not match; `last_error` says which part. Never left."""


class Lane(StrEnum):
    """How much a dispatch has to fetch, so that small outputs do not wait behind large ones; see `decide/lanes.py`."""

    LIGHT = "light"
    HEAVY = "heavy"


class OutputType(StrEnum):
    """FLORA's output types. Stored as open strings: an unknown one is kept and treated as a file."""

    IMAGE = "imageUrl"
    VIDEO = "videoUrl"
    AUDIO = "audioUrl"
    DOCUMENT = "documentUrl"
    TEXT = "text"


_MIB = 1024**2
_LIKELY_BYTES: Mapping[str, int] = {
    OutputType.IMAGE: 4 * _MIB,
    OutputType.DOCUMENT: 6 * _MIB,
    OutputType.AUDIO: 8 * _MIB,
    OutputType.VIDEO: 128 * _MIB,
}
"""FLORA names no sizes: what an output of a type may well have."""


@dataclass(frozen=True, slots=True)
class Output:
    """One output of a run. `position` counts from 0 and is the key, since `output_id` may repeat.

    `value` is the URL of the media, or, where `type` is `text`, the text itself.
    """

    position: int
    output_id: str
    type: str
    value: str = field(repr=False)  # media URLs are public: whoever reads a log must not get one

    @property
    def is_text(self) -> bool:
        return self.type == OutputType.TEXT

    @property
    def likely_bytes(self) -> int:
        """A guess before anything is fetched: exact for text, and a type that we do not know may be as large as a video."""
        if self.is_text:
            return len(self.value)
        return _LIKELY_BYTES.get(self.type, _LIKELY_BYTES[OutputType.VIDEO])


@dataclass(frozen=True, slots=True)
class Artifact:
    """One stored output: where a handler put it. `position` -1 is the handler's own manifest of the run."""

    run_id: str
    handler: str
    position: int
    output_id: str
    location: str
    size: int | None
    sha256: str | None
    content_type: str | None
    stored_at: datetime | None
    """None: the place is reserved, the bytes are not safe yet."""


class Run(msgspec.Struct, frozen=True):
    """One row of the run ledger. FLORA's own fields first, then what we know about them."""

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
    """While set, the run was settled without its callback; past it the callback is written off."""
    lost_reason: LostReason | None = None
    losses: int = 0
    """How often the run was given up; the round of its `lost` dispatches."""

    next_poll_at: datetime | None = None
    """When to read the run next; None: never again."""
    polls: int = 0
    unconfirmed_reads: int = 0
    """Reads since something first said that the run is terminal, without one that shows it."""
    failures: int = 0
    """Reads in a row that were not answered."""
    missing: int = 0
    """404s in a row on the run's right route."""
    missing_since: datetime | None = None
    cost_due_at: datetime | None = None
    """While set, the run is settled but its cost is not known; past it we stop asking."""
    version: int = 0
    """Guards every write: a row that changed meanwhile is decided about again."""


class Snapshot(msgspec.Struct, frozen=True):
    """What the API shows of a run in one answer."""

    run_id: str
    status: str
    """FLORA's word: `pending`, `running`, `completed` or `failed`; anything else counts as not terminal."""
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


class CallbackReceived(msgspec.Struct, frozen=True):
    """Report: a verified callback says that a run is terminal."""

    run_id: str
    callback_status: CallbackStatus
    received_at: datetime
    run_type: str | None = None
    workspace_id: str | None = None
    error_code: str | None = None
    error_message: str | None = None


class RunRead(msgspec.Struct, frozen=True):
    """Report: the API showed the run. `requested_at` is when the request was sent."""

    snapshot: Snapshot
    requested_at: datetime
    origin: Origin | None = None
    """Set where a list shows a run that nobody registered and that we want to adopt."""

    @property
    def run_id(self) -> str:
        return self.snapshot.run_id


class RunNotFound(msgspec.Struct, frozen=True):
    """Report: the API answered 404. It counts against the run only if asked on the run's `conclusive`."""

    run_id: str
    requested_at: datetime
    conclusive: bool


class ReadFailed(msgspec.Struct, frozen=True):
    """Report: the API did not tell (401, 403, 429, 5xx, time-out, garbage, absent from a list)."""

    run_id: str
    requested_at: datetime
    retry_after: float | None = None
    """Seconds, when FLORA named them."""


class RunRegistered(msgspec.Struct, frozen=True):
    """Report: a run exists, says whoever started or tracks it. Fills in what callbacks do not carry."""

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
    """Report: an operator, or an authentic callback at a wrong time, wants the run read now."""

    run_id: str
    requested_at: datetime


class CallbackExpired(msgspec.Struct, frozen=True):
    """Report: FLORA has given up on delivering the callback of a run."""

    run_id: str


Report = RunRegistered | CallbackReceived | RunRead | RunNotFound | ReadFailed | ReadRequested | CallbackExpired


class Delivery(msgspec.Struct, frozen=True):
    """One verified callback, as it came. `delivery_id` is FLORA's, the same on every retry."""

    delivery_id: str
    body: bytes
    signature: str
    received_at: datetime
    age: int
    """Seconds between signing and arrival; negative when signed ahead of our clock."""
    secret: int
    """Index of the configured secret that verified it."""
    event: str | None = None
    api_version: str | None = None
    run_id: str | None = None
    readable: bool = True
    """False: the signature holds, the body does not parse; kept under an id made from its hash."""

    def __repr__(self) -> str:
        return _repr_without(self, "body")


@dataclass(frozen=True, slots=True)
class When:
    """A handler's filter: every given field must match, a tuple means any of; `output_type` asks for one."""

    status: tuple[str, ...] | None = None
    run_type: tuple[str, ...] | None = None
    technique_id: tuple[str, ...] | None = None
    workspace_id: tuple[str, ...] | None = None
    output_type: tuple[str, ...] | None = None
    metadata: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Subscription:
    """One configured handler, as far as the rules need it: its name, its events, its filter."""

    handler: str
    on: tuple[Event, ...] = (Event.SETTLED,)
    when: When = field(default_factory=When)


class Dispatch(msgspec.Struct, frozen=True):
    """One handler's work on one event of one run; `round` counts re-dispatches made with `--again`."""

    run_id: str
    handler: str
    event: Event
    round: int
    state: DispatchState
    due_at: datetime
    attempts: int = 0
    last_error: str | None = None
    lease_token: str | None = None
    lease_until: datetime | None = None
    lane: Lane = Lane.LIGHT
    result: Mapping[str, Any] | None = None
    """What its handler said about itself when it was done."""

    @property
    def idempotency_key(self) -> str:
        return f"{self.run_id}:{self.handler}:{self.event}:{self.round}"


class StartState(StrEnum):
    """Where an intent to start a run stands."""

    ASKING = "asking"
    """Committed; FLORA is being asked, or will be again. Left by FLORA's answer, or by the run's own callback."""
    STARTED = "started"
    """`run_id` names the run. Never left."""
    REFUSED = "refused"
    """FLORA said no, and why. Left by asking again with the same key."""
    UNKNOWN = "unknown"
    """FLORA may have a run and we cannot tell which. Left by its callback, or by an operator's word."""


class Operation(StrEnum):
    """FLORA's two ways to start a run."""

    TECHNIQUE_RUN = "technique_run"
    """`POST /techniques/{technique_id}/runs`"""
    GENERATE = "generate"
    """`POST /generate`"""


class Start(msgspec.Struct, frozen=True):
    """The intent to start a run, committed before FLORA is asked.

    The key is (workspace_id, operation, technique_id, idempotency_key); `token` is in the callback's URL and links a
    callback to its start even when the answer to the start was never heard.
    """

    token: str
    workspace_id: str
    """Whose API key asks; empty: the default one."""
    operation: Operation
    technique_id: str
    """Empty for `generate`."""
    idempotency_key: str
    request: str
    """The JSON body that FLORA gets, byte for byte on every attempt."""
    request_hash: str
    """SHA-256 of what the caller asked for: the same key with another one is a conflict."""
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
    """FLORA's `request-id` of the last answer: its support asks for it."""

    def __repr__(self) -> str:
        return _repr_without(self, "token", "request")


class Rejection(msgspec.Struct, frozen=True):
    """One refused request; never its body."""

    rejected_at: datetime
    code: str
    remote: str | None
    size: int


def storable_text(text: str) -> str:
    """Replace what no database stores as text, NUL and lone surrogates, by U+FFFD."""
    return _UNSTORABLE.sub("\ufffd", text)


def parse_strict_json(text: str) -> Any:
    """Return the value of a JSON text; ValueError or RecursionError if it is none. NaN and Infinity are refused."""
    return json.loads(text, parse_constant=_refuse_constant)


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _repr_without(value: msgspec.Struct, *hidden: str) -> str:
    """Return what `repr` shows of a value that may be logged, without the fields that must not be."""
    shown = (f"{name}={getattr(value, name)!r}" for name in value.__struct_fields__ if name not in hidden)
    return f"{type(value).__name__}({', '.join(shown)})"
