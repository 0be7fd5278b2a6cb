"""What is true of PostgreSQL alone: several processes, lost connections, two doors that commit the same at once."""

import asyncio
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psycopg
import pytest
from sqlalchemy import Connection, exc

from receiver.errors import StoreUnavailableError
from receiver.intake.callbacks import Accepted, Duplicate
from receiver.store import ledger, open_database, postgres
from receiver.store.postgres import PostgresDatabase
from tests.support.core import NOW, Clock, Core, a_core, a_read, a_run, all_runs
from tests.support.patience import PATIENCE_SECONDS
from tests.support.postgres import Postgres, sweep
from tests.support.severing_proxy import Moment, run_severing_proxy

ROOT = Path(__file__).parents[2]
IDLE = "idle_in_transaction_session_timeout"


@asynccontextmanager
async def open_postgres(url: str, **options: Any) -> AsyncIterator[PostgresDatabase]:
    database = PostgresDatabase(url, connections=3, **options)
    try:
        yield database
    finally:
        await database.close()


@pytest.fixture
async def database(postgres_url: str) -> AsyncIterator[PostgresDatabase]:
    async with open_postgres(postgres_url) as made:
        yield made


@pytest.fixture
async def doors(postgres_url: str, clock: Clock) -> AsyncIterator[tuple[Core, Core]]:
    """Two processes' doors before one database."""
    async with open_postgres(postgres_url) as one, open_postgres(postgres_url) as other:
        yield a_core(one, clock), a_core(other, clock)


def cut(server: Postgres) -> int:
    """End every connection to the suite's database, as a failover does; return how many there were."""
    return len(
        server.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = 'suite'")
    )


def insert(run_id: str) -> Any:
    return lambda tx: ledger.add_runs(tx, [a_run(run_id=run_id)])


async def test_two_doors_that_get_the_same_delivery_take_it_once(doors: tuple[Core, Core]) -> None:
    """One says accepted, the other duplicate; nobody says 503, whoever of them comes first by how little."""
    for number in range(40):
        answers = await asyncio.gather(*(door.call(f"whd_{number}", f"run_{number}") for door in doors))
        assert set(answers) == {Accepted(), Duplicate()}
    assert await doors[0].count("deliveries") == await doors[0].count("runs") == 40


async def test_two_doors_under_load_lose_nothing(doors: tuple[Core, Core]) -> None:
    """Batches that overlap in any order: each delivery is accepted once, each run is there once, nothing is refused."""
    calls = [
        door.call(f"whd_{n}", f"run_{n // 3}")
        for n in range(300)
        for door in (doors if n % 2 else reversed(doors))
    ]
    answers = Counter(type(answer) for answer in await asyncio.gather(*calls))
    assert answers == {Accepted: 300, Duplicate: 300}
    assert await doors[0].count("runs") == 100


async def test_two_processes_that_settle_a_run_settle_it_once(doors: tuple[Core, Core]) -> None:
    """Both read it from the API at the same moment: its dispatches are made once."""
    for number in range(20):
        run_id = f"run_{number}"
        await doors[0].register(run_id)
        await asyncio.gather(*(door.intake.apply(a_read("completed", NOW, run_id)) for door in doors))
        assert len(await doors[0].dispatches(run_id)) == 1


async def test_a_deadlock_is_tried_again(database: PostgresDatabase) -> None:
    """PostgreSQL ends one of the two; its job runs once more, and both are committed."""
    await database.write(lambda tx: ledger.add_runs(tx, [a_run(run_id="run_a"), a_run(run_id="run_b")]))
    meet = threading.Barrier(2)
    ran: list[str] = []

    def lock_both(first: str, second: str) -> Any:
        def job(tx: Connection) -> None:
            ran.append(first)
            ledger.runs_by_id(tx, [first], for_update=True)
            if len(ran) <= 2:
                meet.wait(PATIENCE_SECONDS)
            ledger.runs_by_id(tx, [second], for_update=True)

        return job

    await asyncio.gather(
        *(database.write(lock_both(*pair)) for pair in (("run_a", "run_b"), ("run_b", "run_a")))
    )
    assert len(ran) > 2


