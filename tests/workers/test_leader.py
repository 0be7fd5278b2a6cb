"""One process at a time does what only one may do; and each hears of what the others commit."""

import asyncio
from collections.abc import AsyncIterator, Callable
from datetime import timedelta
from typing import Any

import pytest

from receiver.store import Database
from receiver.store.changes import Change, Signals
from receiver.store.postgres import PostgresDatabase
from receiver.workers.leader import LEASE, LeaderLease
from receiver.workers.notifier import ChangeNotifier, _to_notice
from tests.support.core import Clock, LoopTime, until, writable
from tests.support.patience import PATIENCE_SECONDS


@pytest.fixture
async def loop_time(monkeypatch: pytest.MonkeyPatch) -> LoopTime:
    """The time of the loop, in the test's hands."""
    loop_time = LoopTime()
    monkeypatch.setattr(asyncio.get_running_loop(), "time", loop_time)
    return loop_time


async def idle(stopping: asyncio.Event) -> None:
    await stopping.wait()


def candidate(
    database: Database, clock: Clock, name: str = "poller", work: Any = idle, **options: Any
) -> LeaderLease:
    return LeaderLease(database, name, work, clock=clock, **options)


async def test_one_holds_a_lease_until_it_runs_out(database: Database, clock: Clock) -> None:
    """Its holder extends it.

    Another gets it at its end, not before, and then the first has lost it.
    """
    one, other = candidate(database, clock), candidate(database, clock)
    assert await one.acquire()
    assert not await other.acquire()
    clock.forward(10)
    assert await one.acquire()
    clock.forward(LEASE.total_seconds() - 0.001)
    assert not await other.acquire()
    clock.forward(0.001)
    assert await other.acquire()
    assert not await one.acquire()
    assert await candidate(database, clock, "janitor").acquire()


async def test_many_stand_at_once_and_one_wins(database: Database, clock: Clock) -> None:
    assert sum(await asyncio.gather(*(candidate(database, clock).acquire() for _ in range(10)))) == 1


