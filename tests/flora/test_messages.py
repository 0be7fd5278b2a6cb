"""FLORA's messages: what is parsed is clean, and anything else raises PayloadError."""

import contextlib
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from receiver.errors import PayloadError
from receiver.flora.messages import (
    Callback,
    ids_of_poll_url,
    parse_callback,
    parse_error,
    parse_json,
    parse_page,
    parse_run,
    parse_start,
)
from receiver.model import CallbackStatus, Output

NOW = datetime(2026, 11, 24, 12, 0, tzinfo=UTC)

SAMPLES = Path(__file__).parents[1] / "samples"
SENT = 1_733_952_000_000


def sample(name: str) -> bytes:
    return (SAMPLES / f"{name}.json").read_bytes()


def callback(**changes: Any) -> bytes:
    """Return a callback body; `data__x` changes a field of `data`, None leaves a field out."""
    message = json.loads(sample("callback-completed"))
    for name, value in changes.items():
        target, key = (message["data"], name[6:]) if name.startswith("data__") else (message, name)
        if value is None:
            target.pop(key, None)
        else:
            target[key] = value
    return json.dumps(message).encode()


def a_row(**fields: Any) -> dict[str, Any]:
    return {"run_id": "run_1", "status": "running", **fields}


# --- recorded samples
# --------------------------------------------------------------------------------------------


def test_reads_the_documented_callbacks() -> None:
    """The bodies in FLORA's documents are read field by field."""
    assert parse_callback(sample("callback-completed")) == Callback(
        "whd_abc123",
        "run_abc",
        "run.completed",
        "2026-06-11",
        CallbackStatus.COMPLETED,
        "generation",
        "ws_abc",
        None,
        None,
    )
    failed = parse_callback(sample("callback-failed"))
    assert (failed.callback_status, failed.run_type) == (CallbackStatus.FAILED, "technique")
    assert (failed.error_code, failed.error_message) == (
        "GENERATION_PROMPT_MODERATED",
        "The prompt was refused.",
    )


def test_reads_a_technique_run() -> None:
    """A single read names no technique: the requested one is used.

    The `url` of a text output is the text.
    """
    run = parse_run(parse_json(sample("technique-run-completed")), technique_id="tech_1")
    assert (run.run_id, run.status, run.run_type, run.technique_id) == (
        "run_tec1",
        "completed",
        "technique",
        "tech_1",
    )
    assert run.outputs == (
        Output(0, "image", "imageUrl", "https://media.flora.ai/a.png"),
        Output(1, "caption", "text", "A lighthouse at dusk"),
    )
    assert run.outputs[1].is_text
    assert (run.charged_cost, run.progress) == (0.24, 100)
    assert run.completed_at == datetime(2024, 12, 11, 21, 21, tzinfo=UTC)


def test_reads_the_camel_case_of_older_pages() -> None:
    """Older pages of FLORA write camelCase, and a time may be ISO text."""
    run = parse_run(parse_json(sample("technique-run-camel")))
    assert (run.run_id, run.error_code, run.error_message) == (
        "run_tec2",
        "model_timeout",
        "The model took too long.",
    )
    assert run.completed_at == datetime(2024, 12, 11, 21, 21, tzinfo=UTC)
    assert run.charged_cost == 0
    assert ids_of_poll_url(run.poll_url or "") == ("tech_1", "run_tec2")
    camel = {"id": "whd_1", "type": "run.completed", "data": {"runId": "run_1", "workspaceId": "ws_1"}}
    assert parse_callback(json.dumps(camel).encode()).workspace_id == "ws_1"


def test_reads_the_answer_to_a_generation() -> None:
    """`POST /generate` answers without a status: the run is pending; its cost is a quote."""
    started = parse_start(parse_json(sample("generation-started")), technique_id=None)
    assert (started.snapshot.run_id, started.snapshot.status) == ("run_gen1", "pending")
    assert (started.estimated_seconds, started.quoted_cost) == (25, 0.04)


def test_reads_pages_of_both_lists() -> None:
    """A listed run tells its technique, and by its own id what type it is."""
    page = parse_page(parse_json(sample("technique-runs-page")))
    assert [(run.run_id, run.run_type, run.technique_id) for run in page.snapshots] == [
        ("run_1", "technique", "tech_1"),
        ("run_2", "technique", "tech_1"),
    ]
    assert page.next_cursor == "c_2"
    page = parse_page(parse_json(sample("generations-page")))
    assert [(run.run_id, run.run_type, run.technique_id) for run in page.snapshots] == [
        ("run_gen1", "generation", None)
    ]
    assert page.next_cursor is None


