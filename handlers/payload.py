"""The run document: the JSON form in which settled runs leave the service. Pure; for any handler.

`schema` is 1. Within it, fields may be added; none changes its meaning or is removed. Readers
ignore fields and values that they do not know. `run_schema()` returns its JSON Schema.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from datetime import UTC, date, datetime
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from receiver.handler import Artifact, Event, Output, SettledRun

__all__ = ["RunDocument", "run_document", "run_json", "run_schema"]

MAX_DEPTH = 100
_SURROGATE = re.compile("[\ud800-\udfff]")


class RunError(BaseModel):
    """Why a run failed, as FLORA reports it."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)

    code: str | None
    """FLORA's code, from an open list: `model_timeout`, `GENERATION_PROMPT_MODERATED`, …"""
    message: str | None
    """FLORA's explanation."""


class StoredFile(BaseModel):
    """A stored copy of an output."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)

    location: str
    """A URI: `file:///…`, `s3://…`, …"""
    size: int | None
    """Bytes."""
    sha256: str | None
    """64 lower-case hex digits."""
    content_type: str | None
    """As sent by the media server."""


class StoredArtifact(StoredFile):
    """One file that a handler has stored of this run."""

    handler: str
    """The configured name of the handler that stored it."""
    position: int
    """The output it belongs to; -1 for the handler's own description of the run."""
    output_id: str
    """FLORA's name of the output, or the handler's name for its description."""
    stored_at: datetime
    """When it was stored safely."""


class RunOutput(BaseModel):
    """One output of the run."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)

    position: int
    """Counts from 0 and identifies the output: `output_id` may repeat."""
    output_id: str
    """FLORA's name of the output."""
    type: str
    """`imageUrl`, `videoUrl`, `audioUrl`, `documentUrl`, `text`, or a new one."""
    url: str | None
    """FLORA's URL of the media, null for text. It gives access to the media, and expires."""
    text: str | None
    """The text, null for media."""
    artifact: StoredFile | None
    """The copy that was stored first; `artifacts` has all copies."""


class RunDocument(BaseModel):
    """A settled run of FLORA, as flora-receiver passes it on."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True, populate_by_name=True)

    version: Literal[1] = Field(alias="schema")
    """The version of this document's format."""
    event: Event
    """What happened to the run."""
    idempotency_key: str
    """The same on every repetition: act on it once."""
    run_id: str
    """FLORA's id of the run."""
    run_type: str
    """`generation`, `technique` or `action`; `unknown` where FLORA did not say."""
    status: str
    """`completed`, `failed` or `lost`."""
    technique_id: str | None
    """The technique that was run."""
    workspace_id: str | None
    """The workspace that pays."""
    project_id: str | None
    """The project it belongs to."""
    metadata: dict[str, Any]
    """Your own data, given when the run was started."""
    charged_cost: float | None
    """US dollars; null if not known yet."""
    error: RunError | None
    """Null if the run did not fail."""
    created_at: datetime | None
    """When FLORA accepted it."""
    started_at: datetime | None
    """When FLORA started to work on it."""
    completed_at: datetime
    """When it ended."""
    settled_at: datetime
    """When the receiver had confirmed that it ended."""
    settled_by: str
    """`callback`, or `poll` if the callback had not arrived by then."""
    verdict: str | None
    """How the callback fared: `matched`, `recovered`, `late`, `diverged`; null if undecided."""
    outputs: list[RunOutput]
    """In FLORA's order."""
    artifacts: list[StoredArtifact]
    """All files that handlers have stored of this run so far."""


def run_document(
    run: SettledRun, *, event: Event, idempotency_key: str, artifacts: Sequence[Artifact] = ()
) -> dict[str, Any]:
    """Return the run document as strict JSON values. What JSON cannot hold is null, text or U+FFFD.

    `artifacts` comes from `context.stored()` or `context.artifacts`. Those not stored yet are left
    out.
    """
    stored = [(artifact, artifact.stored_at) for artifact in artifacts if artifact.stored_at is not None]
    has_failed = run.error_code is not None or run.error_message is not None
    content = {
        "schema": 1,
        "event": event.value,
        "idempotency_key": idempotency_key,
        "run_id": run.run_id,
        "run_type": run.run_type,
        "status": run.status,
        "technique_id": run.technique_id,
        "workspace_id": run.workspace_id,
        "project_id": run.project_id,
        "metadata": run.metadata,
        "charged_cost": run.charged_cost,
        "error": {"code": run.error_code, "message": run.error_message} if has_failed else None,
        "created_at": run.created_at,
        "started_at": run.started_at,
        "completed_at": run.completed_at,
        "settled_at": run.settled_at,
        "settled_by": run.settled_by,
        "verdict": run.verdict,
        "outputs": [_output_document(output, stored) for output in run.outputs],
        "artifacts": [
            {
                "handler": artifact.handler,
                "position": artifact.position,
                "output_id": artifact.output_id,
                **_file_document(artifact),
                "stored_at": stored_at,
            }
            for artifact, stored_at in stored
        ],
    }
    return {name: _to_json_value(value) for name, value in content.items()}


def run_json(document: Mapping[str, Any]) -> bytes:
    """Return a document as compact JSON in UTF-8. ValueError if it holds what JSON cannot."""
    text = json.dumps(document, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.encode()


def run_schema() -> dict[str, Any]:
    """Return the JSON Schema (2020-12) of the run document."""
    schema = RunDocument.model_json_schema(mode="serialization")
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def _output_document(output: Output, stored: Sequence[tuple[Artifact, datetime]]) -> dict[str, Any]:
    own = [
        (stored_at, artifact)
        for artifact, stored_at in stored
        if (artifact.position, artifact.output_id) == (output.position, output.output_id)
    ]
    first = min(own, key=lambda each: (each[0], each[1].handler), default=None)
    return {
        "position": output.position,
        "output_id": output.output_id,
        "type": output.type,
        "url": None if output.is_text else output.value,
        "text": output.value if output.is_text else None,
        "artifact": first and _file_document(first[1]),
    }


def _file_document(artifact: Artifact) -> dict[str, Any]:
    return {
        "location": artifact.location,
        "size": artifact.size,
        "sha256": artifact.sha256,
        "content_type": artifact.content_type,
    }


def _to_json_value(value: object, depth: int = 0) -> Any:
    """Return the closest value of strict JSON. Nesting beyond MAX_DEPTH is cut off."""
    match value:
        case None | bool():
            return value
        case str():
            return _SURROGATE.sub("\ufffd", value)
        case int():
            return int(value)
        case float():
            return float(value) if math.isfinite(value) else None
        case datetime():
            return value.astimezone(UTC).isoformat().replace("+00:00", "Z")
        case date():
            return value.isoformat()
        case Mapping() | list() | tuple() if depth >= MAX_DEPTH:
            return None
        case Mapping():
            return {
                _SURROGATE.sub("\ufffd", str(key)): _to_json_value(each, depth + 1)
                for key, each in value.items()
            }
        case list() | tuple():
            return [_to_json_value(each, depth + 1) for each in value]
        case _:
            return _SURROGATE.sub("\ufffd", str(value))
