"""Converts rows of the database to values and back. Knows which columns hold which fields."""

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from operator import attrgetter
from typing import Any

from msgspec.structs import fields
from sqlalchemy import RowMapping

from receiver.model import (
    Artifact,
    CallbackStatus,
    Dispatch,
    DispatchState,
    Event,
    Lane,
    LostReason,
    Origin,
    Output,
    ReadAttempt,
    ReadOutcome,
    Run,
    RunState,
    Verdict,
)

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MS = timedelta(milliseconds=1)


def to_ms(moment: datetime) -> int:
    """Return a time in Unix milliseconds, as the database stores it."""
    return (moment - _EPOCH) // _MS


def from_ms(value: int) -> datetime:
    """Return the time of Unix milliseconds."""
    return _EPOCH + timedelta(milliseconds=value)


def from_ms_or_none(value: int | None) -> datetime | None:
    return None if value is None else from_ms(value)


_RENAMED = {"callback_status": "told", "unconfirmed_reads": "ladder"}
"""Fields whose column has another name."""
_RUN_FIELDS = tuple(field.name for field in fields(Run))
RUN_COLUMNS = tuple(_RENAMED.get(name, name) for name in _RUN_FIELDS)
_ENUMS: Mapping[str, Callable[[str], Any]] = {
    "state": RunState,
    "origin": Origin,
    "told": CallbackStatus,
    "verdict": Verdict,
    "lost_reason": LostReason,
}
_TIMES = frozenset(name for name in _RUN_FIELDS if name.endswith(("_at", "_since")))
_RUN_VALUES = attrgetter(*_RUN_FIELDS)
_COLUMN_OF: Mapping[str, Callable[[Any], Any]] = {
    **dict.fromkeys(_ENUMS, attrgetter("_value_")),  # `value` is a slow property, and this runs often
    **dict.fromkeys(_TIMES, to_ms),
    "metadata": lambda metadata: (
        json.dumps(dict(metadata), ensure_ascii=False, sort_keys=True) if metadata else "{}"
    ),
}
FIRST_CALLBACK_COLUMNS = (
    "run_id", "state", "origin", "first_seen_at", "deadline_at", "run_type", "workspace_id", "error_code",
    "error_message", "told", "reported_at", "next_poll_at",
)  # fmt: skip
"""The columns that the first callback of a run fills in.

The others have their defaults: to bind them would double the cost of the insert.
"""
NEW_RUN_DEFAULTS = {
    "metadata": "'{}'",
    "callback_expected": "TRUE",
    **dict.fromkeys(("losses", "polls", "failed_polls", "ladder", "failures", "missing", "version"), "0"),
}
"""Those of the others that are not NULL, as SQL."""
_OTHERS = tuple(
    field for field in fields(Run) if _RENAMED.get(field.name, field.name) not in FIRST_CALLBACK_COLUMNS
)
_OTHER_VALUES = attrgetter(*(field.name for field in _OTHERS))
_NEW_VALUES: tuple[Any, ...] = tuple({} if field.name == "metadata" else field.default for field in _OTHERS)
_FIRST_CALLBACK_VALUES = attrgetter(
    *(_RUN_FIELDS[RUN_COLUMNS.index(name)] for name in FIRST_CALLBACK_COLUMNS)
)


def _conversions(names: Sequence[str]) -> tuple[tuple[int, Callable[[Any], Any]], ...]:
    return tuple((index, _COLUMN_OF[name]) for index, name in enumerate(names) if name in _COLUMN_OF)


_RUN_CONVERSIONS, _FIRST_CALLBACK_CONVERSIONS = (
    _conversions(RUN_COLUMNS),
    _conversions(FIRST_CALLBACK_COLUMNS),
)


def run_values(run: Run) -> list[Any]:
    """Return the columns of `runs`, in the order of `RUN_COLUMNS`."""
    values = list(_RUN_VALUES(run))
    for index, convert in _RUN_CONVERSIONS:
        if values[index] is not None:
            values[index] = convert(values[index])
    return values


