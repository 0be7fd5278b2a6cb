"""The manifest of a stored run, `run.json`: what ran, its cost, where its outputs are. Pure.

It documents where files come from. The files themselves stay as FLORA made them, byte for byte.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from receiver.handler import OutputType, SettledRun


@dataclass(frozen=True, slots=True)
class StoredOutput:
    """An output that has been stored. `size` in bytes, `sha256` in hex."""

    position: int
    output_id: str
    type: str
    key: str
    location: str
    size: int
    sha256: str | None
    content_type: str | None
    stated_content_type: str | None = None
    """The server's own, which may be wrong or missing."""


def to_manifest(
    run: SettledRun, outputs: Sequence[StoredOutput], request: Mapping[str, Any] | None = None
) -> bytes:
    """Return the manifest as JSON: always the same bytes for the same facts, and no media URL.

    `request` comes from `Context.request`; its texts are included, such as the prompt.
    """
    content = {
        **(_request_fields(request) if request is not None else {}),
        "version": 1,
        "run_id": run.run_id,
        "run_type": run.run_type,
        "status": run.status,
        "technique_id": run.technique_id,
        "workspace_id": run.workspace_id,
        "project_id": run.project_id,
        "metadata": dict(run.metadata),
        "charged_cost": run.charged_cost,
        "error": {"code": run.error_code, "message": run.error_message} if run.error_code else None,
        "created_at": _iso(run.created_at),
        "started_at": _iso(run.started_at),
        "completed_at": _iso(run.completed_at),
        "settled_at": _iso(run.settled_at),
        "settled_by": run.settled_by,
        "verdict": run.verdict,
        "outputs": [
            {
                "position": each.position,
                "output_id": each.output_id,
                "type": each.type,
                "location": each.location,
                "size": each.size,
                "sha256": each.sha256,
                "content_type": each.content_type,
                "stated_content_type": each.stated_content_type,
            }
            for each in sorted(outputs, key=lambda each: each.position)
        ],
    }
    text = json.dumps(content, sort_keys=True, indent=2, ensure_ascii=False, default=str)
    return f"{text}\n".encode(errors="replace")


def find_stated_type(manifest: Mapping[str, Any], output: StoredOutput) -> str | None:
    """Return the server's content type of an output as an earlier manifest of its run has it."""
    rows = manifest.get("outputs")
    for row in rows if isinstance(rows, list) else ():
        if isinstance(row, Mapping) and row.get("sha256") == output.sha256:
            stated = row.get("stated_content_type")
            if row.get("position") == output.position and isinstance(stated, str):
                return stated
    return None


def _request_fields(request: Mapping[str, Any]) -> dict[str, Any]:
    inputs = request.get("inputs")
    if not isinstance(inputs, list):  # a generation
        return {name: request.get(name) for name in ("model", "prompt")}
    return {
        "inputs": [
            {
                "id": each.get("id"),
                "type": each.get("type"),
                "value": each.get("value") if each.get("type") == OutputType.TEXT else None,
            }
            for each in inputs
            if isinstance(each, Mapping)
        ]
    }


def _iso(at: datetime | None) -> str | None:
    return None if at is None else at.astimezone(UTC).isoformat().replace("+00:00", "Z")
