"""Statements on starts: intents to start a run, committed before the request is sent to FLORA."""

import json
from collections.abc import Collection, Mapping, Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, RowMapping, bindparam, func, insert, select, update

from receiver.model import Operation, Start, StartState
from receiver.store.rows import from_ms, to_ms
from receiver.store.schema import runs, starts

_MARK_STARTED = (
    update(starts)
    # The first run with a token is that of the start; a second one would be FLORA's mistake.
    .where(starts.c.token == bindparam("_token"), starts.c.run_id.is_(None))
    .values(
        state=StartState.STARTED.value,
        run_id=bindparam("_run_id"),
        error_status=None,
        error_code=None,
        error_message=None,
        error_fields="[]",
    )
)


def by_key(
    tx: Connection, *, workspace_id: str, operation: Operation, technique_id: str, idempotency_key: str
) -> Start | None:
    """Return the start that was made under a key."""
    statement = select(starts).where(
        starts.c.workspace_id == workspace_id,
        starts.c.operation == operation.value,
        starts.c.technique_id == technique_id,
        starts.c.idempotency_key == idempotency_key,
    )
    row = tx.execute(statement).mappings().one_or_none()
    return None if row is None else to_start(row)


def by_token(tx: Connection, tokens: Collection[str]) -> dict[str, Start]:
    """Return the starts with these tokens, as far as they exist."""
    rows = tx.execute(select(starts).where(starts.c.token.in_(tokens)).order_by(starts.c.token)).mappings()
    return {row["token"]: to_start(row) for row in rows}


def request_of(tx: Connection, run_id: str) -> str | None:
    """Return the body that was sent to FLORA to start a run, or None if it was not started here."""
    return tx.execute(
        select(starts.c.request).where(starts.c.run_id == run_id).limit(1)
    ).scalar_one_or_none()


def add_start(tx: Connection, start: Start) -> None:
    tx.execute(insert(starts), [start_row(start)])


def update_start(tx: Connection, start: Start, *, only_in: Collection[StartState]) -> bool:
    """Update a start if it is still in one of these states; return whether it was."""
    changed = tx.execute(
        update(starts)
        .where(starts.c.token == start.token, starts.c.state.in_([state.value for state in only_in]))
        .values(start_row(start))
    )
    return changed.rowcount > 0


def replace_refused(tx: Connection, token: str, start: Start) -> bool:
    """Replace a refused start by a new intent with a new token; return whether it was refused."""
    changed = tx.execute(
        update(starts)
        .where(starts.c.token == token, starts.c.state == StartState.REFUSED.value)
        .values(start_row(start))
    )
    return changed.rowcount > 0


def mark_started(tx: Connection, runs_by_token: Mapping[str, str]) -> None:
    """Mark starts as started by their runs, whatever their state was."""
    if runs_by_token:
        tx.execute(
            _MARK_STARTED,
            [{"_token": token, "_run_id": run_id} for token, run_id in sorted(runs_by_token.items())],
        )


def due_starts(tx: Connection, *, now: datetime, limit: int) -> tuple[Start, ...]:
    """Return the starts whose request is due, longest due first."""
    statement = select(starts).where(
        starts.c.state == StartState.ASKING.value, starts.c.due_at <= to_ms(now)
    )
    return tuple(
        to_start(row) for row in tx.execute(statement.order_by(starts.c.due_at).limit(limit)).mappings()
    )


def next_attempt_due_ms(tx: Connection) -> int | None:
    """Return when the next request of a start is due, in Unix milliseconds, or None."""
    statement = select(func.min(starts.c.due_at)).where(starts.c.state == StartState.ASKING.value)
    return tx.execute(statement).scalar_one_or_none()


def oldest_unanswered_at(tx: Connection, *, workspace_id: str | None, since: datetime) -> datetime | None:
    """Return when the oldest unanswered start of a workspace since `since` was made, or None."""
    first = tx.execute(
        select(func.min(starts.c.created_at)).where(
            starts.c.state == StartState.ASKING.value,
            starts.c.created_at >= to_ms(since),
            starts.c.workspace_id.in_({"", workspace_id or ""}),
        )
    ).scalar_one_or_none()
    return None if first is None else from_ms(first)


def count_unresolved_alike(tx: Connection, start: Start, *, since: datetime, until: datetime) -> int:
    """Return how many starts without a run, this one included, the same run could belong to."""
    statement = select(func.count()).where(
        starts.c.workspace_id == start.workspace_id,
        starts.c.operation == start.operation.value,
        starts.c.technique_id == start.technique_id,
        starts.c.run_id.is_(None),
        starts.c.state.in_([StartState.ASKING.value, StartState.UNKNOWN.value]),
        starts.c.created_at.between(to_ms(since), to_ms(until)),
    )
    return int(tx.execute(statement).scalar_one())


def unknown_to_ledger(tx: Connection, run_ids: Sequence[str]) -> list[str]:
    """Return those of these runs that are not in the ledger, in order."""
    known = set(tx.execute(select(runs.c.run_id).where(runs.c.run_id.in_(run_ids))).scalars())
    return [run_id for run_id in run_ids if run_id not in known]


def start_row(start: Start) -> dict[str, Any]:
    """Return the columns of `starts`."""
    return {
        "token": start.token,
        "workspace_id": start.workspace_id,
        "operation": start.operation.value,
        "technique_id": start.technique_id,
        "idempotency_key": start.idempotency_key,
        "request": start.request,
        "request_hash": start.request_hash,
        "metadata": json.dumps(dict(start.metadata), ensure_ascii=False, sort_keys=True),
        "callback_expected": start.callback_expected,
        "state": start.state.value,
        "created_at": to_ms(start.created_at),
        "due_at": to_ms(start.due_at),
        "attempts": start.attempts,
        "run_id": start.run_id,
        "error_status": start.error_status,
        "error_code": start.error_code,
        "error_message": start.error_message,
        "error_fields": json.dumps(start.error_fields),
        "request_id": start.request_id,
    }


def to_start(row: RowMapping) -> Start:
    return Start(
        token=row["token"],
        workspace_id=row["workspace_id"],
        operation=Operation(row["operation"]),
        technique_id=row["technique_id"],
        idempotency_key=row["idempotency_key"],
        request=row["request"],
        request_hash=row["request_hash"],
        metadata=json.loads(row["metadata"]),
        callback_expected=row["callback_expected"],
        state=StartState(row["state"]),
        created_at=from_ms(row["created_at"]),
        due_at=from_ms(row["due_at"]),
        attempts=row["attempts"],
        run_id=row["run_id"],
        error_status=row["error_status"],
        error_code=row["error_code"],
        error_message=row["error_message"],
        error_fields=tuple((field, message) for field, message in json.loads(row["error_fields"])),
        request_id=row["request_id"],
    )
