"""The contract of handlers: everything that a handler imports from the receiver.

A handler is a class with a pydantic model `Config`, of which it is built as `cls(config)`, and
`async def handle(self, run, context) -> Done | Retry | Reject`. Delivery is at least once with a
stable `context.idempotency_key`, so the effect must be idempotent. `handle` runs on the service's
event loop: blocking calls belong in a thread. `handlers/WRITING.md` is the guide.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, ClassVar, Protocol, runtime_checkable

from pydantic import BaseModel

from receiver.config.values import Secret
from receiver.errors import (
    AttemptOverError,
    DownloadError,
    DownloadFailedError,
    DownloadRefusedError,
    LocationTakenError,
    MissingExtraError,
    PostError,
    PostFailedError,
    PostRefusedError,
    TargetDegradedError,
    TargetUnreachableError,
)
from receiver.model import Artifact, Event, Output, OutputType, RunState, When, storable_text
from receiver.net.download import Download, Saved
from receiver.net.ownership import make_directory, match_owner
from receiver.net.post import Posted, Poster, header_value, target_url, usable_headers
from receiver.net.retry_after import growing_pause

__all__ = [
    "MANIFEST",
    "THUMBNAIL",
    "Answer",
    "Artifact",
    "AttemptOverError",
    "Checks",
    "Closes",
    "Context",
    "DescribesSchema",
    "Done",
    "Download",
    "DownloadError",
    "DownloadFailedError",
    "DownloadRefusedError",
    "Event",
    "Handler",
    "LocationTakenError",
    "Log",
    "MissingExtraError",
    "Output",
    "OutputType",
    "PostError",
    "PostFailedError",
    "PostRefusedError",
    "Posted",
    "Poster",
    "Reject",
    "Retry",
    "RunState",
    "Saved",
    "Secret",
    "SettledRun",
    "TargetDegradedError",
    "TargetUnreachableError",
    "When",
    "growing_pause",
    "header_value",
    "make_directory",
    "match_owner",
    "needs",
    "storable_text",
    "target_url",
    "usable_headers",
]

MANIFEST = -1
"""The position of the artifact that describes a run as a whole."""

THUMBNAIL = -2
"""The position of the thumbnail of output 0; the thumbnail of output n is at `THUMBNAIL - n`."""


@dataclass(frozen=True, slots=True)
class Done:
    """The answer of a handler whose effect is applied."""

    result: Mapping[str, Any] = field(default_factory=dict)
    """A small JSON object, stored with the dispatch and shown to operators."""


@dataclass(frozen=True, slots=True)
class Retry:
    """The answer of a handler that cannot work now. The dispatch is attempted again."""

    reason: str
    """The reason for operators, shown without secrets and media URLs."""
    after_seconds: float | None = None
    """The pause before the next attempt; None stands for the growing pause of the settings."""
    reread: bool = False
    """Whether the run is first read from FLORA again, for new URLs of outputs that have expired."""


@dataclass(frozen=True, slots=True)
class Reject:
    """The answer of a handler that can never succeed.

    The dispatch is dead, and an error is logged.
    """

    reason: str
    """The reason for operators, shown without secrets and media URLs."""


Answer = Done | Retry | Reject
"""What `Handler.handle` returns. An exception means Retry."""


@dataclass(frozen=True, slots=True)
class SettledRun:
    """A run as handlers see it. Times are timezone-aware and in UTC."""

    run_id: str
    """FLORA's id of the run."""
    run_type: str
    """`generation`, `technique` or `action`; `unknown` where FLORA does not say."""
    status: str
    """`completed`, `failed` or `lost`."""
    technique_id: str | None
    """The technique that ran, or None for other runs."""
    workspace_id: str | None
    """The workspace that the run belongs to, where known."""
    project_id: str | None
    """The project that the run belongs to, where known."""
    outputs: tuple[Output, ...]
    """The outputs by position; empty unless the run completed."""
    metadata: Mapping[str, Any]
    """The JSON object that was given when the run was started or tracked; else empty."""
    charged_cost: float | None
    """The cost in US dollars, or None while FLORA does not state it."""
    error_code: str | None
    """FLORA's code for the failure, or None for other runs."""
    error_message: str | None
    """FLORA's message about the failure, or None for other runs."""
    created_at: datetime | None
    """When the run was created, by FLORA's clock."""
    started_at: datetime | None
    """When the run started, by FLORA's clock."""
    completed_at: datetime
    """When the run ended, by FLORA's clock; `settled_at` where FLORA does not say."""
    settled_at: datetime
    """When the receiver settled the run, by its own clock."""
    settled_by: str
    """`callback` where a callback came before the run was read as ended, else `poll`."""
    verdict: str | None
    """The verdict on the callback: `matched`, `recovered`, `late` or `diverged`.

    None while the callback of a polled run may still come.
    """
    version: int = 0
    """A number that grows with every change: of two views of one run, the higher is newer."""


