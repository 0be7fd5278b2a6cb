"""Statements on starts: intents to start a run, committed before FLORA is asked."""

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
    # The first run that shows up under a token is the start's; a second one would be FLORA starting twice.
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
    """Return these starts, as far as there are any."""
    rows = tx.execute(select(starts).where(starts.c.token.in_(tokens)).order_by(starts.c.token)).mappings()
    return {row["token"]: to_start(row) for row in rows}


def request_of(tx: Connection, run_id: str) -> str | None:
    """Return the body that FLORA got when a run was started; None: it was not started here."""
    return tx.execute(select(starts.c.request).where(starts.c.run_id == run_id).limit(1)).scalar_one_or_none()


def add_start(tx: Connection, start: Start) -> None:
    tx.execute(insert(starts), [start_row(start)])


def update_start(tx: Connection, start: Start, *, only_in: Collection[StartState]) -> bool:
    """Write a start back if it is still in one of these states; False if something else decided about it meanwhile."""
    changed = tx.execute(
        update(starts)
        .where(starts.c.token == start.token, starts.c.state.in_([state.value for state in only_in]))
        .values(start_row(start))
    )
    return changed.rowcount > 0


def replace_refused(tx: Connection, token: str, start: Start) -> bool:
    """Write a refused start anew, as the intent that it is now; its token changes. False if someone else just did."""
    changed = tx.execute(
        update(starts)
        .where(starts.c.token == token, starts.c.state == StartState.REFUSED.value)
        .values(start_row(start))
    )
    return changed.rowcount > 0


def mark_started(tx: Connection, runs_by_token: Mapping[str, str]) -> None:
    """Name the run of each of these starts, whatever was known of them before."""
    if runs_by_token:
        tx.execute(
            _MARK_STARTED, [{"_token": token, "_run_id": run_id} for token, run_id in sorted(runs_by_token.items())]
        )


def due_starts(tx: Connection, *, now: datetime, limit: int) -> tuple[Start, ...]:
    """Return the starts that FLORA is to be asked about by now, oldest first."""
    statement = select(starts).where(starts.c.state == StartState.ASKING.value, starts.c.due_at <= to_ms(now))
    return tuple(to_start(row) for row in tx.execute(statement.order_by(starts.c.due_at).limit(limit)).mappings())


def next_attempt_due_ms(tx: Connection) -> int | None:
    """Return when the next start is to be asked about, in unix milliseconds; None: none is."""
    statement = select(func.min(starts.c.due_at)).where(starts.c.state == StartState.ASKING.value)
    return tx.execute(statement).scalar_one_or_none()


def oldest_unanswered_at(tx: Connection, *, workspace_id: str | None, since: datetime) -> datetime | None:
    """Return when the first start was made, of those after `since` that may be about to name a run of this workspace."""
    first = tx.execute(
        select(func.min(starts.c.created_at)).where(
            starts.c.state == StartState.ASKING.value,
            starts.c.created_at >= to_ms(since),
            starts.c.workspace_id.in_({"", workspace_id or ""}),
        )
    ).scalar_one_or_none()
    return None if first is None else from_ms(first)


def count_unresolved_alike(tx: Connection, start: Start, *, since: datetime, until: datetime) -> int:
    """Return how many starts that could be meant by the same run are without one, this one included."""
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