def test_reads_a_refusal() -> None:
    """Code, message, fields and request id come along: support cannot work without the last."""
    error = parse_error(400, sample("error-validation"), {"request-id": "req_1"}, NOW)
    assert (error.status, error.code, error.request_id) == (400, "input_validation_error", "req_1")
    assert error.fields == (("inputs.0.value", "must be a URL"),)


# --- callbacks ------------------------------------------------------------------------------------
# ---------------


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b" ",
        b"{",
        b"hello",
        b"\xff\xfe{}",
        b"\xef\xbb\xbf{}",
        b"null",
        b"[]",
        b'"text"',
        b"1",
        b"NaN",
        b"{}",
        b'{"id":"whd_1"}',
        b'{"id":"whd_1","data":null}',
        b'{"id":"whd_1","data":[]}',
        b'{"id":"whd_1","data":"run_1"}',
        b'{"id":"whd_1","data":{}}',
        b'{"data":{"run_id":"run_1"}}',
        b"[" * 100_000,
        b'{"data":' * 100_000,
        b'{"id":"whd_1","data":{"run_id":"run_1"},"n":' + b"9" * 5000 + b"}",
    ],
)
def test_refuses_what_is_no_callback(body: bytes) -> None:
    """Not JSON, the wrong shape, too deep, a number without end: one kind of error."""
    with pytest.raises(PayloadError):
        parse_callback(body)


@pytest.mark.parametrize(
    "bad", ["", " ", "a b", "a\nb", "a\x00b", "\ud800", "x" * 201, ".", "..", 1, True, [], {}, 1.5, "\x7f"]
)
def test_refuses_ids_that_are_none(bad: Any) -> None:
    """An id becomes a key and a part of a path.

    White space, NUL, half characters and dots are none.
    """
    with pytest.raises(PayloadError):
        parse_callback(callback(id=bad))
    with pytest.raises(PayloadError):
        parse_callback(callback(data__run_id=bad))


def test_only_the_two_ids_are_required() -> None:
    """Whatever else FLORA leaves out or changes, the callback can be kept and its run be read."""
    parsed = parse_callback(b'{"id":"whd_1","data":{"run_id":"run_1"}}')
    assert (parsed.delivery_id, parsed.run_id, parsed.callback_status) == ("whd_1", "run_1", None)


@pytest.mark.parametrize("odd", [1, 1.5, True, [], {}, "", None])
@pytest.mark.parametrize(
    "name", ["api_version", "data__run_type", "data__workspace_id", "data__error_code"]
)
def test_odd_values_of_optional_fields_are_left_out(name: str, odd: Any) -> None:
    """A field of the wrong type is as good as absent."""
    parsed = parse_callback(callback(**{name: odd}))
    assert getattr(parsed, name.removeprefix("data__")) is None


@pytest.mark.parametrize(
    ("event", "status", "callback_status"),
    [
        ("run.completed", "completed", CallbackStatus.COMPLETED),
        ("run.failed", "failed", CallbackStatus.FAILED),
        ("run.completed", "failed", CallbackStatus.CONFLICTING),
        ("run.failed", "completed", CallbackStatus.CONFLICTING),
        ("run.completed", None, CallbackStatus.COMPLETED),
        ("run.failed", "running", CallbackStatus.FAILED),
        ("run.progress", "completed", None),
        ("RUN.COMPLETED", "completed", None),
    ],
)
def test_what_a_callback_tells(
    event: str, status: str | None, callback_status: CallbackStatus | None
) -> None:
    """The event's type decides.

    A status that contradicts it makes both; an unknown event has none.
    """
    assert parse_callback(callback(type=event, data__status=status)).callback_status is callback_status


def test_texts_come_out_clean() -> None:
    """NUL and half characters become U+FFFD, as PostgreSQL stores neither; long texts are cut."""
    body = callback(data__error_message="a\x00b\ud800c" + "x" * 10_000)
    message = parse_callback(body).error_message or ""
    assert message.startswith("a\ufffdb\ufffdc")
    assert len(message) == 4000
    assert message.encode()


