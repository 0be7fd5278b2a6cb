"""Runs, outputs and deliveries in the database: what goes in comes out, and what changed meanwhile is not overwritten."""

from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any

import pytest
from msgspec.structs import fields, replace
from sqlalchemy import Connection, exc

from receiver.errors import StoreUnavailableError
from receiver.model import (
    CallbackStatus,
    Delivery,
    LostReason,
    Origin,
    Output,
    ReadAttempt,
    ReadOutcome,
    Run,
    RunState,
    Verdict,
)
from receiver.store import Database, ledger, retention, schema
from receiver.store.rows import FIRST_CALLBACK_COLUMNS, NEW_RUN_DEFAULTS, RUN_COLUMNS, from_ms, to_ms
from tests.support.core import NOW, OUTPUT, Core, a_run

FULL = Run(
    run_id="run_full",
    state=RunState.LOST,
    origin=Origin.STARTED,
    first_seen_at=NOW,
    deadline_at=NOW + timedelta(hours=24, milliseconds=1),
    run_type="technique",
    technique_id="tech_1",
    workspace_id="ws_1",
    project_id="prj_1",
    poll_url="https://app.flora.ai/api/v1/runs/run_full",
    progress=40,
    created_at=NOW - timedelta(seconds=1),
    started_at=NOW,
    completed_at=NOW + timedelta(seconds=1),
    error_code="model_timeout",
    error_message="zu spät \ufffd 🙂",
    charged_cost=0.1,
    quoted_cost=0.25,
    metadata={"market": "DE", "nested": {"list": [1, 2.5, None, True]}, "ключ": "🙂"},
    callback_expected=False,
    callback_status=CallbackStatus.CONFLICTING,
    reported_at=NOW,
    verdict=Verdict.DIVERGED,
    verdict_due_at=NOW,
    lost_reason=LostReason.NO_OUTPUTS,
    losses=3,
    next_poll_at=NOW,
    polls=7,
    failed_polls=2,
    unconfirmed_reads=2,
    failures=1,
    missing=4,
    missing_since=NOW,
    cost_due_at=NOW,
    version=0,
)


async def add(database: Database, *runs: Run) -> None:
    await database.write(lambda tx: ledger.add_runs(tx, runs))


async def get(database: Database, run_id: str = "run_1") -> Run | None:
    return (await database.read(lambda tx: ledger.runs_by_id(tx, [run_id]))).get(run_id)


async def test_every_field_of_a_run_survives(database: Database) -> None:
    """What decide decides is what the next decision finds, to the millisecond."""
    await add(database, FULL)
    found = await get(database, "run_full")
    assert found == FULL
    assert all(getattr(FULL, field.name) is not None for field in fields(Run) if field.name != "settled_at")
    bare = a_run(run_type=None)
    await add(database, bare)
    assert await get(database) == bare


async def test_a_run_that_a_callback_tells_of_first(database: Database) -> None:
    """Its row is inserted with fewer columns, and only if nothing else of it is known."""
    heard = a_run(
        RunState.REPORTED, origin=Origin.CALLBACK, workspace_id="ws_1", error_code="e", error_message="m"
    )
    known = [
        replace(heard, run_id=f"run_{name}", **{name: getattr(FULL, name)})
        for name in (
            "metadata",
            "callback_expected",
            "losses",
            "polls",
            "failed_polls",
            "progress",
            "quoted_cost",
            "cost_due_at",
        )
    ]
    await add(database, heard, *known)
    for run in (heard, *known):
        assert await get(database, run.run_id) == run