async def test_connections_that_were_cut_are_replaced(
    database: PostgresDatabase, postgres_server: Postgres
) -> None:
    """A restart or failover between two calls is not noticed."""
    await asyncio.gather(*(database.write(insert(f"run_{n}")) for n in range(6)))
    assert await asyncio.to_thread(cut, postgres_server) > 0
    await database.write(insert("run_x"))
    await asyncio.to_thread(cut, postgres_server)
    assert len(await database.read(all_runs)) == 7


async def test_a_connection_cut_within_a_job_begins_it_again(
    database: PostgresDatabase, postgres_server: Postgres
) -> None:
    """Before COMMIT nothing is done yet, so the job may run once more."""
    tries = 0

    def job(tx: Connection) -> None:
        nonlocal tries
        tries += 1
        insert("run_1")(tx)
        if tries == 1:
            cut(postgres_server)
        insert("run_2")(tx)

    await database.write(job)
    assert (tries, len(await database.read(all_runs))) == (2, 2)


@pytest.mark.parametrize(
    ("moment", "after"), [("before COMMIT", Accepted()), ("after COMMIT", Duplicate())]
)
async def test_a_connection_cut_around_the_commit_is_answered_by_the_retry(
    postgres_server: Postgres, postgres_url: str, clock: Clock, moment: Moment, after: object
) -> None:
    """Nobody can know which it was, so every waiter gets its 503; FLORA's retry is then new, or a duplicate. Never both."""
    assert postgres_url
    with run_severing_proxy(postgres_server, "suite") as way:
        async with open_postgres(way.url) as database:
            door = a_core(database, clock)
            await door.call("whd_0", "run_0")
            way.cut_next = moment
            answers = await asyncio.gather(
                *(door.call(f"whd_{n}", f"run_{n}") for n in (1, 2, 3)), return_exceptions=True
            )
            assert {type(answer) for answer in answers} == {StoreUnavailableError}
            assert way.cuts == 1
            assert [await door.call(f"whd_{n}", f"run_{n}") for n in (1, 2, 3)] == [after] * 3
            assert await door.count("deliveries") == await door.count("runs") == 4


async def test_a_run_is_settled_once_though_the_commit_was_cut(
    postgres_server: Postgres, postgres_url: str, clock: Clock
) -> None:
    """The poller reads it again, and finds it settled: one set of outputs, one dispatch."""
    assert postgres_url
    with run_severing_proxy(postgres_server, "suite") as way:
        async with open_postgres(way.url) as database:
            door = a_core(database, clock)
            await door.register("run_1")
            way.cut_next = "after COMMIT"
            with pytest.raises(StoreUnavailableError):
                await door.intake.apply(a_read("completed", NOW, "run_1"))
            await door.intake.apply(a_read("completed", NOW, "run_1"))
            assert len(await door.dispatches("run_1")) == len(await door.outputs("run_1")) == 1


