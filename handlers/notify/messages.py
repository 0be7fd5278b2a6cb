"""Notifications: their default texts, templates and values. Pure; for the handler `notify`.

No field is a media URL, which would give all readers of a chat or mail the media. `{outputs}` lists
the locations of stored files.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal

from handlers.template import (
    RUN_FIELDS,
    RUN_IDS,
    RUN_TIMES,
    FieldKind,
    Fields,
    Placeholder,
    Template,
    to_text,
)
from receiver.handler import Artifact, Event, SettledRun

Occasion = Literal["completed", "failed", "lost", "diverged", "dead"]

_MAX_TITLE = 200
_MAX_VALUE = 500
_MAX_FILES = 20
"""How many stored files a message lists at most."""

_OWN_FIELDS = ("charged_cost", "error_code", "error_message", "verdict", "settled_by")
_FIELDS: Fields = {
    **RUN_FIELDS,
    **dict.fromkeys((*_OWN_FIELDS, "event", "handler", "output_count", "outputs"), FieldKind.TEXT),
}
_FORBIDDEN = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")

DEFAULTS: Mapping[Occasion, tuple[str, str]] = {
    "completed": (
        "FLORA run completed: {run_id}",
        "{technique_id} made {output_count} output(s), cost {charged_cost} USD.\n{outputs}",
    ),
    "failed": (
        "FLORA run failed: {run_id}",
        "{technique_id}: {error_code}\n{error_message}",
    ),
    "lost": (
        "FLORA run lost: {run_id}",
        (
            "{technique_id} in workspace {workspace_id} did not end in time.\n"
            "Find out why: flora-receiver runs explain {run_id}"
        ),
    ),
    "diverged": (
        "FLORA run diverged: {run_id}",
        (
            "Callback and API disagree about this run. It is recorded as {status}.\n"
            "Investigate: flora-receiver runs explain {run_id}"
        ),
    ),
    "dead": (
        "Handler gave up on {run_id}",
        (
            "A dispatch of this run ({status}) is dead.\n"
            "See which: flora-receiver runs show {run_id}\n"
            "Retry: flora-receiver dispatches retry --run-id {run_id}"
        ),
    ),
}


class MessageTemplate:
    """A template such as `{run_id} cost {charged_cost}`. ValueError if it is wrong."""

    def __init__(self, text: str) -> None:
        self._template = Template(text, _FIELDS)

    def render(self, values: Mapping[str, Any]) -> str:
        return self._template.fill(lambda field: _to_text(field, values))


@dataclass(frozen=True, slots=True)
class Message:
    """A message that is ready to send."""

    occasion: Occasion
    title: str
    body: str


def choose_occasion(event: Event, status: str) -> Occasion:
    """Return which message to send for an event of a run."""
    if event is Event.DEAD:
        return "dead"
    if event is Event.DIVERGED:
        return "diverged"
    if status == "completed":
        return "completed"
    return "lost" if status == "lost" else "failed"


def to_values(
    run: SettledRun, event: Event, handler: str, artifacts: Sequence[Artifact]
) -> Mapping[str, Any]:
    """Return the values of all fields."""
    fields = {name: getattr(run, name) for name in (*RUN_IDS, *RUN_TIMES, *_OWN_FIELDS)}
    files = [each.location for each in artifacts if each.position >= 0 and each.stored_at is not None]
    locations = [_FORBIDDEN.sub(" ", location)[:_MAX_VALUE] for location in files[:_MAX_FILES]]
    if len(files) > _MAX_FILES:
        locations.append(f"… and {len(files) - _MAX_FILES} more")
    return {
        **fields,
        "metadata": run.metadata,
        "event": event.value,
        "handler": handler,
        "output_count": len(run.outputs),
        "outputs": "\n".join(locations),
    }


def compose(
    occasion: Occasion, title: MessageTemplate, body: MessageTemplate, values: Mapping[str, Any]
) -> Message:
    """Fill in a message. The title is one line; the body is never empty: many refuse that."""
    line = " ".join(title.render(values).split())[:_MAX_TITLE]
    text = body.render(values).strip()
    return Message(occasion, line, text or line or occasion)


def _to_text(field: Placeholder, values: Mapping[str, Any]) -> str:
    value = values[field.name].get(field.key) if field.kind is FieldKind.MAPPING else values[field.name]
    if field.name == "outputs":
        return str(value)
    return _FORBIDDEN.sub(" ", _to_readable(value, field.spec))[:_MAX_VALUE]


def _to_readable(value: Any, spec: str) -> str:
    match value:
        case None:
            return "–"
        case datetime():
            return value.astimezone(UTC).strftime(spec or "%Y-%m-%d %H:%M:%S UTC")
        case float():
            return f"{value:.6f}".rstrip("0").rstrip(".")
        case _:
            return to_text(value)