@pytest.mark.parametrize("count", [1, 2, 3, 255, 256, 257, 600])
async def test_any_number_of_rows(core: Core, count: int) -> None:
    """However many share a statement, each comes in once, with its own delivery and body, and in order."""
    runs = [a_run(RunState.REPORTED, run_id=f"run_{number:03}") for number in range(count)]
    rows = [
        a_delivery(f"whd_{number:03}", run_id=f"run_{number:03}", body=b"%d" % number)
        for number in range(count)
    ]

    def job(tx: Connection) -> None:
        ledger.add_deliveries(tx, rows)
        ledger.add_runs(tx, runs)
        ledger.add_runs(tx, [])

    await core.database.write(job)
    found = await core.rows(
        "SELECT delivery_id, body, deliveries.run_id, state FROM deliveries JOIN delivery_bodies USING (seq)"
        " JOIN runs USING (run_id) ORDER BY deliveries.seq"
    )
    assert [tuple(row) for row in found] == [
        (f"whd_{number:03}", b"%d" % number, f"run_{number:03}", "reported") for number in range(count)
    ]


@pytest.mark.parametrize(
    "when",
    [
        datetime(1970, 1, 1, tzinfo=UTC),
        datetime(1969, 12, 31, 23, 59, 59, 999000, tzinfo=UTC),
        datetime(1, 1, 1, tzinfo=UTC),
        datetime(9999, 12, 31, 23, 59, 59, 999000, tzinfo=UTC),
    ],
)
def test_times_survive_as_milliseconds(when: datetime) -> None:
    """Integers, never floats: no time moves by being stored."""
    assert from_ms(to_ms(when)) == when


async def test_unknown_runs_are_just_not_there(database: Database) -> None:
    assert await database.read(lambda tx: ledger.runs_by_id(tx, ["run_nowhere"])) == {}
    assert await database.read(lambda tx: ledger.runs_by_id(tx, [])) == {}


async def test_a_change_raises_the_version(database: Database) -> None:
    """Each write is guarded by the version that it was decided on."""
    await add(database, a_run())
    await database.write(lambda tx: ledger.update_runs(tx, [a_run(progress=10)]))
    found = await get(database)
    assert found is not None
    assert (found.progress, found.version) == (10, 1)


async def test_a_run_that_changed_meanwhile_is_not_overwritten(database: Database) -> None:
    """The second of two decisions on the same version is refused as a whole, its other rows included."""
    await add(database, a_run(), a_run(run_id="run_2"))
    await database.write(lambda tx: ledger.update_runs(tx, [a_run(progress=10)]))
    with pytest.raises(StoreUnavailableError):
        await database.write(
            lambda tx: ledger.update_runs(tx, [a_run(run_id="run_2", progress=5), a_run(progress=99)])
        )
    assert (await get(database) or FULL).progress == 10
    assert (await get(database, "run_2") or FULL).progress is None


async def test_a_run_is_added_once(database: Database) -> None:
    """Never a blind upsert: it would reopen settled runs."""
    await add(database, a_run(RunState.COMPLETED))
    with pytest.raises(exc.IntegrityError):
        await add(database, a_run())
    assert (await get(database) or FULL).state is RunState.COMPLETED


async def test_outputs_come_back_in_order(database: Database) -> None:
    """By position, with repeated ids and with texts of any length and character."""
    await add(database, a_run(), a_run(run_id="run_2"))
    rows = [Output(1, "same", "text", "x" * 100_000 + "🙂"), Output(0, "same", "imageUrl", OUTPUT.value)]
    await database.write(lambda tx: ledger.add_outputs(tx, {"run_1": rows, "run_2": []}))
    found = await database.read(lambda tx: ledger.outputs_of_runs(tx, ["run_1", "run_2", "run_3"]))
    assert found == {"run_1": tuple(reversed(rows)), "run_2": (), "run_3": ()}


async def test_a_position_is_taken_once(database: Database) -> None:
    await add(database, a_run())
    await database.write(lambda tx: ledger.add_outputs(tx, {"run_1": [OUTPUT]}))
    with pytest.raises(exc.IntegrityError):
        await database.write(lambda tx: ledger.add_outputs(tx, {"run_1": [OUTPUT]}))


def a_delivery(delivery_id: str = "whd_1", **changes: Any) -> Delivery:
    given: dict[str, Any] = {
        "body": b"\x00\xff",
        "signature": "t=1,v1=00",
        "received_at": NOW,
        "age": 0,
        "secret": 0,
        "run_id": "run_1",
    }
    return Delivery(delivery_id, **(given | changes))


