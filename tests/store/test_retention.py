"""The janitor's statements: what they delete, and what they must leave."""

from datetime import datetime, timedelta

from sqlalchemy import Connection

from receiver.model import Delivery, Dispatch, DispatchState, Event, Rejection, RunState
from receiver.store import Database, ledger, queue, retention
from receiver.store.rows import to_ms
from tests.support.core import NOW, OUTPUT, Core, a_run

OLD, EDGE = NOW - timedelta(days=31), NOW - timedelta(days=30)


def a_delivery(delivery_id: str, run_id: str | None, received_at: datetime = OLD) -> Delivery:
    return Delivery(delivery_id, b"{}", "t=1", received_at, 0, 0, run_id=run_id)


async def test_the_ring_of_rejections_is_bounded(core: Core) -> None:
    """The newest are kept, however many come at once."""

    async def add(*codes: str) -> None:
        rows = [Rejection(NOW, code, "192.0.2.1", 7) for code in codes]
        await core.database.write(lambda tx: retention.add_rejections(tx, rows, keep=3))

    await add()
    await add("a", "b")
    await add("c", "d")
    assert [row[0] for row in await core.rows("SELECT code FROM rejections ORDER BY seq")] == [
        "b",
        "c",
        "d",
    ]
    await add(*"efghij")
    assert [row[0] for row in await core.rows("SELECT code FROM rejections ORDER BY seq")] == [
        "h",
        "i",
        "j",
    ]


async def test_bodies_go_and_deliveries_stay(core: Core) -> None:
    """Dedupe holds as long as the row exists; a body is kept up to the edge."""
    rows = [a_delivery("whd_1", "run_1"), a_delivery("whd_2", "run_1"), a_delivery("whd_3", "run_1", EDGE)]
    await core.database.write(lambda tx: ledger.add_deliveries(tx, rows))
    for expected in (1, 1, 0):
        assert (
            await core.database.write(lambda tx: retention.delete_bodies(tx, before=EDGE, limit=1))
            == expected
        )
    assert await core.count("delivery_bodies") == 1
    assert await core.count("deliveries") == 3


async def fill(database: Database) -> None:
    """Old runs in every state, with everything that can hang on a run."""

    def job(tx: Connection) -> None:
        for state in RunState:
            ledger.add_runs(tx, [a_run(state, run_id=f"run_{state}", first_seen_at=OLD)])
        ledger.add_runs(tx, [a_run(RunState.COMPLETED, run_id="run_busy", first_seen_at=OLD)])
        ledger.add_runs(tx, [a_run(RunState.COMPLETED, run_id="run_new", first_seen_at=EDGE)])
        ledger.add_outputs(tx, {"run_completed": [OUTPUT]})
        ledger.add_dispatches(
            tx,
            [
                Dispatch("run_completed", "h", Event.SETTLED, 0, DispatchState.READY, NOW),
                Dispatch("run_busy", "h2", Event.SETTLED, 0, DispatchState.READY, NOW),
            ],
        )
        queue.reserve_location(tx, "run_completed", "h", 0, "output_1", "/a")
        (leased,) = queue.claim(tx, "h", limit=1, max_attempts=1, token="t", now=NOW, until=NOW)
        queue.finish(tx, leased, token="t", state=DispatchState.DONE, now=NOW)
        ledger.add_deliveries(
            tx,
            [
                a_delivery("whd_completed", "run_completed"),
                a_delivery("whd_open", "run_open"),
                a_delivery("whd_none", None),
                a_delivery("whd_gone", "run_gone"),
                a_delivery("whd_gone_new", "run_gone", EDGE),
            ],
        )

    await database.write(job)


async def test_old_runs_that_are_over_go_with_all_that_hangs_on_them(core: Core) -> None:
    """What is open, what somebody still works on, and what is not old enough stays; so do deliveries of runs that stay."""
    await fill(core.database)
    deleted = 1
    while deleted:
        deleted = await core.database.write(lambda tx: retention.delete_ledger(tx, before=EDGE, limit=1))
        assert deleted <= 2
    runs = {row[0] for row in await core.rows("SELECT run_id FROM runs")}
    assert runs == {"run_open", "run_reported", "run_busy", "run_new"}
    for table in ("outputs", "artifacts", "dispatch_attempts"):
        assert await core.count(table) == 0, table
    assert await core.count("dispatches") == 1
    deliveries = {row[0] for row in await core.rows("SELECT delivery_id FROM deliveries")}
    assert deliveries == {"whd_open", "whd_gone_new"}
    assert await core.count("delivery_bodies") == 2


async def test_what_a_wrong_clock_put_off_is_due_now(core: Core) -> None:
    """Reads and retries further ahead than anything is ever put; what is put off in order stays put off."""
    far, near = NOW + timedelta(days=365), NOW + timedelta(days=1)

    def job(tx: Connection) -> None:
        ledger.add_runs(tx, [a_run(next_poll_at=far), a_run(run_id="run_2", next_poll_at=near)])
        ledger.add_dispatches(
            tx,
            [
                Dispatch("run_1", "h", Event.SETTLED, 0, DispatchState.READY, far),
                Dispatch("run_2", "h", Event.SETTLED, 0, DispatchState.READY, near),
                Dispatch("run_1", "h", Event.LOST, 0, DispatchState.DONE, far),
            ],
        )

    await core.database.write(job)
    latest = NOW + timedelta(days=2)
    assert await core.database.write(lambda tx: retention.make_due_by(tx, now=NOW, latest=latest)) == 2
    assert await core.database.write(lambda tx: retention.make_due_by(tx, now=NOW, latest=latest)) == 0
    assert [
        tuple(row) for row in await core.rows("SELECT run_id, next_poll_at FROM runs ORDER BY run_id")
    ] == [
        ("run_1", to_ms(NOW)),
        ("run_2", to_ms(near)),
    ]
    found = await core.rows("SELECT due_at FROM dispatches WHERE state = 'ready' ORDER BY run_id")
    assert [row[0] for row in found] == [to_ms(NOW), to_ms(near)]
