"""The contract of handlers is frozen: until the next major version it only grows, and plug-ins go on working."""

import inspect
from dataclasses import fields
from typing import Any

import pytest

from receiver import handler
from receiver.handler import Event, OutputType
from receiver.plugins.attempt import AttemptContext
from receiver.plugins.functions import BlockingContext
from receiver.testing import MemoryContext

# Add to what stands here; take nothing away, and move nothing.
NAMES = """
MANIFEST THUMBNAIL Answer Artifact AttemptOverError Checks Closes Context DescribesSchema Done DownloadError
DownloadFailedError DownloadRefusedError Event Handler LocationTakenError Log MissingExtraError Output OutputType
PostError PostFailedError PostRefusedError Posted Poster Reject Retry RunState Saved Secret SettledRun
TargetUnreachableError When header_value needs storable_text target_url usable_headers
"""
FIELDS = {
    "Artifact": "run_id handler position output_id location size sha256 content_type stored_at",
    "Done": "result",
    "Output": "position output_id type value",
    "Posted": "status retry_after_seconds location excerpt",
    "Reject": "reason",
    "Retry": "reason after_seconds reread",
    "Saved": "path size sha256 content_type",
    "SettledRun": (
        "run_id run_type status technique_id workspace_id project_id outputs metadata charged_cost error_code "
        "error_message created_at started_at completed_at settled_at settled_by verdict version"
    ),
    "When": "status run_type technique_id workspace_id output_type metadata",
}
CONTEXT = {
    "handler idempotency_key event attempt max_attempts deadline_at artifacts log": None,
    "open": ["output"],
    "save": ["output", "path"],
    "stored": [],
    "reserve": ["position", "output_id", "location"],
    "store_artifact": ["position", "size", "sha256", "content_type"],
}


def test_no_name_is_taken_away() -> None:
    assert set(NAMES.split()) <= set(handler.__all__)
    assert (handler.MANIFEST, handler.THUMBNAIL) == (-1, -2)
    assert {event.value for event in Event} >= {"settled", "cost_final", "lost", "diverged", "dead"}
    assert {each.value for each in OutputType} >= {"imageUrl", "videoUrl", "audioUrl", "documentUrl", "text"}


@pytest.mark.parametrize("name", FIELDS)
def test_no_field_is_taken_away_or_moved(name: str) -> None:
    """Plug-ins build answers, and their tests build runs, by name and by place; whatever comes later has a default."""
    found = fields(getattr(handler, name))
    frozen = FIELDS[name].split()
    assert [each.name for each in found][: len(frozen)] == frozen
    given: dict[str, Any] = dict.fromkeys(frozen)
    getattr(handler, name)(**given)


@pytest.mark.parametrize("context", [handler.Context, AttemptContext, MemoryContext, BlockingContext])
def test_every_context_has_all_of_it(context: type) -> None:
    """That of the service, that of the kit, and that of plain functions, which reads in place of opening."""
    for names, parameters in CONTEXT.items():
        for name in names.split():
            if context is BlockingContext and name == "open":
                name, parameters = "read", ["output", "max_bytes"]  # noqa: PLW2901 - its only difference
            if parameters is None:
                known = {*dir(context), *getattr(context, "__annotations__", ()), *_assigned(context)}
                assert name in known
            else:
                assert list(inspect.signature(getattr(context, name)).parameters)[1:] == parameters


def _assigned(context: type) -> set[str]:
    """Return what a class sets on itself when it is built."""
    return set(inspect.unwrap(vars(context)["__init__"]).__code__.co_names)
