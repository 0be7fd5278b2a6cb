"""Statements on runs, outputs and deliveries, for the intake and the poller. No decisions."""

from collections.abc import Collection, Mapping, Sequence
from datetime import datetime
from operator import itemgetter
from typing import Any

from sqlalchemy import (
    Connection,
    FromClause,
    Select,
    bindparam,
    func,
    insert,
    literal_column,
    or_,
    select,
    update,
)
from sqlalchemy.dialects import postgresql

from receiver.errors import StoreUnavailableError
from receiver.model import Delivery, Dispatch, Output, ReadAttempt, Run, RunState
from receiver.store.bulk import BulkInsert, SelectByKeys
from receiver.store.rows import (
    FIRST_CALLBACK_COLUMNS,
    NEW_RUN_DEFAULTS,
    READ_COLUMNS,
    RUN_COLUMNS,
    dispatch_row,
    first_callback_values,
    read_row,
    run_row,
    run_values,
    to_ms,
    to_output,
    to_read,
    to_run,
)
from receiver.store.schema import deliveries, delivery_bodies, dispatches, outputs, run_reads, runs

KEPT_READS = 10
"""How many reads of each run are kept."""
_KNOWN_DELIVERIES = SelectByKeys(
    lambda count: select(deliveries.c.delivery_id).where(deliveries.c.delivery_id.in_([""] * count))
)


def _select_runs(count: int) -> Select[Any]:
    columns = (runs.c[name] for name in RUN_COLUMNS)
    return select(*columns).where(runs.c.run_id.in_([""] * count)).order_by(runs.c.run_id)


def _from_rows(rows: FromClause) -> Select[Any]:
    return select(rows).where(next(iter(rows.c)).is_not(None))


_RUNS = SelectByKeys(_select_runs)
# FOR NO KEY UPDATE: rows that refer to a run, such as dispatches, may be inserted meanwhile.
_RUNS_LOCKED = SelectByKeys(lambda count: _select_runs(count).with_for_update(key_share=True))
_INSERT_RUN = BulkInsert(
    [runs.c[name] for name in RUN_COLUMNS],
    lambda rows: insert(runs).from_select(RUN_COLUMNS, _from_rows(rows)),
)
_INSERT_CALLBACK_RUN = BulkInsert(
    [runs.c[name] for name in FIRST_CALLBACK_COLUMNS],
    lambda rows: insert(runs).from_select(
        [*FIRST_CALLBACK_COLUMNS, *NEW_RUN_DEFAULTS],
        _from_rows(rows).add_columns(*map(literal_column, NEW_RUN_DEFAULTS.values())),
    ),
)
_UPDATE_RUN = update(runs).where(
    runs.c.run_id == bindparam("_run_id"), runs.c.version == bindparam("_version")
)
_DELIVERY = (
    "delivery_id",
    "run_id",
    "event",
    "api_version",
    "received_at",
    "age",
    "secret",
    "readable",
    "duplicates",
)
_INSERT_DELIVERY = BulkInsert(
    [deliveries.c[name] for name in _DELIVERY],
    lambda rows: insert(deliveries).from_select(_DELIVERY, _from_rows(rows)),
)
_INSERT_BODY = BulkInsert(
    [deliveries.c.delivery_id, delivery_bodies.c.signature, delivery_bodies.c.body],
    lambda rows: insert(delivery_bodies).from_select(
        ["seq", "signature", "body"],
        # Not a join: the planner might start with all deliveries.
        _from_rows(rows).with_only_columns(
            select(deliveries.c.seq)
            .where(deliveries.c.delivery_id == rows.c.delivery_id)
            .scalar_subquery(),
            rows.c.signature,
            rows.c.body,
        ),
    ),
)
_UPDATE_OUTPUT_URL = (
    update(outputs)
    .where(
        outputs.c.run_id == bindparam("_run_id"),
        outputs.c.position == bindparam("_position"),
        outputs.c.output_id == bindparam("_output_id"),
        outputs.c.type == bindparam("_type"),
        outputs.c.value != bindparam("_value"),
    )
    .values(value=bindparam("_value"))
)
_COUNT_DUPLICATES = (
    update(deliveries)
    .where(deliveries.c.delivery_id == bindparam("_delivery_id"))
    .values(duplicates=deliveries.c.duplicates + bindparam("_times"), last_duplicate_at=bindparam("_at"))
)


