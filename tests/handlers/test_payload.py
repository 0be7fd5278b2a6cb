"""The run document: complete, strict, and as its schema says."""

import json
from dataclasses import replace
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from handlers.payload import MAX_DEPTH, RunDocument, run_document, run_json, run_schema
from receiver.handler import Artifact, Event, Output, SettledRun
from tests.support.handler_kit import NOW, RUN

IMAGE = Output(position=0, output_id="hero", type="imageUrl", value="https://media.test/a.png")
TEXT = Output(position=1, output_id="hero", type="text", value="Grüße")
KINDS: dict[str, tuple[type, ...]] = {
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "null": (type(None),),
    "array": (list,),
    "object": (dict,),
}


def artifact(position: int = 0, handler: str = "storage", **fields: Any) -> Artifact:
    known = {
        "run_id": "run_1",
        "handler": handler,
        "position": position,
        "output_id": "hero",
        "location": f"file:///{handler}/{position}",
        "size": 3,
        "sha256": "0" * 64,
        "content_type": "image/png",
        "stored_at": NOW,
    }
    return Artifact(**{**known, **fields})


def make_document(run: SettledRun, *artifacts: Artifact, event: Event = Event.SETTLED) -> dict[str, Any]:
    """Return the document, checked against model, schema and strict JSON."""
    made = run_document(run, event=event, idempotency_key="run_1:forward:settled:0", artifacts=artifacts)
    assert json.loads(run_json(made), parse_constant=pytest.fail) == made
    RunDocument.model_validate_json(run_json(made), strict=True)
    check_schema(made, run_schema(), run_schema()["$defs"])
    return made


def check_schema(value: Any, schema: dict[str, Any], defs: dict[str, Any]) -> None:
    """Check the parts of JSON Schema that our schema uses: types, required and known fields."""
    if "$ref" in schema:
        return check_schema(value, defs[schema["$ref"].removeprefix("#/$defs/")], defs)
    if "anyOf" in schema:
        wanted = [each for each in schema["anyOf"] if (each.get("type") == "null") == (value is None)]
        return check_schema(value, wanted[0], defs)
    assert value in schema.get("enum", [value])
    assert value == schema.get("const", value)
    assert any(isinstance(value, kind) for kind in KINDS[schema["type"]]), (schema, value)
    if schema["type"] == "array":
        for each in value:
            check_schema(each, schema["items"], defs)
    if "properties" in schema:
        assert value.keys() == schema["properties"].keys() == set(schema["required"])
        for name, each in value.items():
            check_schema(each, schema["properties"][name], defs)
    return None


def test_a_whole_document() -> None:
    """Every field by its name, times in UTC, each output with where it is stored."""
    run = replace(RUN, outputs=(IMAGE, TEXT), charged_cost=0.04)
    made = make_document(run, artifact(), artifact(-1, output_id="run.json"))
    assert made["schema"] == 1
    assert made["event"] == "settled"
    assert made["idempotency_key"] == "run_1:forward:settled:0"
    assert (made["run_id"], made["run_type"], made["status"]) == ("run_1", "technique", "completed")
    assert (made["technique_id"], made["workspace_id"], made["project_id"]) == ("tech_1", "ws_1", None)
    assert (made["metadata"], made["charged_cost"], made["error"]) == ({"market": "DE"}, 0.04, None)
    assert made["completed_at"] == "2026-11-24T12:00:00Z"
    assert (made["settled_by"], made["verdict"]) == ("callback", "matched")
    image, text = made["outputs"]
    assert image == {
        "position": 0,
        "output_id": "hero",
        "type": "imageUrl",
        "url": "https://media.test/a.png",
        "text": None,
        "artifact": {
            "location": "file:///storage/0",
            "size": 3,
            "sha256": "0" * 64,
            "content_type": "image/png",
        },
    }
    assert (text["url"], text["text"], text["artifact"]) == (None, "Grüße", None)
    assert [each["position"] for each in made["artifacts"]] == [0, -1]


