"""The manifest of a stored run: what ran, what it cost, where its outputs are. Pure; for `handlers.storage`.

It is what says later where a file comes from: the files themselves stay as FLORA made them, byte for byte.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from receiver.handler import OutputType, SettledRun


@dataclass(frozen=True, slots=True)
class Kept:
    """One output that is safe. `size` in bytes, `sha256` in hex."""

    position: int
    output_id: str
    type: str
    key: str
    location: str
    size: int
    sha256: str | None
    content_type: str | None


def manifest(run: SettledRun, kept: Sequence[Kept], asked: Mapping[str, Any] | None = None) -> bytes:
    """Describe a run as JSON: the same bytes whenever the same is known about it, and never a media URL.

    `asked` is what FLORA was asked for (see `Context.request`); of that go along the texts, the prompt among them.
    """
    content = {
        **(_asked(asked) if asked is not None else {}),
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
            }
            for each in sorted(kept, key=lambda each: each.position)
        ],
    }
    text = json.dumps(content, sort_keys=True, indent=2, ensure_ascii=False, default=str)
    return f"{text}\n".encode(errors="replace")


def _asked(asked: Mapping[str, Any]) -> dict[str, Any]:
    inputs = asked.get("inputs")
    if not isinstance(inputs, list):  # a generation
        return {name: asked.get(name) for name in ("model", "prompt")}
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
