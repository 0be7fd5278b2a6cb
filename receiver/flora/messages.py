"""FLORA's messages, pure: JSON bytes in, values of the model out. Behind it, every value is clean.

Clean means: text holds no NUL and no lone surrogate (PostgreSQL stores neither), integers fit 64
bits, ids are short and have no white space. Only `id` and `data.run_id` of a callback are required;
everything else may be absent or odd. Both snake_case and the camelCase of FLORA's older pages are
read.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import unquote, urlsplit

import msgspec

from receiver.errors import FloraError, PayloadError
from receiver.model import CallbackStatus, Output, OutputType, Snapshot, storable_text, unnamed_output_id
from receiver.net.retry_after import parse_retry_after

_MAX_ID = 200
_ID = re.compile(rf"[^\s\x00-\x1f\x7f]{{1,{_MAX_ID}}}")
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_LATEST_MS = 253_402_300_799_999  # the end of the year 9999
_MAX_TEXT = 4_000
"""Longest error message, name or status that is kept, in characters.

Output values are never shortened.
"""
_STATUS_BY_EVENT = {"run.completed": CallbackStatus.COMPLETED, "run.failed": CallbackStatus.FAILED}


class Callback(msgspec.Struct, frozen=True):
    """A parsed callback body. `callback_status` is None for an unknown type of event."""

    delivery_id: str
    run_id: str
    event: str | None
    api_version: str | None
    callback_status: CallbackStatus | None
    run_type: str | None
    workspace_id: str | None
    error_code: str | None
    error_message: str | None


@dataclass(frozen=True, slots=True)
class Page:
    """One page of a list of runs, newest first; `next_cursor` None means the end."""

    snapshots: tuple[Snapshot, ...]
    next_cursor: str | None


@dataclass(frozen=True, slots=True)
class StartedRun:
    """The response to a start.

    `estimated_seconds` and `quoted_cost` (USD, a quote, not the bill) where FLORA names them.
    """

    snapshot: Snapshot
    estimated_seconds: float | None
    quoted_cost: float | None


@dataclass(frozen=True, slots=True)
class DeclaredInput:
    """One input that a technique declares."""

    id: str
    type: str
    name: str | None
    optional: bool


@dataclass(frozen=True, slots=True)
class DeclaredOutput:
    """One output that a technique declares."""

    id: str
    type: str
    name: str | None


@dataclass(frozen=True, slots=True)
class Technique:
    """What FLORA says about a technique. `run_cost` in USD, None where it does not say."""

    technique_id: str
    slug: str | None
    name: str | None
    inputs: tuple[DeclaredInput, ...]
    outputs: tuple[DeclaredOutput, ...]
    run_cost: float | None


def parse_json(body: bytes) -> Any:
    """Return the JSON value in `body`, or raise PayloadError, whatever the bytes are."""
    try:
        return json.loads(body.decode("utf-8"))
    except (
        ValueError,
        RecursionError,
    ) as error:  # bad UTF-8, bad JSON, an integer of 10,000 digits; nesting without end
        raise PayloadError(f"not JSON: {type(error).__name__}") from error


def parse_callback(body: bytes) -> Callback:
    """Return what a verified body says, or raise PayloadError if it names no delivery or no run."""
    message = parse_json(body)
    if not isinstance(message, dict):
        raise PayloadError("the body is not a JSON object")
    data = message.get("data")
    if not isinstance(data, dict):
        raise PayloadError("data is not an object")
    delivery_id, run_id = _identifier(message, "id"), _identifier(data, "run_id", "runId")
    if delivery_id is None:
        raise PayloadError("id is missing, or not an id")
    if run_id is None:
        raise PayloadError("data.run_id is missing, or not an id")
    event = _text(message, "type")
    return Callback(
        delivery_id=delivery_id,
        run_id=run_id,
        event=event,
        api_version=_text(message, "api_version", "apiVersion"),
        callback_status=_callback_status(event, _text(data, "status")),
        run_type=_text(data, "run_type", "runType"),
        workspace_id=_identifier(data, "workspace_id", "workspaceId"),
        error_code=_text(data, "error_code", "errorCode"),
        error_message=_text(data, "error_message", "errorMessage"),
    )


def _callback_status(event: str | None, status: str | None) -> CallbackStatus | None:
    by_event = _STATUS_BY_EVENT.get(event or "")
    if by_event is None or status not in {"completed", "failed"}:
        return by_event
    return by_event if by_event == status else CallbackStatus.CONFLICTING


def parse_run(payload: Any, *, technique_id: str | None = None) -> Snapshot:
    """Return the run of a single read.

    `technique_id` is the requested one: the response does not repeat it.
    """
    if not isinstance(payload, Mapping):
        raise PayloadError("the run is not a JSON object")
    run_id = _identifier(payload, "run_id", "runId", "technique_run_id", "generation_id")
    status = _text(payload, "status")
    if run_id is None or status is None:
        raise PayloadError("the run has no run_id or no status")
    technique = payload.get("technique")
    listed_technique = (
        _identifier(technique, "technique_id", "techniqueId") if isinstance(technique, Mapping) else None
    )
    technique_id = technique_id or listed_technique or _identifier(payload, "technique_id", "techniqueId")
    outputs = _outputs(payload.get("outputs"))
    return Snapshot(
        run_id=run_id,
        status=status,
        run_type=_run_type(payload, technique_id),
        technique_id=technique_id,
        workspace_id=_identifier(payload, "workspace_id", "workspaceId"),
        project_id=_identifier(payload, "project_id", "projectId"),
        poll_url=_text(payload, "poll_url", "pollUrl"),
        progress=_progress(_get(payload, "progress")),
        created_at=_time(_get(payload, "created_at", "createdAt")),
        started_at=_time(_get(payload, "started_at", "startedAt")),
        completed_at=_time(_get(payload, "completed_at", "completedAt")),
        error_code=_text(payload, "error_code", "errorCode"),
        error_message=_text(payload, "error_message", "errorMessage"),
        charged_cost=_money(_get(payload, "charged_cost", "chargedCost")),
        outputs=outputs,
        unnamed=frozenset(
            output.position
            for output, row in zip(outputs, payload["outputs"] if outputs else (), strict=True)
            if _output_id(row) is None
        ),
    )


def parse_start(payload: Any, *, technique_id: str | None) -> StartedRun:
    """Return the run that a start made.

    The response of `POST /generate` has no status: the run is pending.
    """
    if not isinstance(payload, Mapping):
        raise PayloadError("the response is not a JSON object")
    snapshot = parse_run({"status": "pending", **payload}, technique_id=technique_id)
    estimated = _money(_get(payload, "estimated_seconds", "estimatedSeconds"))
    return StartedRun(snapshot, estimated, snapshot.charged_cost)


def parse_page(payload: Any) -> Page:
    """Return one page of `GET /technique-runs` or `GET /generations`.

    Rows that cannot be read are left out.
    """
    if not isinstance(payload, Mapping):
        raise PayloadError("the list is not a JSON object")
    rows = next((payload[key] for key in ("technique_runs", "generations") if key in payload), None)
    if not isinstance(rows, Sequence) or isinstance(rows, str):
        raise PayloadError("the list has no rows")
    snapshots = []
    for row in rows:
        try:
            snapshots.append(parse_run(row))
        except PayloadError:
            continue  # one odd row must not hide the ninety-nine others
    meta = payload.get("meta")
    cursor = _text(meta, "next_cursor", "nextCursor") if isinstance(meta, Mapping) else None
    return Page(tuple(snapshots), cursor or None)


def parse_technique(payload: Any, *, technique_id: str) -> Technique:
    """Return a technique. `technique_id` is the requested id or slug."""
    if not isinstance(payload, Mapping):
        raise PayloadError("the technique is not a JSON object")
    return Technique(
        technique_id=_identifier(payload, "technique_id", "techniqueId", "id") or technique_id,
        slug=_text(payload, "slug"),
        name=_text(payload, "name"),
        inputs=tuple(
            DeclaredInput(
                id=_text(row, "id", "input_id", "inputId") or "",
                type=_text(row, "type") or "text",
                name=_text(row, "name"),
                optional=row.get("optional") is True or row.get("required") is False,
            )
            for row in _rows(payload.get("inputs"))
        ),
        outputs=tuple(
            DeclaredOutput(
                id=_text(row, "id", "output_id", "outputId") or "",
                type=_text(row, "type") or "unknown",
                name=_text(row, "name"),
            )
            for row in _rows(payload.get("outputs"))
        ),
        run_cost=_money(_get(payload, "run_cost", "runCost")),
    )


def parse_error(status: int, body: bytes, headers: Mapping[str, str], now: datetime) -> FloraError:
    """Return FLORA's refusal as an error, from whatever came: its JSON, or some proxy's HTML.

    `now` is the time of the response, where its own headers do not have it.
    """
    request_id = headers.get("request-id")
    retry_after = parse_retry_after(headers, now)
    try:
        payload = parse_json(body)
    except PayloadError:
        payload = None
    detail = payload.get("error") if isinstance(payload, Mapping) else None
    if not isinstance(detail, Mapping):
        message = f"FLORA responded with {status} without an error object"
        if 300 <= status < 400:
            message = (
                f"FLORA responded with {status}, a redirect, which is not followed: check [flora] base_url"
            )
        return FloraError(message, status=status, request_id=request_id, retry_after=retry_after)
    fields = detail.get("fields")
    return FloraError(
        _text(detail, "message") or f"FLORA responded with {status}",
        status=status,
        code=_text(detail, "code"),
        fields=[
            (_text(entry, "field") or "", _text(entry, "message") or "")
            for entry in (fields if isinstance(fields, list) else [])
            if isinstance(entry, Mapping)
        ],
        request_id=request_id,
        retry_after=retry_after,
    )


def ids_of_poll_url(poll_url: str) -> tuple[str | None, str | None]:
    """Return (technique_id, run_id) as named by a `poll_url`'s path.

    The URL itself is never fetched.
    """
    try:
        path = urlsplit(poll_url).path
    except ValueError:  # `http://[`
        return None, None
    parts = [unquote(part) for part in path.split("/") if part]
    match parts:
        case [*_, "techniques", technique_id, "runs", run_id]:
            return _clean_id(technique_id), _clean_id(run_id)
        case [*_, "runs", run_id]:
            return None, _clean_id(run_id)
        case _:
            return None, None


def _rows(value: Any) -> list[Mapping[str, Any]]:
    return [row for row in value if isinstance(row, Mapping)] if isinstance(value, list) else []


def _run_type(payload: Mapping[str, Any], technique_id: str | None) -> str | None:
    named = _text(payload, "run_type", "runType")
    if named:
        return named
    if technique_id or "technique_run_id" in payload:
        return "technique"
    return "generation" if "generation_id" in payload else None


def _outputs(rows: Any) -> tuple[Output, ...]:
    """Return the outputs, or none at all while one of them cannot be fetched yet."""
    if not isinstance(rows, list):
        return ()
    outputs = []
    for position, row in enumerate(rows):
        if not isinstance(row, Mapping):
            return ()
        kind = _text(row, "type") or "unknown"
        value = row.get("url")
        if not isinstance(value, str) or (not value and kind != OutputType.TEXT):
            return ()
        output_id = _output_id(row) or unnamed_output_id(position)
        outputs.append(Output(position, output_id, kind, storable_text(value)))
    return tuple(outputs)


def _output_id(row: Mapping[str, Any]) -> str | None:
    return _identifier(row, "output_id", "outputId")


def _get(payload: Mapping[str, Any], *names: str) -> Any:
    for name in names:
        value = payload.get(name)
        if value is not None:
            return value
    return None


def _text(payload: Mapping[str, Any], *names: str) -> str | None:
    for name in names:
        value = payload.get(name)
        if value is not None:
            break
    else:
        return None
    if not isinstance(value, str) or not value:
        return None
    if len(value) <= _MAX_TEXT and value.isprintable():  # then there is nothing to replace
        return value
    return storable_text(value[:_MAX_TEXT])


def _identifier(payload: Mapping[str, Any], *names: str) -> str | None:
    for name in names:
        value = payload.get(name)
        if value is not None:
            return _clean_id(value) if isinstance(value, str) else None
    return None


def _clean_id(value: str) -> str | None:
    if value in {".", ".."}:  # they would change the path of the read that follows
        return None
    # Almost every id, checked without the patterns.
    if value.isascii() and value.isprintable():
        return value if 0 < len(value) <= _MAX_ID and " " not in value else None
    return value if _ID.fullmatch(value) and storable_text(value) == value else None


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _money(value: Any) -> float | None:
    number = _number(value)
    return number if number is not None and number >= 0 else None


def _progress(value: Any) -> int | None:
    number = _number(value)
    return None if number is None else max(0, min(100, int(number)))


def _time(value: Any) -> datetime | None:
    """Return a time given in unix milliseconds, or as ISO 8601 text; None for anything else."""
    number = _number(value)
    if number is not None:
        return _EPOCH + timedelta(milliseconds=int(number)) if 0 <= number <= _LATEST_MS else None
    if not isinstance(value, str):
        return None
    try:
        parsed = datetime.fromisoformat(value)
        return parsed.replace(tzinfo=UTC) if parsed.tzinfo is None else parsed.astimezone(UTC)
    # In the first or last hours of the calendar, UTC may lie outside of it.
    except (ValueError, OverflowError):
        return None