def first_callback_values(run: Run) -> list[Any] | None:
    """Return the values of `FIRST_CALLBACK_COLUMNS`, or None if the others are not defaults."""
    if _OTHER_VALUES(run) != _NEW_VALUES:
        return None
    values = list(_FIRST_CALLBACK_VALUES(run))
    for index, convert in _FIRST_CALLBACK_CONVERSIONS:
        if values[index] is not None:
            values[index] = convert(values[index])
    return values


def run_row(run: Run) -> dict[str, Any]:
    """Return the columns of `runs`, by name."""
    return dict(zip(RUN_COLUMNS, run_values(run), strict=True))


def to_run(row: Mapping[str, Any] | RowMapping) -> Run:
    """Return the run in a row of `runs`."""
    values: dict[str, Any] = {}
    for field, name in zip(_RUN_FIELDS, RUN_COLUMNS, strict=True):
        value = row[name]
        if value is not None:
            if name in _TIMES:
                value = from_ms(value)
            elif name in _ENUMS:
                value = _ENUMS[name](value)
            elif name == "metadata":
                value = json.loads(value)
            elif name == "callback_expected":
                value = bool(value)
        values[field] = value
    return Run(**values)


READ_COLUMNS = (
    "requested_at", "source", "outcome", "run_status", "http_status", "problem", "request_id", "duration_ms",
)  # fmt: skip
"""The columns of `run_reads` beside its key."""


def read_row(attempt: ReadAttempt) -> dict[str, Any]:
    """Return the columns of a read, without its run and slot."""
    return {
        "requested_at": to_ms(attempt.requested_at),
        "source": attempt.source,
        "outcome": attempt.outcome.value,
        "run_status": attempt.run_status,
        "http_status": attempt.http_status,
        "problem": attempt.problem,
        "request_id": attempt.request_id,
        "duration_ms": None if attempt.seconds is None else round(attempt.seconds * 1000),
    }


def to_read(row: RowMapping) -> ReadAttempt:
    milliseconds = row["duration_ms"]
    return ReadAttempt(
        requested_at=from_ms(row["requested_at"]),
        source=row["source"],
        outcome=ReadOutcome(row["outcome"]),
        run_status=row["run_status"],
        http_status=row["http_status"],
        problem=row["problem"],
        request_id=row["request_id"],
        seconds=None if milliseconds is None else milliseconds / 1000,
    )


def to_output(row: RowMapping) -> Output:
    return Output(row["position"], row["output_id"], row["type"], row["value"])


def dispatch_row(dispatch: Dispatch) -> dict[str, Any]:
    """Return the columns of a new dispatch."""
    return {
        "run_id": dispatch.run_id,
        "handler": dispatch.handler,
        "event": dispatch.event.value,
        "round": dispatch.round,
        "state": dispatch.state.value,
        "attempts": dispatch.attempts,
        "due_at": to_ms(dispatch.due_at),
        "last_error": dispatch.last_error,
        "lane": dispatch.lane.value,
    }


def to_dispatch(row: RowMapping) -> Dispatch:
    return Dispatch(
        run_id=row["run_id"],
        handler=row["handler"],
        event=Event(row["event"]),
        round=row["round"],
        state=DispatchState(row["state"]),
        due_at=from_ms(row["due_at"]),
        attempts=row["attempts"],
        last_error=row["last_error"],
        lease_token=row["lease_token"],
        lease_until=from_ms_or_none(row["lease_until"]),
        lane=Lane(row["lane"]),
        result=None if row["result"] is None else json.loads(row["result"]),
        last_attempt=max(row.get("last_attempt") or 0, row["attempts"]),
    )


def to_artifact(row: RowMapping) -> Artifact:
    return Artifact(
        run_id=row["run_id"],
        handler=row["handler"],
        position=row["position"],
        output_id=row["output_id"],
        location=row["location"],
        size=row["size"],
        sha256=row["sha256"],
        content_type=row["content_type"],
        stored_at=from_ms_or_none(row["stored_at"]),
    )