async def test_closing_does_not_wait_for_a_server_that_hangs(
    postgres_server: Postgres, postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What waits for its answer ends with an error, and what is queued behind it is never begun."""
    assert postgres_url
    monkeypatch.setattr(postgres, "_CLOSE_SECONDS", 0.2)
    with run_severing_proxy(postgres_server, "suite") as way:
        database = PostgresDatabase(way.url, connections=1)
        await database.write(lambda _: None)
        way.holding = True
        writing, queued = (asyncio.create_task(database.write(lambda _: None)) for _ in range(2))
        await asyncio.sleep(0)
        async with asyncio.timeout(PATIENCE_SECONDS):
            await database.close()
            await asyncio.wait({writing, queued})
        assert isinstance(writing.exception(), StoreUnavailableError)
        assert queued.cancelled()


def test_an_option_that_libpq_does_not_know_is_reported(postgres_url: str) -> None:
    separator = "&" if "?" in postgres_url else "?"
    with pytest.raises(StoreUnavailableError, match="colour"):
        open_database(f"{postgres_url}{separator}colour=green")


async def test_a_server_that_is_gone_is_unavailable(postgres_server: Postgres) -> None:
    """Told as such on opening, and without the password."""
    url = f"postgresql://flora:hunter2@/x?host={postgres_server.directory}/nowhere"
    with pytest.raises(StoreUnavailableError) as caught:
        open_database(url)
    assert "hunter2" not in str(caught.value)
    async with open_postgres(url) as database:
        for use in (database.read, database.write, database.run):
            with pytest.raises(StoreUnavailableError):
                await use(lambda _: None)


async def test_readers_cannot_write_and_see_one_moment(database: PostgresDatabase) -> None:
    """As on SQLite: what is committed meanwhile is not seen halfway."""
    with pytest.raises(StoreUnavailableError, match="read-only"):
        await database.read(insert("run_1"))
    begun, free = threading.Event(), threading.Event()

    def look(tx: Connection) -> tuple[int, int]:
        before = len(all_runs(tx))
        begun.set()
        free.wait(PATIENCE_SECONDS)
        return before, len(all_runs(tx))

    reading = asyncio.create_task(database.read(look))
    await asyncio.to_thread(begun.wait, 10)
    await database.write(insert("run_1"))
    free.set()
    assert await reading == (0, 0)


async def test_a_jobs_own_error_is_its_own(database: PostgresDatabase) -> None:
    """Undone, whole, and not tried again; constraints are its own fault, too."""
    with pytest.raises(exc.IntegrityError):
        await database.write(lambda tx: (insert("run_1")(tx), insert("run_1")(tx)))
    assert await database.read(all_runs) == ()


async def test_a_closed_database_says_so(postgres_url: str) -> None:
    async with open_postgres(postgres_url) as database:
        pass
    with pytest.raises(StoreUnavailableError):
        await database.write(lambda _: None)


async def test_leases_go_by_the_databases_clock(database: PostgresDatabase) -> None:
    """Whatever this process believes."""
    found = await database.read(lambda tx: database.now(tx, NOW + timedelta(days=900)))
    assert abs(found - datetime.now(UTC)) < timedelta(seconds=20)


async def test_what_one_process_notifies_another_hears(
    postgres_url: str, database: PostgresDatabase
) -> None:
    async with open_postgres(postgres_url) as other:
        notices = other.notices()
        assert await anext(notices) == ""
        await database.notify("poll")
        assert await anext(notices) == "poll"
        assert isinstance(notices, AsyncGenerator)
        await notices.aclose()


async def test_listening_ends_with_its_connection(
    database: PostgresDatabase, postgres_server: Postgres
) -> None:
    """It says so, for the listener to begin anew; telling nobody is no error."""
    notices = database.notices()
    await anext(notices)
    await asyncio.to_thread(cut, postgres_server)
    with pytest.raises(StoreUnavailableError):
        await anext(notices)
    await database.notify("poll")


async def test_an_empty_job_asks_the_server(database: PostgresDatabase, postgres_server: Postgres) -> None:
    """Readiness is such a job: with connections in hand and the server stopped, it must not succeed."""
    await database.write(lambda _: None)
    await asyncio.to_thread(postgres_server.ctl, "stop", "-m", "immediate")
    try:
        with pytest.raises(StoreUnavailableError):
            await database.write(lambda _: None)
    finally:
        await asyncio.to_thread(postgres_server.ctl, "start")
    await database.write(lambda _: None)


async def test_a_server_that_takes_no_writes_is_unavailable(
    database: PostgresDatabase, postgres_server: Postgres
) -> None:
    """A standby, or what an operator has made read-only: reads go on, readiness says no."""
    await asyncio.to_thread(
        postgres_server.execute, "ALTER DATABASE suite SET default_transaction_read_only = on"
    )
    try:
        with pytest.raises(StoreUnavailableError, match="takes no writes"):
            await database.write(lambda _: None)
        assert await database.read(all_runs) == ()
    finally:
        await asyncio.to_thread(
            postgres_server.execute, "ALTER DATABASE suite RESET default_transaction_read_only"
        )
    # A session keeps what it was told at its beginning, and so does a connection to a server that was demoted.
    await database.write(insert("run_1"))


async def test_reads_never_take_all_connections(database: PostgresDatabase) -> None:
    """However many slow reads the operations API is asked for: a callback's commit has its way."""
    begun, free = threading.Semaphore(0), threading.Event()

    def slow(tx: Connection) -> None:
        all_runs(tx)
        begun.release()
        free.wait(PATIENCE_SECONDS)

    reading = [asyncio.create_task(database.read(slow)) for _ in range(10)]
    await asyncio.to_thread(begun.acquire, timeout=PATIENCE_SECONDS)
    async with asyncio.timeout(PATIENCE_SECONDS):
        await database.write(insert("run_1"))
    free.set()
    await asyncio.gather(*reading)


async def test_a_frozen_process_does_not_keep_its_locks(postgres_url: str, clock: Clock) -> None:
    """Whoever stops in the middle of a transaction loses it; callbacks for that run and for others come through again."""
    async with open_postgres(postgres_url) as frozen, open_postgres(postgres_url) as other:
        door = a_core(other, clock)
        await door.register("run_1")
        begun, thaw = threading.Event(), threading.Event()
        asked: list[str] = []

        def job(tx: Connection) -> None:
            asked.extend(tx.exec_driver_sql(f"SHOW {name}").scalar_one() for name in ("lock_timeout", IDLE))
            tx.exec_driver_sql(f"SET LOCAL {IDLE} = '200ms'")  # the test's patience
            ledger.runs_by_id(tx, ["run_1"], for_update=True)
            begun.set()
            thaw.wait(PATIENCE_SECONDS)

        freezing = asyncio.create_task(frozen.write(job))
        await asyncio.to_thread(begun.wait, PATIENCE_SECONDS)
        assert await door.call("whd_1", "run_1") == Accepted()
        assert await door.call("whd_2", "run_2") == Accepted()
        assert asked == ["5s", "10s"]
        thaw.set()
        with pytest.raises(StoreUnavailableError):
            await freezing


async def test_a_lock_that_is_not_let_go_is_not_waited_for(
    postgres_url: str, postgres_server: Postgres
) -> None:
    """Whoever holds it, an operator's session perhaps: a job ends with an error in time, and the next one has its turn."""
    async with open_postgres(postgres_url) as database:
        await database.write(insert("run_1"))
        with psycopg.connect(postgres_url) as session:
            session.execute("SELECT * FROM runs FOR UPDATE")
            with pytest.raises(StoreUnavailableError, match="lock timeout"):
                await database.write(
                    _in_no_time(lambda tx: ledger.runs_by_id(tx, ["run_1"], for_update=True))
                )
        await database.write(lambda tx: ledger.runs_by_id(tx, ["run_1"], for_update=True))


def _in_no_time(job: Any) -> Any:
    def with_short_timeout(tx: Connection) -> None:
        tx.exec_driver_sql("SET LOCAL lock_timeout = '50ms'")
        job(tx)

    return with_short_timeout


def test_a_server_whose_tests_were_killed_is_swept_up() -> None:
    """Else every test run that ends hard would leave one behind."""
    begin = """if True:
        import time
        from tests.support.postgres import postgres
        with postgres() as server:
            print(server.directory, flush=True)
            time.sleep(99)
    """
    with subprocess.Popen(
        [sys.executable, "-c", begin], stdout=subprocess.PIPE, text=True, cwd=ROOT
    ) as owner:
        assert owner.stdout is not None
        left = Path(owner.stdout.readline().strip())
        owner.kill()
        owner.wait()
    pid = int((left / "data/postmaster.pid").read_text().split()[0])
    assert Path(f"/proc/{pid}").exists()
    sweep()
    assert not left.exists()