def test_what_is_only_reserved_is_left_out() -> None:
    """A reserved location has no bytes to fetch."""
    made = make_document(replace(RUN, outputs=(IMAGE,)), artifact(stored_at=None))
    assert made["artifacts"] == []
    assert made["outputs"][0]["artifact"] is None


def test_the_copy_that_was_stored_first_is_the_output_s_own() -> None:
    """In any order of artifacts; what a handler stored under another id is not its copy."""
    later = artifact(handler="backup", stored_at=NOW + timedelta(seconds=1))
    small = artifact(handler="small", output_id="hero-small", stored_at=NOW - timedelta(seconds=1))
    for order in ([later, small, artifact()], [artifact(), later, small]):
        made = make_document(replace(RUN, outputs=(IMAGE,)), *order)
        assert made["outputs"][0]["artifact"]["location"] == "file:///storage/0"
        assert len(made["artifacts"]) == 3


@pytest.mark.parametrize(
    ("code", "message"), [("model_timeout", "too slow"), ("model_timeout", None), (None, "why")]
)
def test_a_failure_has_its_error(code: str | None, message: str | None) -> None:
    """By code, by message, or both."""
    made = make_document(replace(RUN, status="failed", error_code=code, error_message=message))
    assert made["error"] == {"code": code, "message": message}


@pytest.mark.parametrize("event", Event)
def test_every_event_has_its_word(event: Event) -> None:
    assert make_document(RUN, event=event)["event"] == event.value


def test_times_are_in_utc() -> None:
    """A reader need not know about offsets."""
    at = datetime(2026, 1, 1, 1, 0, 0, 500, tzinfo=timezone(timedelta(hours=2)))
    assert make_document(replace(RUN, completed_at=at))["completed_at"] == "2025-12-31T23:00:00.000500Z"


def test_what_json_cannot_hold_becomes_what_it_can() -> None:
    """No NaN, no lone surrogate, no object: readers in other languages would fail."""
    metadata: dict[Any, Any] = {
        "nan": float("nan"),
        "inf": [float("inf"), (1, 2)],
        "half": "a\ud800b",
        "\udfff": 1,
        3: {"set"},
        "at": datetime(2026, 1, 1, tzinfo=UTC),
        "event": Event.DEAD,
    }
    made = make_document(replace(RUN, metadata=metadata, charged_cost=float("nan")))
    assert made["charged_cost"] is None
    assert made["metadata"] == {
        "nan": None,
        "inf": [None, [1, 2]],
        "half": "a\ufffdb",
        "\ufffd": 1,
        "3": "{'set'}",
        "at": "2026-01-01T00:00:00Z",
        "event": "dead",
    }


def test_nesting_without_end_is_cut() -> None:
    """Metadata that contains itself, or nests deeper than parsers go, is still sent."""
    endless: dict[str, Any] = {}
    endless["again"] = endless
    made = make_document(replace(RUN, metadata=endless))
    assert run_json(made).count(b"again") == MAX_DEPTH


json_like = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters()),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(st.characters()), inner, max_size=3)
    ),
    max_leaves=10,
)


@given(st.dictionaries(st.text(st.characters()), json_like, max_size=4), st.text(st.characters()))
def test_any_metadata_and_any_text_leave_as_strict_json(metadata: dict[str, Any], text: str) -> None:
    """Surrogates, infinities and control characters included."""
    output = replace(TEXT, value=text)
    make_document(replace(RUN, metadata=metadata, outputs=(output,), error_message=text, error_code=text))


def test_writing_refuses_what_json_cannot_hold() -> None:
    """A document with values that JSON cannot hold is refused."""
    for wrong in (float("nan"), "\ud800", object()):
        with pytest.raises((ValueError, TypeError)):
            run_json({"extra": wrong})


def test_every_field_is_explained_in_the_schema() -> None:
    """The schema is the documentation that travels."""
    schema = run_schema()
    for part in [schema, *schema["$defs"].values()]:
        for name, each in part.get("properties", {}).items():
            assert each.get("description"), name