async def test_a_delivery_keeps_its_bytes(core: Core) -> None:
    """Body and signature as they came, in a table apart; each body with its own delivery."""
    rows = [a_delivery("whd_2", body=b"two"), a_delivery("whd_1")]
    await core.database.write(lambda tx: ledger.add_deliveries(tx, rows))
    assert await core.database.read(lambda tx: ledger.known_deliveries(tx, ["whd_1", "whd_3"])) == {"whd_1"}
    found = await core.rows(
        "SELECT delivery_id, body, signature FROM deliveries JOIN delivery_bodies USING (seq)"
    )
    assert sorted(tuple(row) for row in found) == [
        ("whd_1", b"\x00\xff", "t=1,v1=00"),
        ("whd_2", b"two", "t=1,v1=00"),
    ]


async def test_duplicates_are_counted(core: Core) -> None:
    await core.database.write(lambda tx: ledger.add_deliveries(tx, [a_delivery(), a_delivery("whd_2")]))
    for times in (1, 2):
        await core.database.write(partial(ledger.count_duplicates, times={"whd_1": times}, at=NOW))
    found = await core.rows(
        "SELECT delivery_id, duplicates, last_duplicate_at FROM deliveries ORDER BY seq"
    )
    assert [tuple(row) for row in found] == [("whd_1", 3, to_ms(NOW)), ("whd_2", 0, None)]


async def test_due_runs_longest_due_first(database: Database) -> None:
    """Nothing is left waiting behind those that came due later; what is not due is not read."""
    for number, seconds in enumerate((5, -5, -60, 0)):
        await add(database, a_run(run_id=f"run_{number}", next_poll_at=NOW + timedelta(seconds=seconds)))
    await add(database, a_run(RunState.COMPLETED, run_id="run_done"))
    due = await database.read(lambda tx: ledger.due_runs(tx, now=NOW, limit=10))
    assert [run.run_id for run in due] == ["run_2", "run_1", "run_3"]
    assert len(await database.read(lambda tx: ledger.due_runs(tx, now=NOW, limit=2))) == 2
    assert await database.read(ledger.next_read_due_ms) == to_ms(NOW - timedelta(seconds=60))


async def test_nothing_due_is_said_so(database: Database) -> None:
    assert await database.read(ledger.next_read_due_ms) is None


async def test_written_off_runs(database: Database) -> None:
    """Those whose callback's time is over, and only as long as nobody judged them."""
    await add(
        database,
        a_run(RunState.COMPLETED, run_id="run_over", verdict_due_at=NOW),
        a_run(RunState.COMPLETED, run_id="run_soon", verdict_due_at=NOW + timedelta(milliseconds=1)),
        a_run(RunState.COMPLETED, run_id="run_judged", verdict=Verdict.MATCHED),
    )
    found = await database.read(lambda tx: ledger.runs_past_callback(tx, now=NOW, limit=10))
    assert [run.run_id for run in found] == ["run_over"]


# --- what decide never does, the database refuses ----------------------------------------------------------------

IMPOSSIBLE = {
    "settled without a time": a_run(RunState.COMPLETED, settled_at=None),
    "a time of settling on an open run": a_run(settled_at=NOW),
    "lost without a reason": a_run(RunState.LOST, lost_reason=None),
    "a reason on a run that is not lost": a_run(lost_reason=LostReason.DEADLINE),
    "reported without a callback": a_run(RunState.REPORTED, reported_at=None),
    "open and never read again": a_run(next_poll_at=None),
    "reported and never read again": a_run(RunState.REPORTED, next_poll_at=None),
}


