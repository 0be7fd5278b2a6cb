"""The one JSON form in which a settled run leaves the service. Pure; for every handler that hands runs on.

`schema` is 1. Within it fields may be added and none changes its meaning or goes away, so readers ignore fields and
words that they do not know. `run_schema()` is its JSON Schema.
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
    """Why a run failed, in FLORA's words."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)

    code: str | None
    """FLORA's code, an open list: `model_timeout`, `GENERATION_PROMPT_MODERATED`, …"""
    message: str | None
    """FLORA's explanation."""


class StoredFile(BaseModel):
    """Where the bytes of an output are safe."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)

    location: str
    """A URI: `file:///…`, `s3://…`, …"""
    size: int | None
    """Bytes."""
    sha256: str | None
    """64 lower-case hex digits."""
    content_type: str | None
    """As the media server said."""


class StoredArtifact(StoredFile):
    """One thing that a handler has stored of this run."""

    handler: str
    """The configured name of the handler that stored it."""
    position: int
    """The output it belongs to; -1 is the handler's own description of the run."""
    output_id: str
    """FLORA's name of the output, or the handler's name of its description."""
    stored_at: datetime
    """When its bytes were safe."""


class RunOutput(BaseModel):
    """One output of the run."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)

    position: int
    """Counts from 0 and is the key: `output_id` may repeat."""
    output_id: str
    """FLORA's name of the output."""
    type: str
    """`imageUrl`, `videoUrl`, `audioUrl`, `documentUrl`, `text`, or a new one."""
    url: str | None
    """FLORA's URL of the media: whoever has it has the media, and it does not live for ever. Null for text."""
    text: str | None
    """The text itself. Null for media."""
    artifact: StoredFile | None
    """The copy that was stored first; `artifacts` has all of them."""


class RunDocument(BaseModel):
    """A settled run of FLORA, as flora-receiver hands it on."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True, populate_by_name=True)

    version: Literal[1] = Field(alias="schema")
    """The version of this form."""
    event: Event
    """What is told about the run."""
    idempotency_key: str
    """The same whenever the same is told again: act on it once."""
    run_id: str
    """FLORA's id of the run."""
    run_type: str
    """`generation`, `technique` or `action`; `unknown` where FLORA did not say."""
    status: str
    """`completed`, `failed` or `lost`."""
    technique_id: str | None
    """The technique that ran."""
    workspace_id: str | None
    """The workspace that pays."""
    project_id: str | None
    """The project it belongs to."""
    metadata: dict[str, Any]
    """Your own data about the run, given when it was started."""
    charged_cost: float | None
    """US dollars; null while not known."""
    error: RunError | None
    """Null where nothing went wrong."""
    created_at: datetime | None
    """When FLORA took it in."""
    started_at: datetime | None
    """When FLORA began it."""
    completed_at: datetime
    """When it ended."""
    settled_at: datetime
    """When the receiver was sure that it had ended."""
    settled_by: str
    """`callback`, or `poll` where the callback had not come by then."""
    verdict: str | None
    """What the run tells about the callback channel: `matched`, `recovered`, `late`, `diverged`; null while open."""
    outputs: list[RunOutput]
    """In FLORA's order."""
    artifacts: list[StoredArtifact]
    """Everything that handlers have stored of this run so far."""


def run_document(
    run: SettledRun, *, event: Event, idempotency_key: str, artifacts: Sequence[Artifact] = ()
) -> dict[str, Any]:
    """Describe a run as strict JSON values: what JSON cannot hold becomes null, text or U+FFFD.

    `artifacts` is what `context.stored()` answers, or `context.artifacts`; places that are only reserved are left out.
    """
    stored = [(artifact, artifact.stored_at) for artifact in artifacts if artifact.stored_at is not None]
    failed = run.error_code is not None or run.error_message is not None
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
        "error": {"code": run.error_code, "message": run.error_message} if failed else None,
        "created_at": run.created_at,
        "started_at": run.started_at,
        "completed_at": run.completed_at,
        "settled_at": run.settled_at,
        "settled_by": run.settled_by,
        "verdict": run.verdict,
        "outputs": [_output(output, stored) for output in run.outputs],
        "artifacts": [
            {
                "handler": artifact.handler,
                "position": artifact.position,
                "output_id": artifact.output_id,
                **_file(artifact),
                "stored_at": stored_at,
            }
            for artifact, stored_at in stored
        ],
    }
    return {name: _strict(value) for name, value in content.items()}


def run_json(document: Mapping[str, Any]) -> bytes:
    """Write a document as JSON in UTF-8, without blanks. ValueError where it holds what JSON cannot."""
    text = json.dumps(document, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.encode()


def run_schema() -> dict[str, Any]:
    """Return the JSON Schema (2020-12) of the document."""
    schema = RunDocument.model_json_schema(mode="serialization")
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def _output(output: Output, stored: Sequence[tuple[Artifact, datetime]]) -> dict[str, Any]:
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
        "artifact": first and _file(first[1]),
    }


def _file(artifact: Artifact) -> dict[str, Any]:
    return {
        "location": artifact.location,
        "size": artifact.size,
        "sha256": artifact.sha256,
        "content_type": artifact.content_type,
    }


def _strict(value: object, depth: int = 0) -> Any:
    """Return the nearest thing that strict JSON can hold; nesting beyond MAX_DEPTH, which no reader takes, is cut."""
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
            return {_SURROGATE.sub("\ufffd", str(key)): _strict(each, depth + 1) for key, each in value.items()}
        case list() | tuple():
            return [_strict(each, depth + 1) for each in value]
        case _:
            return _SURROGATE.sub("\ufffd", str(value))
