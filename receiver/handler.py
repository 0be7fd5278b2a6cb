"""The contract of a handler plug-in. Handlers import this module and nothing else of the receiver.

A handler is a class with a pydantic `Config` and `async def handle(self, run, context) -> Done | Retry | Reject`; it is
built as `cls(config)`. Delivery is at least once with a stable `context.idempotency_key`: make the effect idempotent.
An exception out of `handle` means Retry. It runs on the service's event loop: what blocks goes into a thread.
Optional: `async def check(self)` raises with a message when the handler cannot work (wrong directory, wrong
credentials), `async def close(self)` runs at shutdown. Every field of `Config` has a description, which
`flora-receiver handlers show` prints. `handlers/WRITING.md` leads through writing one.
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
    TargetUnreachableError,
)
from receiver.model import Artifact, Event, Output, OutputType, RunState, When, storable_text
from receiver.net.download import Download, Saved
from receiver.net.post import Posted, Poster, header_value, target_url, usable_headers

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
    "TargetUnreachableError",
    "When",
    "header_value",
    "needs",
    "storable_text",
    "target_url",
    "usable_headers",
]

MANIFEST = -1
"""The position under which a handler stores its own description of a run."""

THUMBNAIL = -2
"""The position of the thumbnail of the output at position 0; that of output n is at `THUMBNAIL - n`."""


@dataclass(frozen=True, slots=True)
class Done:
    """The effect is applied. `result` is kept with the dispatch and shown to operators (small, JSON)."""

    result: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Retry:
    """Not now: try again after `after_seconds`, or after the usual growing pause.

    `reread` has the run read again from FLORA before that, for fresh output URLs where the known ones have expired.
    """

    reason: str
    after_seconds: float | None = None
    reread: bool = False


@dataclass(frozen=True, slots=True)
class Reject:
    """Never: trying again cannot help. The dispatch is dead, loudly."""

    reason: str


Answer = Done | Retry | Reject


@dataclass(frozen=True, slots=True)
class SettledRun:
    """A run as handlers see it. Times are aware UTC, `charged_cost` is in US dollars (None: not known yet)."""

    run_id: str
    run_type: str
    """`generation`, `technique` or `action`; `unknown` where FLORA did not say."""
    status: str
    """`completed`, `failed` or `lost`."""
    technique_id: str | None
    workspace_id: str | None
    project_id: str | None
    outputs: tuple[Output, ...]
    metadata: Mapping[str, Any]
    charged_cost: float | None
    error_code: str | None
    error_message: str | None
    created_at: datetime | None
    started_at: datetime | None
    completed_at: datetime
    """FLORA's time of the end; ours of the settling where FLORA names none."""
    settled_at: datetime
    settled_by: str
    """`callback` if its callback came before we read it as terminal, else `poll`."""
    verdict: str | None
    """`matched`, `diverged`, …; None while the callback of a polled run may still come."""
    version: int = 0
    """Grows with every change of the run: of two views of one run, the higher is the newer."""


class Log(Protocol):
    """A bound structlog logger, as far as handlers need it. Never log a media URL."""

    def debug(self, event: str, **values: Any) -> Any: ...
    def info(self, event: str, **values: Any) -> Any: ...
    def warning(self, event: str, **values: Any) -> Any: ...
    def error(self, event: str, **values: Any) -> Any: ...


class Context(Protocol):
    """What a handler gets besides the run: its key, its limits, guarded downloads, and the record of what it stored."""

    @property
    def handler(self) -> str:
        """The name under which this handler is configured."""

    @property
    def idempotency_key(self) -> str:
        """`run_id:handler:event:round`, the same on every attempt."""

    @property
    def event(self) -> Event: ...
    @property
    def attempt(self) -> int:
        """Counts from 1."""

    @property
    def max_attempts(self) -> int: ...
    @property
    def deadline_at(self) -> datetime:
        """When this attempt will be cancelled."""

    @property
    def artifacts(self) -> Sequence[Artifact]:
        """What this handler has reserved or stored for this run so far."""

    @property
    def log(self) -> Log: ...

    def open(self, output: Output) -> AbstractAsyncContextManager[Download]:
        """Fetch an output, guarded: `async with context.open(output) as download: async for chunk in download: …`.

        Raises DownloadRefusedError (never will work) or DownloadFailedError (may work later), on entry or on the way.
        """

    async def save(self, output: Output, path: Path) -> Saved:
        """Fetch an output into a file that does not exist yet; nothing is left of it when that fails. Raises as `open`."""

    async def stored(self) -> Sequence[Artifact]:
        """Return what all handlers have stored of this run so far, in order of position."""

    async def request(self) -> Mapping[str, Any] | None:
        """Return what FLORA was asked for, without our key and callback URL; None: the run was not started here.

        `inputs` of a technique, each with `id`, `type` and `value`; of a generation `prompt`, `type`, `model`, `params`, …
        """

    async def reserve(self, position: int, output_id: str, location: str) -> None:
        """Claim a place for good before writing to it; committed on return.

        Reserving again for the same (run, position) moves the claim. Raises LocationTakenError if it is another's.
        """

    async def store_artifact(self, position: int, *, size: int, sha256: str, content_type: str | None) -> None:
        """Record that the bytes at the reserved place are safe; committed on return."""


@runtime_checkable
class Handler(Protocol):
    """What every handler has.

    A class may also set its configuration's defaults: `on: tuple[Event, ...]`, `when: When`, `timeout_seconds: float`,
    `max_attempts: int`, `concurrency: int`.
    """

    Config: ClassVar[type[BaseModel]]

    async def handle(self, run: SettledRun, context: Context) -> Answer: ...


@runtime_checkable
class Checks(Protocol):
    """A handler that can tell whether it would work."""

    async def check(self) -> None:
        """Raise with a message when it would not; TargetUnreachableError where that may pass by itself (a warning)."""


@runtime_checkable
class Closes(Protocol):
    """A handler that holds something to let go of."""

    async def close(self) -> None: ...


@runtime_checkable
class DescribesSchema(Protocol):
    """A handler class that keeps its data in tables of the user's; `flora-receiver handlers schema` prints them."""

    @classmethod
    def schema(cls, config: Any) -> str:
        """Return the SQL that makes what the handler needs, for a configuration of it."""


@contextmanager
def needs(requirement: str) -> Iterator[None]:
    """Guard the import of a library that not everybody has; used where a handler is built.

    `with needs("flora-receiver[nats]"): import nats`. Raises MissingExtraError, which tells what to install.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise MissingExtraError(f"needs {error.name}: pip install '{requirement}'") from error
