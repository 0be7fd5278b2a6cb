"""What people are told about a run: templates, and the values that go into them. Pure; for `handlers.notify`.

No field is a media URL: whoever can read a chat or a mail would have the media. `{outputs}` names stored files.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal

from handlers.template import RUN_FIELDS, RUN_IDS, RUN_TIMES, FieldKind, Fields, Placeholder, Template, to_text
from receiver.handler import Artifact, Event, SettledRun

Occasion = Literal["completed", "failed", "lost", "diverged", "dead"]

TITLE_LENGTH = 200
VALUE_LENGTH = 500
FILES = 20
"""How many stored files a message names at most."""

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
            "{technique_id} in workspace {workspace_id} did not end in time, or not at all.\n"
            "Ask why: flora-receiver runs explain {run_id}"
        ),
    ),
    "diverged": (
        "FLORA contradicts itself: {run_id}",
        (
            "Callback and API do not agree about this run; it counts as {status}.\n"
            "Look into it: flora-receiver runs explain {run_id}"
        ),
    ),
    "dead": (
        "A handler gave up on {run_id}",
        (
            "What should be done with this run ({status}) is not done.\n"
            "See which: flora-receiver runs show {run_id}\nTry again: flora-receiver dispatches retry --run-id {run_id}"
        ),
    ),
}


class MessageTemplate:
    """A parsed text such as `{run_id} cost {charged_cost}`. ValueError if it is wrong."""

    def __init__(self, text: str) -> None:
        self._template = Template(text, _FIELDS)

    def render(self, values: Mapping[str, Any]) -> str:
        return self._template.fill(lambda field: _text(field, values))


@dataclass(frozen=True, slots=True)
class Message:
    """One message, ready to send."""

    occasion: Occasion
    title: str
    body: str


def occasion(event: Event, status: str) -> Occasion:
    """Choose which message an event of a run is worth."""
    if event is Event.DEAD:
        return "dead"
    if event is Event.DIVERGED:
        return "diverged"
    if status == "completed":
        return "completed"
    return "lost" if status == "lost" else "failed"


def values_of(run: SettledRun, event: Event, handler: str, artifacts: Sequence[Artifact]) -> Mapping[str, Any]:
    """Gather what templates may use."""
    own = {name: getattr(run, name) for name in (*RUN_IDS, *RUN_TIMES, *_OWN_FIELDS)}
    files = [each.location for each in artifacts if each.position >= 0 and each.stored_at is not None]
    listed = [_FORBIDDEN.sub(" ", location)[:VALUE_LENGTH] for location in files[:FILES]]
    if len(files) > FILES:
        listed.append(f"… and {len(files) - FILES} more")
    return {
        **own,
        "metadata": run.metadata,
        "event": event.value,
        "handler": handler,
        "output_count": len(run.outputs),
        "outputs": "\n".join(listed),
    }


def written(occasion: Occasion, title: MessageTemplate, body: MessageTemplate, values: Mapping[str, Any]) -> Message:
    """Fill in a message: the title on one line, the body never empty, since many targets refuse that."""
    line = " ".join(title.render(values).split())[:TITLE_LENGTH]
    text = body.render(values).strip()
    return Message(occasion, line, text or line or occasion)


def _text(field: Placeholder, values: Mapping[str, Any]) -> str:
    value = values[field.name].get(field.key) if field.kind is FieldKind.MAPPING else values[field.name]
    if field.name == "outputs":
        return str(value)
    return _FORBIDDEN.sub(" ", _readable(value, field.spec))[:VALUE_LENGTH]


def _readable(value: Any, spec: str) -> str:
    match value:
        case None:
            return "–"
        case datetime():
            return value.astimezone(UTC).strftime(spec or "%Y-%m-%d %H:%M:%S UTC")
        case float():
            return f"{value:.6f}".rstrip("0").rstrip(".")
        case _:
            return to_text(value)