def known_deliveries(tx: Connection, delivery_ids: Collection[str]) -> frozenset[str]:
    """Return which of these deliveries are in the ledger already."""
    return frozenset(row[0] for row in _KNOWN_DELIVERIES(tx, delivery_ids)) if delivery_ids else frozenset()


def runs_by_id(tx: Connection, run_ids: Collection[str], *, for_update: bool = False) -> dict[str, Run]:
    """Return these runs, as far as known; `for_update` locks them in the order of their ids."""
    find = _RUNS_LOCKED if for_update else _RUNS
    found = find(tx, run_ids) if run_ids else ()
    return {row[0]: to_run(dict(zip(RUN_COLUMNS, row, strict=True))) for row in found}


def outputs_of_runs(tx: Connection, run_ids: Collection[str]) -> dict[str, tuple[Output, ...]]:
    """Return the outputs of each of these runs, in order."""
    statement = (
        select(outputs).where(outputs.c.run_id.in_(run_ids)).order_by(outputs.c.run_id, outputs.c.position)
    )
    found: dict[str, list[Output]] = {run_id: [] for run_id in run_ids}
    for row in tx.execute(statement).mappings():
        found[row["run_id"]].append(to_output(row))
    return {run_id: tuple(rows) for run_id, rows in found.items()}


def add_runs(tx: Connection, new: Sequence[Run]) -> None:
    reported, others = [], []
    for run in new:
        values = first_callback_values(run)
        if values is None:
            others.append(run_values(run))
        else:
            reported.append(values)
    _INSERT_CALLBACK_RUN(tx, reported)
    _INSERT_RUN(tx, others)


def update_runs(tx: Connection, changed: Sequence[Run]) -> None:
    """Update runs, each only if its row still has the version that was read, and increment it."""
    if not changed:
        return
    rows = [
        {**run_row(run), "_run_id": run.run_id, "_version": run.version, "version": run.version + 1}
        for run in changed
    ]
    if tx.execute(_UPDATE_RUN, rows).rowcount != len(rows):
        raise StoreUnavailableError("a run was changed by another process at the same time")


def add_outputs(tx: Connection, of_runs: Mapping[str, Sequence[Output]]) -> None:
    rows = [
        {
            "run_id": run_id,
            "position": output.position,
            "output_id": output.output_id,
            "type": output.type,
            "value": output.value,
        }
        for run_id, row_outputs in of_runs.items()
        for output in row_outputs
    ]
    if rows:
        tx.execute(insert(outputs), rows)


def update_output_urls(tx: Connection, of_runs: Mapping[str, Sequence[Output]]) -> None:
    """Update the URLs of outputs. None is added, removed or moved: what was settled stays."""
    rows = [
        {
            "_run_id": run_id,
            "_position": output.position,
            "_output_id": output.output_id,
            "_type": output.type,
            "_value": output.value,
        }
        for run_id, row_outputs in sorted(of_runs.items())
        for output in row_outputs
    ]
    if rows:
        tx.execute(_UPDATE_OUTPUT_URL, rows)


def add_reads(tx: Connection, reads: Mapping[tuple[str, int], ReadAttempt]) -> None:
    """Keep reads by run and number, each in the place of the read `KEPT_READS` before it."""
    if reads:
        statement = postgresql.insert(run_reads)
        changed = {name: statement.excluded[name] for name in READ_COLUMNS}
        keys = [run_reads.c.run_id, run_reads.c.slot]
        rows = [
            {"run_id": run_id, "slot": number % KEPT_READS, **read_row(attempt)}
            for (run_id, number), attempt in sorted(reads.items(), key=itemgetter(0))
        ]
        tx.execute(statement.on_conflict_do_update(index_elements=keys, set_=changed), rows)