def test_unknown_fields_are_ignored() -> None:
    """FLORA may add fields whenever it likes."""
    assert parse_callback(callback(new={"a": [1]}, data__new=1)) == parse_callback(callback())


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)
fields = st.sampled_from(
    ["id", "type", "data", "run_id", "runId", "status", "run_type", "error_message", "workspace_id", "outputs",
     "created_at", "completed_at", "charged_cost", "progress", "technique", "technique_runs", "meta", "next_cursor",
     "url", "output_id", "poll_url"]
)  # fmt: skip
messages = st.recursive(
    json_values | st.dates().map(str) | st.datetimes().map(str) | st.text(alphabet="0123456789TZ:+-."),
    lambda inner: st.dictionaries(fields, inner, max_size=8) | st.lists(inner, max_size=3),
    max_leaves=30,
)


@given(st.binary() | json_values.map(lambda value: json.dumps(value).encode()))
@example(b'{"id":"\\ud800","data":{"run_id":"\\u0000"}}')
def test_any_bytes_parse_or_are_a_payload_error(body: bytes) -> None:
    """Whatever arrives, nothing but PayloadError comes out of the door."""
    with contextlib.suppress(PayloadError):
        parse_callback(body)


@given(messages)
def test_any_callback_shape_parses_or_is_a_payload_error(data: Any) -> None:
    """Even where the outer shape is right."""
    try:
        parsed = parse_callback(json.dumps({"id": "whd_1", "type": "run.completed", "data": data}).encode())
    except PayloadError:
        return
    for text in (
        parsed.run_id,
        parsed.run_type,
        parsed.workspace_id,
        parsed.error_code,
        parsed.error_message,
    ):
        assert text is None or ("\x00" not in text and text.encode() and len(text) <= 4000)


@given(st.dictionaries(fields, messages, max_size=12))
@example({"completed_at": "0001-01-01T00:00:00+01:00"})
@example({"completed_at": "9999-12-31T23:59:59-01:00"})
@example({"charged_cost": 10**400, "progress": 10**400, "created_at": 10**400})
def test_any_run_parses_or_is_a_payload_error(row: dict[str, Any]) -> None:
    """A read of the API may show anything: what comes out fits the ledger."""
    try:
        run = parse_run({**row, "run_id": "run_1", "status": "running"})
        parse_page({"technique_runs": [row], "meta": row})
    except PayloadError:
        return
    assert run.progress is None or 0 <= run.progress <= 100
    assert run.charged_cost is None or run.charged_cost >= 0
    for moment in (run.created_at, run.started_at, run.completed_at):
        assert moment is None or moment.utcoffset() is not None
    for output in run.outputs:
        assert "\x00" not in output.value
        assert output.value.encode() is not None


# --- runs and pages
# ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "row", [None, [], 1, "run_1", {}, {"run_id": "run_1"}, {"status": "running"}, a_row(status=1)]
)
def test_a_run_needs_its_id_and_its_status(row: Any) -> None:
    """Without both there is nothing to decide about."""
    with pytest.raises(PayloadError):
        parse_run(row)


@pytest.mark.parametrize(
    ("given_time", "expected"),
    [
        (SENT, datetime(2024, 12, 11, 21, 20, tzinfo=UTC)),
        (float(SENT), datetime(2024, 12, 11, 21, 20, tzinfo=UTC)),
        (str(SENT), datetime(2024, 12, 11, 21, 20, tzinfo=UTC)),
        ("2024-12-11T22:20:00+01:00", datetime(2024, 12, 11, 21, 20, tzinfo=UTC)),
        ("2024-12-11T21:20:00", datetime(2024, 12, 11, 21, 20, tzinfo=UTC)),
        (0, datetime(1970, 1, 1, tzinfo=UTC)),
        (-1, None),
        (10**30, None),
        (float("nan"), None),
        (float("inf"), None),
        ("soon", None),
        (True, None),
        ([], None),
        ("0001-01-01T00:00:00+01:00", None),
    ],
)
def test_times(given_time: Any, expected: datetime | None) -> None:
    """Unix milliseconds or ISO 8601, in UTC.

    Anything else is no time, and no reason to refuse the run.
    """
    assert parse_run(a_row(completed_at=given_time)).completed_at == expected


@pytest.mark.parametrize(
    ("cost", "expected"),
    [
        (0.5, 0.5),
        ("0.5", 0.5),
        (0, 0),
        (-1, None),
        (float("nan"), None),
        (10**400, None),
        (True, None),
        ("free", None),
    ],
)
def test_costs(cost: Any, expected: float | None) -> None:
    """Money is a finite number that is not negative."""
    assert parse_run(a_row(charged_cost=cost)).charged_cost == expected


@pytest.mark.parametrize(
    ("progress", "expected"), [(40.7, 40), (-5, 0), (1000, 100), ("12", 12), (None, None), ({}, None)]
)
def test_progress_fits_its_range(progress: Any, expected: int | None) -> None:
    assert parse_run(a_row(progress=progress)).progress == expected