class Log(Protocol):
    """A structlog logger that is bound to the attempt. Never log the URL of an output."""

    def debug(self, event: str, **values: Any) -> Any:
        """Log an event at level debug."""

    def info(self, event: str, **values: Any) -> Any:
        """Log an event at level info."""

    def warning(self, event: str, **values: Any) -> Any:
        """Log an event at level warning."""

    def error(self, event: str, **values: Any) -> Any:
        """Log an event at level error."""


class Context(Protocol):
    """The context of one attempt: its key, its limits, guarded downloads, the run's artifacts."""

    @property
    def handler(self) -> str:
        """The name under which the handler is configured."""

    @property
    def idempotency_key(self) -> str:
        """`run_id:handler:event:round`, the same for every attempt of a dispatch."""

    @property
    def event(self) -> Event:
        """The event that the handler is called for."""

    @property
    def attempt(self) -> int:
        """The number of this attempt, from 1, and from 1 again once it is retried by hand."""

    @property
    def max_attempts(self) -> int:
        """The number of attempts after which the dispatch is dead."""

    @property
    def deadline_at(self) -> datetime:
        """When this attempt is cancelled."""

    @property
    def artifacts(self) -> Sequence[Artifact]:
        """The artifacts that this handler reserved or stored for the run before this attempt."""

    @property
    def log(self) -> Log:
        """A logger whose lines carry the run, the handler and the attempt."""

    def open(self, output: Output) -> AbstractAsyncContextManager[Download]:
        """Open an output, guarded.

        `async with context.open(output) as download: async for chunk in download: …`. Raises
        DownloadRefusedError (it can never be fetched) or DownloadFailedError (it may be later), when
        it is opened or while it is read.
        """

    async def save(self, output: Output, path: Path) -> Saved:
        """Fetch an output into a new file, which is removed if that fails.

        Raises as `open` does.
        """

    async def stored(self) -> Sequence[Artifact]:
        """Return the artifacts that any handler has stored for the run, by position."""

    async def request(self) -> Mapping[str, Any] | None:
        """Return the request that started the run, or None if it was not started by the receiver.

        That of a technique has `inputs`, each with `id`, `type` and `value`; that of a generation
        has `prompt`, `type`, `model`, `params` and so on. The callback URL and the key are left out.
        """

    async def reserve(self, position: int, output_id: str, location: str, *, vacant: bool = False) -> None:
        """Claim a location before writing to it; committed on return.

        A further call for the same position moves the claim. Raises LocationTakenError where
        another run or position holds the location. The claim of a run whose dispatches are over is
        void if it never stored anything there, and with `vacant` also if it did: that states that
        the location was looked at after a LocationTakenError, and holds nothing any more.
        """

    async def store_artifact(
        self, position: int, *, size: int, sha256: str, content_type: str | None
    ) -> None:
        """Record that the bytes at the reserved location are durable; committed on return."""


@runtime_checkable
class Handler(Protocol):
    """A handler.

    Its class may define defaults for its entry in the settings: `on: tuple[Event, ...]`,
    `when: When`, `timeout_seconds: float`, `max_attempts: int` and `concurrency: int`.
    """

    Config: ClassVar[type[BaseModel]]
    """The model of the handler's options. Each field has a description, which the command shows."""

    async def handle(self, run: SettledRun, context: Context) -> Answer:
        """Apply the effect for a run and return the answer. An exception means Retry."""


@runtime_checkable
class Checks(Protocol):
    """A handler that can check its configuration and its target."""

    async def check(self) -> None:
        """Raise an exception with a message for operators where the handler cannot work.

        Two are shown as warnings: TargetUnreachableError, for what may pass by itself, and
        TargetDegradedError, for a flaw that does not keep the handler from working.
        """


@runtime_checkable
class Closes(Protocol):
    """A handler that holds resources."""

    async def close(self) -> None:
        """Release the resources; called when the service stops."""


@runtime_checkable
class DescribesSchema(Protocol):
    """A handler class that needs tables; `flora-receiver handlers schema` prints their SQL."""

    @classmethod
    def schema(cls, config: Any) -> str:
        """Return the SQL that creates the tables for this configuration."""


@contextmanager
def needs(requirement: str) -> Iterator[None]:
    """Guard the import of an optional library where a handler is built.

    `with needs("flora-receiver[nats]"): import nats`. Raises MissingExtraError, which names the
    requirement to install.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise MissingExtraError(f"needs {error.name}: pip install '{requirement}'") from error
