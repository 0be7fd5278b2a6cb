"""What the operations API answers, as the Python client gives it to other programs. Pure; imports nothing of ours."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

__all__ = ["ArtifactView", "DispatchView", "ErrorView", "OutputView", "RunView", "StartView"]


@dataclass(frozen=True, slots=True)
class ErrorView:
    """Why FLORA, or this service, did not do what was asked; `fields` are (field, message)."""

    code: str
    message: str
    status: int | None = None
    """FLORA's HTTP status, where it was FLORA that refused."""
    fields: tuple[tuple[str, str], ...] = ()
    request_id: str | None = None
    """FLORA's `request-id`: its support asks for it."""


@dataclass(frozen=True, slots=True)
class OutputView:
    """One output of a run. `value` is the URL of the media, or the text itself where `type` is `text`."""

    position: int
    output_id: str
    type: str
    value: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class ArtifactView:
    """Where a handler put an output; `position` -1 is the handler's own manifest of the run."""

    handler: str
    position: int
    output_id: str
    location: str
    size: int | None
    sha256: str | None
    content_type: str | None
    stored: bool
    """False: the place is reserved, the bytes are not safe yet."""

    @property
    def path(self) -> Path | None:
        """The file on this machine's disk, None where it is elsewhere."""
        parts = urlsplit(self.location)
        return Path(unquote(parts.path)) if parts.scheme == "file" else None


@dataclass(frozen=True, slots=True)
class DispatchView:
    """One handler's work on one event of the run."""

    handler: str
    event: str
    round: int
    state: str
    """`ready`, `leased`, `done`, `dead` or `skipped`."""
    attempts: int
    last_error: str | None
    orphaned: bool = False
    """It waits for a handler that is not configured."""
    result: Mapping[str, Any] | None = None
    """What the handler said about itself when it was done."""


@dataclass(frozen=True, slots=True)
class RunView:
    """A run as the ledger has it."""

    run_id: str
    state: str
    """`open`, `reported`, `completed`, `failed` or `lost`."""
    settled: bool
    """FLORA has shown its end."""
    finished: bool
    """Settled or lost, and no handler has anything left to do for it."""
    verdict: str | None
    run_type: str | None
    technique_id: str | None
    workspace_id: str | None
    charged_cost: float | None
    """USD, as FLORA bills it; may change until `cost_final`."""
    quoted_cost: float | None
    cost_final: bool
    error_code: str | None
    error_message: str | None
    lost_reason: str | None
    metadata: Mapping[str, Any]
    first_seen_at: datetime | None
    settled_at: datetime | None
    outputs: tuple[OutputView, ...] = ()
    """Empty in lists: read the run by itself for its outputs, artifacts and dispatches."""
    artifacts: tuple[ArtifactView, ...] = ()
    dispatches: tuple[DispatchView, ...] = ()

    @property
    def succeeded(self) -> bool:
        """Whether it completed and every handler did its work."""
        return self.state == "completed" and self.finished and all(one.state != "dead" for one in self.dispatches)

    @property
    def files(self) -> tuple[ArtifactView, ...]:
        """The stored outputs, in order, without the handlers' manifests."""
        return tuple(one for one in self.artifacts if one.stored and one.position >= 0)


@dataclass(frozen=True, slots=True)
class StartView:
    """What became of a start. `token` names it for `resolve`."""

    state: str
    """`started`, or `asking` while FLORA has not answered; a refusal and an unknown outcome raise."""
    run_id: str | None
    idempotency_key: str
    token: str = field(repr=False)
    error: ErrorView | None = None
    """While asking: FLORA's last answer, if there was one."""
    run: RunView | None = None
    repeated: bool = False
    """The key was known: nothing was started now."""


def run_view(data: Mapping[str, Any]) -> RunView:
    """Return the run in an answer's JSON."""
    return RunView(
        run_id=data["run_id"],
        state=data["state"],
        settled=data["settled"],
        finished=bool(data.get("finished")),
        verdict=data.get("verdict"),
        run_type=data.get("run_type"),
        technique_id=data.get("technique_id"),
        workspace_id=data.get("workspace_id"),
        charged_cost=data.get("charged_cost"),
        quoted_cost=data.get("quoted_cost"),
        cost_final=data["cost_final"],
        error_code=data.get("error_code"),
        error_message=data.get("error_message"),
        lost_reason=data.get("lost_reason"),
        metadata=data.get("metadata") or {},
        first_seen_at=_time(data.get("first_seen_at")),
        settled_at=_time(data.get("settled_at")),
        outputs=tuple(
            OutputView(row["position"], row["output_id"], row["type"], row["value"]) for row in data.get("outputs", ())
        ),
        artifacts=tuple(_artifact(row) for row in data.get("artifacts", ())),
        dispatches=tuple(_dispatch(row) for row in data.get("dispatches", ())),
    )


def start_view(data: Mapping[str, Any]) -> StartView:
    """Return the start in the answer `{"start", "run", "repeated"}`."""
    start, run = data["start"], data.get("run")
    return StartView(
        state=start["state"],
        run_id=start["run_id"],
        idempotency_key=start["idempotency_key"],
        token=start["token"],
        error=error_view(start["error"]) if start.get("error") else None,
        run=run_view(run) if run else None,
        repeated=bool(data.get("repeated")),
    )


def error_view(data: Mapping[str, Any]) -> ErrorView:
    """Return the error in an answer's JSON."""
    return ErrorView(
        code=str(data.get("code") or "unknown"),
        message=str(data.get("message") or ""),
        status=data.get("status"),
        fields=tuple((str(row.get("field", "")), str(row.get("message", ""))) for row in data.get("fields") or ()),
        request_id=data.get("request_id"),
    )


def _artifact(row: Mapping[str, Any]) -> ArtifactView:
    return ArtifactView(
        handler=row["handler"],
        position=row["position"],
        output_id=row["output_id"],
        location=row["location"],
        size=row["size"],
        sha256=row["sha256"],
        content_type=row["content_type"],
        stored=row["stored_at"] is not None,
    )


def _dispatch(row: Mapping[str, Any]) -> DispatchView:
    return DispatchView(
        handler=row["handler"],
        event=row["event"],
        round=row["round"],
        state=row["state"],
        attempts=row["attempts"],
        last_error=row["last_error"],
        orphaned=row.get("orphaned", False),
        result=row.get("result"),
    )


def _time(value: str | None) -> datetime | None:
    return None if value is None else datetime.fromisoformat(value)