@pytest.mark.parametrize(
    "half",
    [
        {"output_id": "b", "type": "imageUrl"},
        {"output_id": "b", "type": "imageUrl", "url": ""},
        {"output_id": "b", "type": "imageUrl", "url": None},
        {"output_id": "b", "type": "imageUrl", "url": 1},
        "b",
        None,
    ],
)
def test_outputs_are_all_there_or_not_there_at_all(half: Any) -> None:
    """One output without its URL yet means that the run's outputs are not there.

    It must not settle by halves.
    """
    whole = {"output_id": "a", "type": "imageUrl", "url": "https://media.flora.ai/a.png"}
    assert parse_run(a_row(outputs=[whole, half])).outputs == ()
    assert parse_run(a_row(outputs=[half, whole])).outputs == ()


def test_an_empty_text_is_an_output() -> None:
    """A technique may well answer with an empty text; only a file needs a URL."""
    run = parse_run(a_row(outputs=[{"output_id": "a", "type": "text", "url": ""}]))
    assert run.outputs == (Output(0, "a", "text", ""),)


def test_outputs_are_told_apart_by_position() -> None:
    """Output ids may repeat or be missing; positions never do.

    Values are kept whole, however long.
    """
    url = "https://media.flora.ai/" + "a" * 9000
    rows = [
        {"output_id": "a", "type": "imageUrl", "url": url},
        {"output_id": "a", "url": url},
        {"url": url},
    ]
    run = parse_run(a_row(outputs=rows))
    assert [(output.position, output.output_id, output.type) for output in run.outputs] == [
        (0, "a", "imageUrl"),
        (1, "a", "unknown"),
        (2, "output_2", "unknown"),
    ]
    assert run.outputs[0].value == url


def test_a_page_leaves_odd_rows_out() -> None:
    """One row that cannot be read must not hide the ninety-nine others."""
    rows = [a_row(), {"run_id": ".."}, None, 1, "run_2", a_row(run_id="run_3"), a_row(status=None)]
    page = parse_page({"technique_runs": rows})
    assert [run.run_id for run in page.snapshots] == ["run_1", "run_3"]
    assert page.next_cursor is None


@pytest.mark.parametrize(
    "payload", [None, [], "x", {}, {"technique_runs": None}, {"generations": "run_1"}, {"data": []}]
)
def test_a_page_without_rows_is_no_page(payload: Any) -> None:
    """An answer of another shape must not look like an empty list."""
    with pytest.raises(PayloadError):
        parse_page(payload)


@pytest.mark.parametrize(
    ("url", "ids"),
    [
        ("https://app.flora.ai/api/v1/techniques/tech_1/runs/run_1", ("tech_1", "run_1")),
        ("https://app.flora.ai/api/v1/techniques/tech_1/runs/run_1/", ("tech_1", "run_1")),
        ("https://app.flora.ai/api/v1/runs/run_1?x=1#y", (None, "run_1")),
        ("/techniques/a%2Fb/runs/run_1", ("a/b", "run_1")),
        ("/techniques/../runs/..", (None, None)),
        ("/techniques/tech_1/runs/%2e%2e", ("tech_1", None)),
        ("/runs/run%201", (None, None)),
        ("https://app.flora.ai/api/v1/generations/run_1", (None, None)),
        ("http://[", (None, None)),
        ("", (None, None)),
        ("runs", (None, None)),
    ],
)
def test_ids_of_a_poll_url(url: str, ids: tuple[str | None, str | None]) -> None:
    """The URL is read for the ids in it, whatever it is, and never trusted further than that."""
    assert ids_of_poll_url(url) == ids


@given(st.text() | st.text(alphabet="htps:/[]@.%runsechiq_1 "))
def test_any_poll_url_can_be_read(url: str) -> None:
    """It comes from outside: nothing may come out but ids or None."""
    assert len(ids_of_poll_url(url)) == 2


@pytest.mark.parametrize(
    "body", [b"<html>502</html>", b"", b"[]", b'{"error":"no"}', b'{"error":null}', b"\xff"]
)
def test_a_refusal_in_another_tongue_is_still_one(body: bytes) -> None:
    """A proxy's HTML names no code: it must never look like FLORA's own `not_found`."""
    error = parse_error(404, body, {}, NOW)
    assert (error.status, error.code, error.request_id, error.retry_after) == (404, None, None, None)