async def test_who_waits_tries_again_when_the_lease_ends(
    database: Database, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not a third of a lease later: what a dead process did is taken over within its lease."""
    lease = timedelta(hours=1)
    assert await candidate(database, clock, lease=lease).acquire()
    clock.forward(3599.99)
    begun, stopping = asyncio.Event(), asyncio.Event()

    async def work(stopping: asyncio.Event) -> None:
        begun.set()
        await stopping.wait()

    tries = 0
    write = database.write

    async def count_writes(job: Any) -> Any:
        nonlocal tries
        answer = await write(job)
        tries += 1
        clock.forward(0.02)  # the first try is too early; after it, the lease has ended
        return answer

    monkeypatch.setattr(database, "write", count_writes)
    running = asyncio.create_task(candidate(database, clock, work=work, lease=lease).run(stopping))
    async with asyncio.timeout(PATIENCE_SECONDS):
        await begun.wait()
    assert tries == 2
    stopping.set()
    await running


async def test_who_stops_resigns(database: Database, clock: Clock) -> None:
    """The next one need not wait for the lease; the work has ended by then."""
    begun, ended = asyncio.Event(), asyncio.Event()

    async def work(stopping: asyncio.Event) -> None:
        begun.set()
        await stopping.wait()
        ended.set()

    stopping = asyncio.Event()
    running = asyncio.create_task(candidate(database, clock, work=work).run(stopping))
    await begun.wait()
    assert not await candidate(database, clock).acquire()
    stopping.set()
    await running
    assert ended.is_set()
    assert await candidate(database, clock).acquire()


async def test_who_cannot_renew_stops_before_its_lease_ends(
    database: Database, clock: Clock, loop_time: LoopTime, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be another's by then; once the database is back, somebody is elected again."""
    working = False
    times = writes = 0
    write = database.write

    async def count_write(job: Any) -> Any:
        nonlocal writes
        writes += 1
        try:
            return await write(job)
        finally:
            writes -= 1

    async def work(stopping: asyncio.Event) -> None:
        nonlocal working, times
        working, times = True, times + 1
        await stopping.wait()
        working = False

    async def time_passes_until(holds: Callable[[], bool], *, at_most: float) -> None:
        begun = loop_time.now
        while not holds():
            assert loop_time.now - begun < at_most
            await until(lambda: not writes)  # the database takes its own time, in a thread
            await loop_time.forward(0.05)

    monkeypatch.setattr(database, "write", count_write)
    stopping = asyncio.Event()
    lease = timedelta(seconds=3)
    running = asyncio.create_task(candidate(database, clock, work=work, lease=lease).run(stopping))
    await until(lambda: working)
    await writable(database, False)
    await time_passes_until(lambda: not working, at_most=lease.total_seconds())
    await writable(database, True)
    await time_passes_until(lambda: working, at_most=20)
    assert times == 2
    stopping.set()
    await running


async def test_a_lease_counts_from_when_it_was_asked_for(
    database: Database, clock: Clock, loop_time: LoopTime, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The answer came late, and then none comes.

    The work has ended by the time that the lease has.
    """
    lease = timedelta(seconds=3)
    begun, ended = asyncio.Event(), asyncio.Event()
    write, never = database.write, asyncio.Event()

    async def answer_late(job: Any) -> Any:
        if begun.is_set():
            await never.wait()
        answer = await write(job)
        loop_time.now += 1.2
        return answer

    async def work(stopping: asyncio.Event) -> None:
        begun.set()
        await stopping.wait()
        ended.set()
        monkeypatch.setattr(database, "write", write)

    monkeypatch.setattr(database, "write", answer_late)
    asked, stopping = loop_time.now, asyncio.Event()
    running = asyncio.create_task(candidate(database, clock, work=work, lease=lease).run(stopping))
    await until(begun.is_set)
    while not ended.is_set():
        await loop_time.forward(0.05)
        assert loop_time.now - asked < lease.total_seconds()
    stopping.set()
    await running


async def test_a_bug_in_the_work_is_told_and_frees_the_lease_in_time(
    database: Database, clock: Clock
) -> None:
    """Whoever runs the election hears of it, as of any loop."""

    async def work(_: asyncio.Event) -> None:
        raise KeyError("mine")

    with pytest.raises(KeyError):
        await candidate(database, clock, work=work).run(asyncio.Event())


@pytest.fixture
async def pair(postgres_url: str) -> AsyncIterator[tuple[PostgresDatabase, PostgresDatabase]]:
    one, other = (PostgresDatabase(postgres_url, connections=2) for _ in range(2))
    yield one, other
    await one.close()
    await other.close()


async def test_a_change_is_heard_by_the_others_and_not_echoed(
    pair: tuple[PostgresDatabase, PostgresDatabase],
) -> None:
    """Loops are woken there, and whoever waits for the run is told; each change comes once."""
    stopping = asyncio.Event()
    sides = [(Signals(), database) for database in pair]
    heralds = [ChangeNotifier(database, signals) for signals, database in sides]
    tasks = [
        asyncio.create_task(job(stopping)) for herald in heralds for job in (herald.listen, herald.run)
    ]
    here, there = sides[0][0], sides[1][0]
    await until(lambda: here.poll.is_set() and there.poll.is_set())  # both listen now
    there.dispatch.clear()
    with there.changes.subscribe("run_1") as waiting, here.changes.subscribe() as own:
        here.changes.publish(change := Change("run", "run_1", "completed", "settled"))
        async with asyncio.timeout(PATIENCE_SECONDS):
            assert await waiting.next() == change
        there.changes.publish(answer := Change("dispatch", "run_2", "done", "h"))
        async with asyncio.timeout(PATIENCE_SECONDS):
            assert [await own.next(), await own.next()] == [change, answer]
    assert there.dispatch.is_set()
    stopping.set()
    await asyncio.gather(*tasks)


@pytest.mark.parametrize("notice", ["{", "[]", "7", '{"by": "x"}', '{"by": "x", "changes": [[1]]}', "null"])
async def test_notices_of_others_are_read_with_care(
    pair: tuple[PostgresDatabase, PostgresDatabase], notice: str
) -> None:
    signals = Signals()
    ChangeNotifier(pair[0], signals)._apply(notice)
    assert not signals.poll.is_set()


def test_a_notice_fits_what_postgres_takes() -> None:
    assert len(_to_notice("me", [Change("run", "\u00e9" * 400, "open")] * 500)) < 8000