def reads_of_run(tx: Connection, run_id: str) -> tuple[ReadAttempt, ...]:
    """Return the last reads of a run, oldest first."""
    statement = select(run_reads).where(run_reads.c.run_id == run_id)
    rows = tx.execute(statement.order_by(run_reads.c.requested_at, run_reads.c.slot)).mappings()
    return tuple(to_read(row) for row in rows)


def add_deliveries(tx: Connection, new: Sequence[Delivery]) -> None:
    _INSERT_DELIVERY(
        tx,
        [
            (each.delivery_id, each.run_id, each.event, each.api_version, to_ms(each.received_at), each.age, each.secret,
             each.readable, 0)
            for each in new
        ],
    )  # fmt: skip
    _INSERT_BODY(tx, [(each.delivery_id, each.signature, each.body) for each in new])


def count_duplicates(tx: Connection, times: Mapping[str, int], *, at: datetime) -> None:
    """Count deliveries that were received again; `times` maps delivery id to how often."""
    if times:
        tx.execute(
            _COUNT_DUPLICATES,
            [
                {"_delivery_id": key, "_times": count, "_at": to_ms(at)}
                for key, count in sorted(times.items())
            ],
        )


def add_dispatches(tx: Connection, new: Sequence[Dispatch]) -> None:
    """Add dispatches; one that exists already stays as it is."""
    if new:
        statement = postgresql.insert(dispatches).on_conflict_do_nothing()
        tx.execute(statement, [dispatch_row(dispatch) for dispatch in new])


def due_runs(
    tx: Connection,
    *,
    now: datetime,
    limit: int,
    after: datetime | None = None,
    only: str | None = None,
    without: Collection[str] = (),
) -> tuple[Run, ...]:
    """Return the runs due by `now` (and not by `after`), longest due first.

    `only` selects one workspace, `without` excludes some.
    """
    statement = select(runs).where(runs.c.next_poll_at <= to_ms(now))
    if after is not None:
        statement = statement.where(runs.c.next_poll_at > to_ms(after))
    if only is not None:
        statement = statement.where(runs.c.workspace_id == only)
    elif without:
        statement = statement.where(or_(runs.c.workspace_id.is_(None), runs.c.workspace_id.not_in(without)))
    rows = tx.execute(statement.order_by(runs.c.next_poll_at).limit(limit)).mappings()
    return tuple(to_run(row) for row in rows)


def unsettled_ids(tx: Connection) -> frozenset[str]:
    """Return the ids of open and reported runs. Reads unsettled runs only, by a partial index."""
    states = (RunState.OPEN.value, RunState.REPORTED.value)
    statement = select(runs.c.run_id).where(runs.c.next_poll_at.is_not(None), runs.c.state.in_(states))
    return frozenset(tx.execute(statement).scalars())


def next_read_due_ms(tx: Connection, *, after: datetime | None = None) -> int | None:
    """Return when the next read (after `after`) is due, in Unix milliseconds, or None."""
    statement = select(func.min(runs.c.next_poll_at))
    if after is not None:
        statement = statement.where(runs.c.next_poll_at > to_ms(after))
    return tx.execute(statement).scalar_one_or_none()


def runs_past_callback(tx: Connection, *, now: datetime, limit: int) -> tuple[Run, ...]:
    """Return settled runs whose callback has not arrived in time."""
    statement = (
        select(runs).where(runs.c.verdict_due_at <= to_ms(now)).order_by(runs.c.verdict_due_at).limit(limit)
    )
    return tuple(to_run(row) for row in tx.execute(statement).mappings())