@pytest.mark.parametrize("run", IMPOSSIBLE.values(), ids=IMPOSSIBLE)
async def test_impossible_runs_are_refused(database: Database, run: Run) -> None:
    """The CHECKs restate what decide promises, on insert and on update."""
    with pytest.raises(exc.IntegrityError):
        await add(database, run)
    await add(database, a_run())
    with pytest.raises(exc.IntegrityError):
        await database.write(lambda tx: ledger.update_runs(tx, [run]))
    assert await get(database) == a_run()


@pytest.mark.parametrize("column", ["state", "origin", "verdict", "told"])
async def test_unknown_words_are_refused(database: Database, column: str) -> None:
    """An enumeration in Python is one in the database."""
    await add(database, a_run())
    with pytest.raises(exc.IntegrityError):
        await database.write(lambda tx: tx.exec_driver_sql(f"UPDATE runs SET {column} = 'odd'"))  # noqa: S608  # a column's name of ours


async def test_what_hangs_on_a_run_needs_it(database: Database) -> None:
    """Foreign keys are on: no outputs of a run that is not there."""
    with pytest.raises(exc.IntegrityError):
        await database.write(lambda tx: ledger.add_outputs(tx, {"run_nowhere": [OUTPUT]}))


async def test_a_changed_row_is_the_whole_row(database: Database) -> None:
    """Every field is written back, None included: nothing of the old row shines through."""
    await add(database, FULL)
    bare = replace(a_run(run_type=None), run_id="run_full")
    await database.write(lambda tx: ledger.update_runs(tx, [bare]))
    assert await get(database, "run_full") == replace(bare, version=1)


def test_a_first_callback_fills_every_column_that_needs_a_value() -> None:
    """A NOT NULL column of `runs` that its insert leaves out would refuse each new run."""
    columns = schema.runs.columns
    assert {column.name for column in columns} == set(RUN_COLUMNS)
    needed = {column.name for column in columns if not column.nullable and column.server_default is None}
    assert needed <= {*FIRST_CALLBACK_COLUMNS, *NEW_RUN_DEFAULTS}


def a_read_attempt(number: int, **fields: Any) -> ReadAttempt:
    return ReadAttempt(
        NOW + timedelta(seconds=number), "run", ReadOutcome.RETURNED, run_status="running", **fields
    )


async def reads_of(core: Core, run_id: str = "run_1") -> tuple[ReadAttempt, ...]:
    return await core.database.read(lambda tx: ledger.reads_of_run(tx, run_id))


async def test_the_last_reads_of_a_run_are_kept(core: Core) -> None:
    """However many there are, one by one or together, the newest ones are kept, in order; each run has its own."""
    await add(core.database, a_run(), a_run(run_id="run_2"))
    for first in range(1, 3 * ledger.KEPT_READS, 4):
        some = {("run_1", number): a_read_attempt(number) for number in range(first, first + 4)}
        await core.database.write(partial(ledger.add_reads, reads=some))
        last = first + 3
        kept = range(max(1, last - ledger.KEPT_READS + 1), last + 1)
        assert await reads_of(core) == tuple(map(a_read_attempt, kept))
    await core.database.write(lambda tx: ledger.add_reads(tx, {("run_2", 1): a_read_attempt(1)}))
    assert await reads_of(core, "run_2") == (a_read_attempt(1),)
    assert await core.count("run_reads") == ledger.KEPT_READS + 1


async def test_every_field_of_a_read_survives_and_goes_with_its_run(core: Core) -> None:
    full = ReadAttempt(
        NOW, "list", ReadOutcome.FAILED, http_status=308, problem="ü\N{LINE SEPARATOR}'", request_id="req_1", seconds=1.25,
    )  # fmt: skip
    await add(core.database, a_run(RunState.COMPLETED, first_seen_at=NOW - timedelta(days=40)))
    await core.database.write(lambda tx: ledger.add_reads(tx, {("run_1", 7): full}))
    await core.database.write(lambda tx: ledger.add_reads(tx, {}))
    assert await reads_of(core) == (full,)
    await core.database.write(lambda tx: retention.delete_ledger(tx, before=NOW, limit=9))
    assert await core.count("run_reads") == 0
