"""The dispatcher: whatever a handler does, its dispatch is done, dead or retried."""

import asyncio
import json
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any, ClassVar

import pytest
import structlog
from pydantic import BaseModel

from receiver.errors import LocationTakenError, StoreUnavailableError
from receiver.handler import Answer, Context, Done, Handler, Reject, Retry, SettledRun
from receiver.model import DispatchState, Event, Operation, Output, Start, StartState, Subscription
from receiver.net.clients import tls_context
from receiver.net.download import Downloader
from receiver.plugins import attempt as attempt_module
from receiver.store import Database, queue, starts
from receiver.workers import dispatcher as dispatcher_module
from receiver.workers.dispatcher import Dispatcher
from tests.support.core import NOW, OUTPUT, Clock, Core, a_core, a_read, registered_handler, until, writable
from tests.support.defaults import download_limits
from tests.support.patience import PATIENCE_SECONDS

Act = Callable[[SettledRun, Context], Awaitable[Any]]
TLS = tls_context()
MEDIA = "https://media.example/media/fox.png?sig=1"


@dataclass
class Scripted:
    """A handler that does what a test tells it, and remembers what it was called with."""

    Config: ClassVar[type[BaseModel]] = BaseModel
    act: Act
    calls: list[tuple[SettledRun, str, int]] = field(default_factory=list)

    async def handle(self, run: SettledRun, context: Context) -> Answer:
        self.calls.append((run, context.idempotency_key, context.attempt))
        answer: Answer = await self.act(run, context)
        return answer


def scripted_handler(*answers: Any) -> Scripted:
    """Return a handler that gives these answers in turn, the last one for ever."""
    left = list(answers)

    async def act(_run: SettledRun, _context: Context) -> Any:
        answer = left.pop(0) if len(left) > 1 else left[0]
        if isinstance(answer, BaseException):
            raise answer
        return answer

    return Scripted(act)


def hanging_handler(*, stubborn: int = 0) -> tuple[Scripted, asyncio.Event]:
    """Return a handler that waits for an event; it swallows that many cancellations."""
    free = asyncio.Event()

    async def act(_run: SettledRun, _context: Context) -> Any:
        left = stubborn
        while True:
            try:
                await free.wait()
            except asyncio.CancelledError:
                if left <= 0:
                    raise
                left -= 1
            else:
                return Done()

    return Scripted(act), free


@dataclass
class Bench:
    """A ledger with runs in it, and dispatchers to order."""

    core: Core
    downloader: Downloader
    made: list[Dispatcher] = field(default_factory=list)

    def dispatcher(
        self, *handlers: Handler, names: Sequence[str] = ("h", "i", "j"), **options: Any
    ) -> Dispatcher:
        limits = {
            key: options.pop(key)
            for key in ("max_attempts", "timeout_seconds", "concurrency")
            if key in options
        }
        registrations = [
            registered_handler(name, handler, **limits)
            for name, handler in zip(names, handlers, strict=False)
        ]
        made = Dispatcher(
            self.core.database,
            registrations,
            self.core.subscriptions,
            downloader=self.downloader,
            signals=self.core.signals,
            metrics=self.core.metrics,
            apply=self.core.intake.apply,
            clock=self.core.clock,
            jitter=lambda: 0.0,
            **{"lease": timedelta(seconds=60), **options},
        )
        self.made.append(made)
        return made

    async def settle(self, *run_ids: str) -> None:
        for run_id in run_ids or ("run_1",):
            await self.core.register(run_id, metadata={"market": "DE"})
            await self.core.settle(run_id, charged_cost=0.1)

    async def round(self, dispatcher: Dispatcher, seconds: float = 0) -> None:
        """Let everything due run to its end, `seconds` later than now."""
        await dispatcher.tick(self.core.clock.forward(seconds))
        await dispatcher.drain()

    async def states(self, run_id: str = "run_1") -> dict[str, tuple[str, int]]:
        rows = await self.core.dispatches(run_id)
        return {f"{row.handler}:{row.event}:{row.round}": (row.state.value, row.attempts) for row in rows}

    async def error(self) -> str:
        return (await self.core.dispatches())[0].last_error or ""


@pytest.fixture
async def bench(database: Database, clock: Clock) -> AsyncIterator[Bench]:
    downloader = Downloader(limits=download_limits(), tls=TLS)
    yield Bench(a_core(database, clock), downloader)
    await downloader.aclose()


@pytest.fixture(autouse=True)
def no_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits in these tests."""
    monkeypatch.setattr(attempt_module, "_GRACE_SECONDS", 0.01)
    monkeypatch.setattr(dispatcher_module, "_RETRY_WRITE_SECONDS", 0.0)


# --- answers --------------------------------------------------------------------------------------
# ---------------


async def test_done_is_done_once(bench: Bench) -> None:
    """The handler gets the run as it is, under a stable key, and is not called again."""
    await bench.settle()
    handler = scripted_handler(Done({"at": "/a"}))
    dispatcher = bench.dispatcher(handler)
    await bench.round(dispatcher)
    await bench.round(dispatcher, 3600)
    ((run, key, attempt),) = handler.calls
    assert (key, attempt) == ("run_1:h:settled:0", 1)
    assert (run.run_id, run.status, run.outputs, run.metadata) == (
        "run_1",
        "completed",
        (OUTPUT,),
        {"market": "DE"},
    )
    assert (run.charged_cost, run.settled_by, run.verdict) == (0.1, "poll", None)
    assert await bench.states() == {"h:settled:0": ("done", 1)}
    assert await bench.core.rows("SELECT result FROM dispatches") == [('{"at": "/a"}',)]


async def test_retry_waits_its_pause_under_the_same_key(bench: Bench) -> None:
    await bench.settle()
    handler = scripted_handler(Retry("later", after_seconds=30), Retry("again"), Done())
    dispatcher = bench.dispatcher(handler)
    await bench.round(dispatcher)
    assert await bench.states() == {"h:settled:0": ("ready", 1)}
    assert await bench.error() == "later"
    await bench.round(dispatcher, 29)
    assert len(handler.calls) == 1
    await bench.round(dispatcher, 1)
    await bench.round(dispatcher, 1)
    assert len(handler.calls) == 2
    await bench.round(dispatcher, 1)
    assert [(key, attempt) for _, key, attempt in handler.calls] == [
        ("run_1:h:settled:0", n) for n in (1, 2, 3)
    ]
    assert await bench.states() == {"h:settled:0": ("done", 3)}
    rows = await bench.core.rows("SELECT attempt, outcome, error FROM dispatch_attempts ORDER BY attempt")
    assert [tuple(row) for row in rows] == [(1, "ready", "later"), (2, "ready", "again"), (3, "done", None)]


async def test_a_handler_has_its_run_read_again(bench: Bench) -> None:
    """When an output's URL has expired, the run is due at once.

    The next attempt sees its new URL.
    """
    handler = scripted_handler(Retry("expired", reread=True), Done())
    dispatcher = bench.dispatcher(handler)
    await bench.settle()
    assert (await bench.core.run()).next_poll_at is None
    await bench.round(dispatcher)
    assert (await bench.core.run()).next_poll_at == bench.core.clock.now
    again = replace(OUTPUT, value="https://media.flora.example/again.png")
    strange = Output(7, "another", "imageUrl", "https://media.flora.example/another.png")
    await bench.core.intake.apply(a_read("completed", bench.core.clock.now, outputs=(again, strange)))
    await bench.round(dispatcher, seconds=60)
    assert [run.outputs for run, _, _ in handler.calls] == [(OUTPUT,), (again,)]
    assert (await bench.core.run()).next_poll_at is None
    assert (await bench.states())["h:settled:0"] == ("done", 2)


async def test_a_handler_can_ask_what_flora_was_asked_for(bench: Bench) -> None:
    """The request of a run started here, without its key and callback URL.

    For other runs, nothing.
    """
    body = {"inputs": [{"id": "prompt", "type": "text", "value": "a fox"}], "mode": "async"}
    start = Start(
        token="t1",
        workspace_id="",
        operation=Operation.TECHNIQUE_RUN,
        technique_id="tech_1",
        idempotency_key="k1",
        request=json.dumps(
            {**body, "idempotency_key": "k1", "callback_url": "https://x.test/callbacks/flora?start=t1"}
        ),
        request_hash="h",
        metadata={},
        callback_expected=True,
        state=StartState.STARTED,
        created_at=NOW,
        due_at=NOW,
        run_id="run_1",
    )
    await bench.core.database.write(lambda tx: starts.add_start(tx, start))
    await bench.settle("run_1", "run_2")
    asked: dict[str, Any] = {}

    async def act(run: SettledRun, context: Context) -> Any:
        asked[run.run_id] = await context.request()
        return Done()

    await bench.round(bench.dispatcher(Scripted(act)))
    assert asked == {"run_1": body, "run_2": None}


async def test_reject_is_never_tried_again(bench: Bench) -> None:
    await bench.settle()
    handler = scripted_handler(Reject("no such bucket"))
    dispatcher = bench.dispatcher(handler)
    await bench.round(dispatcher)
    await bench.round(dispatcher, 10**6)
    assert len(handler.calls) == 1
    assert await bench.states() == {"h:settled:0": ("dead", 1)}
    assert await bench.error() == "no such bucket"


class _MuteError(Exception):
    def __str__(self) -> str:
        raise RuntimeError("not even this")


@pytest.mark.parametrize(
    ("failure", "reason"),
    [
        (RuntimeError("boom"), "RuntimeError: boom"),
        (KeyError(), "KeyError: "),
        (SystemExit(3), "SystemExit: 3"),
        (KeyboardInterrupt(), "KeyboardInterrupt: "),
        (asyncio.CancelledError(), "it cancelled itself"),
        (TimeoutError(), "TimeoutError: "),
        (StopAsyncIteration(), "StopAsyncIteration: "),
        (OSError("\udcff\x00"), "OSError: \ufffd\ufffd"),
        (_MuteError(), "_Mute"),
        (RuntimeError("x" * 2_000), "RuntimeError: xxx"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else None,
)
async def test_whatever_a_handler_raises_means_retry(
    bench: Bench, failure: BaseException, reason: str
) -> None:
    """Not one of them stops the service, or loses the dispatch; the reason fits into the ledger."""
    await bench.settle()
    handler = scripted_handler(failure, Done())
    dispatcher = bench.dispatcher(handler)
    await bench.round(dispatcher)
    assert await bench.states() == {"h:settled:0": ("ready", 1)}
    assert (await bench.error()).startswith(reason)
    assert len(await bench.error()) <= 1000
    await bench.round(dispatcher, 10)
    assert await bench.states() == {"h:settled:0": ("done", 2)}


async def test_a_handler_that_exits_the_process_does_not(bench: Bench) -> None:
    await bench.settle()

    async def act(_run: SettledRun, _context: Context) -> Any:
        sys.exit("bye")

    await bench.round(bench.dispatcher(Scripted(act)))
    assert await bench.error() == "SystemExit: bye"


@pytest.mark.parametrize("rubbish", [None, True, "done", {}, Done, object()])
async def test_rubbish_means_retry(bench: Bench, rubbish: Any) -> None:
    """Forgetting to return is not success."""
    await bench.settle()
    await bench.round(bench.dispatcher(scripted_handler(rubbish)))
    assert await bench.states() == {"h:settled:0": ("ready", 1)}
    assert "instead of Done, Retry or Reject" in await bench.error()


LOOP: dict[str, Any] = {}
LOOP["self"] = LOOP


@pytest.mark.parametrize(
    ("answer", "state"),
    [
        (Done({"half": "\ud800", "nul": "\x00", "at": NOW}), "done"),
        (Done(LOOP), "done"),
        (Done({("a", "b"): 1}), "done"),  # type: ignore[dict-item]
        (Done([1, 2]), "done"),  # type: ignore[arg-type]
        (Done(None), "done"),  # type: ignore[arg-type]
        (Done({"nan": float("nan")}), "done"),
        (Retry("\ud800\x00"), "ready"),
        (Retry(ValueError("x")), "ready"),  # type: ignore[arg-type]
        (Retry(None), "ready"),  # type: ignore[arg-type]
        (Retry(_MuteError()), "ready"),  # type: ignore[arg-type]
        (Retry("x", after_seconds=float("inf")), "ready"),
        (Retry("x", after_seconds=float("nan")), "ready"),
        (Retry("x", after_seconds=-1e300), "ready"),
        (Retry("x", after_seconds="soon"), "ready"),  # type: ignore[arg-type]
        (Reject(_MuteError()), "dead"),  # type: ignore[arg-type]
        (Reject("\ud800"), "dead"),
    ],
)
async def test_an_odd_answer_never_leaves_its_lease_behind(bench: Bench, answer: Any, state: str) -> None:
    """A result that cannot be stored is dropped, its decision is not.

    Done stays done, and no effect is applied twice.
    """
    await bench.settle()
    dispatcher = bench.dispatcher(scripted_handler(answer))
    await bench.round(dispatcher)
    assert await bench.states() == {"h:settled:0": (state, 1)}


async def test_what_a_handler_says_shows_no_media_url_and_no_secret(bench: Bench) -> None:
    """Libraries quote URLs, or paths alone.

    The database, the API and the log show only the host.
    """
    await bench.core.register("run_1")
    await bench.core.settle(
        "run_1", outputs=[Output(0, "out", "imageUrl", MEDIA), Output(1, "t", "text", "a text")]
    )
    told = f"Max retries exceeded with url: /media/fox.png?sig=1 {MEDIA} https://chat.example/T0/secret whsec_abc"
    dispatcher = bench.dispatcher(
        scripted_handler(RuntimeError(told), Retry(told), Done({"at": MEDIA, "a": ["a text"]}))
    )
    with structlog.testing.capture_logs() as lines:
        await bench.round(dispatcher)
        shown = "url: /… https://media.example/… https://chat.example/… whsec_***"
        assert await bench.error() == f"RuntimeError: Max retries exceeded with {shown}"
        await bench.round(dispatcher, 10)
        assert await bench.error() == f"Max retries exceeded with {shown}"
        await bench.round(dispatcher, 10)
    (row,) = await bench.core.dispatches()
    assert (row.state, row.result) == (
        DispatchState.DONE,
        {"at": "https://media.example/…", "a": ["a text"]},
    )
    assert "RuntimeError" in str(lines)
    assert "fox.png" not in str(lines)


async def test_a_result_is_kept_as_strict_json_if_it_is_small(bench: Bench) -> None:
    """It is what the API shows later: nothing in it may break that, or fill the ledger."""
    await bench.settle("run_1", "run_2")
    odd = {"nan": float("nan"), "half": "\ud800", "nul": "\x00", "at": NOW, "deep": {"a": (1,)}}
    await bench.round(
        bench.dispatcher(scripted_handler(Done(odd), Done({"text": "x" * 300_000})), concurrency=1)
    )
    rows = [*await bench.core.dispatches("run_1"), *await bench.core.dispatches("run_2")]
    kept = {"nan": None, "half": "\ufffd", "nul": "\x00", "at": str(NOW), "deep": {"a": [1]}}
    assert [row.result for row in rows] == [kept, None]
    await bench.round(bench.made[0])
    (row,) = await bench.core.dispatches("run_2")
    assert "too long" in str(row.result)
    assert row.state is DispatchState.DONE


# --- time -----------------------------------------------------------------------------------------
# ---------------


@pytest.mark.parametrize("stubborn", [0, 10])
async def test_a_handler_that_hangs_is_given_up(bench: Bench, stubborn: int) -> None:
    """Whether it heeds its cancellation or swallows it: its time is over, and it is tried again."""
    await bench.settle()
    handler, free = hanging_handler(stubborn=stubborn)
    await bench.round(bench.dispatcher(handler, timeout_seconds=0.01))
    assert await bench.states() == {"h:settled:0": ("ready", 1)}
    assert await bench.error() == "it took longer than 0.01 s"
    free.set()


async def test_one_hanging_handler_delays_no_other(database: Database, clock: Clock, bench: Bench) -> None:
    """Each works within its own limits."""
    bench.core = a_core(database, clock, subscriptions=[Subscription("h"), Subscription("i")])
    await bench.settle("run_1", "run_2")
    slow, free = hanging_handler()
    quick = scripted_handler(Done())
    dispatcher = bench.dispatcher(slow, quick, concurrency=1)
    await dispatcher.tick(clock.now)
    while len(quick.calls) < 2:
        await dispatcher.tick(clock.now)
        await asyncio.sleep(0)
    assert len(slow.calls) == 1
    free.set()
    await dispatcher.drain()
    assert (await bench.states())["h:settled:0"] == ("done", 1)


async def test_no_more_at_once_than_allowed(bench: Bench) -> None:
    """The rest waits in the ledger, not in memory."""
    await bench.settle(*(f"run_{n}" for n in range(10)))
    handler, free = hanging_handler()
    dispatcher = bench.dispatcher(handler, concurrency=3)
    for _ in range(3):
        await dispatcher.tick(bench.core.clock.now)
    assert len(handler.calls) <= 3
    assert await bench.core.rows("SELECT count(*) FROM dispatches WHERE state = 'leased'") == [(3,)]
    free.set()
    await dispatcher.drain()
    for _ in range(4):
        await bench.round(dispatcher)
    assert await bench.core.rows("SELECT state, count(*) FROM dispatches GROUP BY state") == [("done", 10)]
    assert len(handler.calls) == 10


async def test_the_next_look_is_when_the_next_retry_is_due(bench: Bench) -> None:
    """Neither a spin nor a long sleep; where other processes write too, a look each second."""
    await bench.settle()
    dispatcher = bench.dispatcher(scripted_handler(Retry("x", after_seconds=2)))
    await bench.round(dispatcher)
    idle = 1 if bench.core.database.shared else 5
    assert await dispatcher.tick(bench.core.clock.now) == pytest.approx(min(2, idle))
    assert await bench.dispatcher(scripted_handler(Done()), names=["nobody"]).tick(NOW) == idle


# --- death and alerts
# --------------------------------------------------------------------------------------------


@pytest.fixture
def bench_with_alerts(database: Database, clock: Clock, bench: Bench) -> Bench:
    """Handlers `h`, and `i` that listens to deaths, its own among them."""
    bench.core = a_core(
        database, clock, subscriptions=[Subscription("h"), Subscription("i", on=(Event.DEAD,))]
    )
    return bench


async def test_used_up_attempts_are_dead_and_told(bench_with_alerts: Bench) -> None:
    """In the same commit, handlers of `dead` get a dispatch, and the loop is woken for it."""
    await bench_with_alerts.settle()
    alert = scripted_handler(Done())
    dispatcher = bench_with_alerts.dispatcher(scripted_handler(Retry("no")), alert, max_attempts=2)
    await bench_with_alerts.round(dispatcher)
    await bench_with_alerts.round(dispatcher, 10)
    states = await bench_with_alerts.states()
    assert states["h:settled:0"] == ("dead", 2)
    assert "i:dead:0" in states  # done already, if this very tick came to it after the death
    await bench_with_alerts.round(dispatcher)
    assert await bench_with_alerts.states() == {"h:settled:0": ("dead", 2), "i:dead:0": ("done", 1)}
    assert [key for _, key, _ in alert.calls] == ["run_1:i:dead:0"]


async def test_the_death_of_an_alert_is_not_announced_by_another(bench_with_alerts: Bench) -> None:
    """An alert channel that is down must not alert about itself for ever."""
    await bench_with_alerts.settle()
    dispatcher = bench_with_alerts.dispatcher(
        scripted_handler(Reject("no")), scripted_handler(Reject("down"))
    )
    for _ in range(5):
        await bench_with_alerts.round(dispatcher, 10)
    assert await bench_with_alerts.states() == {"h:settled:0": ("dead", 1), "i:dead:0": ("dead", 1)}


async def test_each_death_of_a_run_is_an_alert_of_its_own(
    database: Database, clock: Clock, bench: Bench
) -> None:
    bench.core = a_core(
        database,
        clock,
        subscriptions=[Subscription("h"), Subscription("i", on=(Event.DEAD,)), Subscription("j")],
    )
    await bench.settle()
    dispatcher = bench.dispatcher(
        scripted_handler(Reject("no")), scripted_handler(Done()), scripted_handler(Reject("no"))
    )
    await bench.round(dispatcher)
    await bench.round(dispatcher)
    await bench.round(dispatcher)
    assert {key: state for key, (state, _) in (await bench.states()).items()} == {
        "h:settled:0": "dead",
        "j:settled:0": "dead",
        "i:dead:0": "done",
        "i:dead:1": "done",
    }


async def test_what_killed_its_process_on_the_last_attempt_is_dead_and_told(
    bench_with_alerts: Bench,
) -> None:
    """It never returned.

    After the restart it is dead, not leased again, and listeners get the change.
    """
    await bench_with_alerts.settle()
    for _ in range(2):
        handler, free = hanging_handler()
        await bench_with_alerts.dispatcher(handler, max_attempts=2).tick(NOW)
        await bench_with_alerts.core.database.write(queue.release_all)  # what the next start does
        free.set()
    for made in bench_with_alerts.made:
        await made.drain()
    survivor = scripted_handler(Done())
    await bench_with_alerts.round(bench_with_alerts.dispatcher(survivor, max_attempts=2))
    assert survivor.calls == []
    assert await bench_with_alerts.states() == {"h:settled:0": ("dead", 2), "i:dead:0": ("ready", 0)}


# --- leases ---------------------------------------------------------------------------------------
# ---------------


async def test_a_worker_that_lost_its_lease_writes_nothing(bench: Bench) -> None:
    """Somebody else took over meanwhile: their answer counts."""
    await bench.settle()
    slow, free = hanging_handler()
    old = bench.dispatcher(slow, takeover=True)
    await old.tick(NOW)
    new = bench.dispatcher(scripted_handler(Retry("mine")), takeover=True)
    await bench.round(new, 61)
    free.set()
    await old.drain()
    assert await bench.states() == {"h:settled:0": ("ready", 2)}
    assert await bench.error() == "mine"


async def test_renewing_cancels_what_was_taken_over(bench: Bench) -> None:
    """And keeps what was not."""
    await bench.settle("run_1", "run_2")
    slow, free = hanging_handler()
    old = bench.dispatcher(slow, takeover=True)
    await old.tick(NOW)
    await bench.core.database.write(
        lambda tx: tx.exec_driver_sql(
            "UPDATE dispatches SET lease_token = 'x' WHERE run_id = 'run_1'"
        ).close()
    )
    bench.core.clock.forward(50)
    await old.renew()
    await until(lambda: len(old._running) == 1)
    (attempt,) = old._running.values()
    assert attempt.leased.run.run_id == "run_2"
    assert (await bench.core.dispatches("run_2"))[0].lease_until == NOW + timedelta(seconds=110)
    free.set()
    await old.drain()
    assert await bench.states("run_2") == {"h:settled:0": ("done", 1)}
    assert await bench.states() == {"h:settled:0": ("leased", 1)}


@pytest.mark.parametrize("stubborn", [0, 10])
async def test_stopping_gives_back_uncounted(bench: Bench, stubborn: int) -> None:
    """We stop, the handler is not to blame: the same attempt number comes again."""
    await bench.settle()
    slow, free = hanging_handler(stubborn=stubborn)
    dispatcher = bench.dispatcher(slow)
    await dispatcher.tick(NOW)
    await asyncio.sleep(0)
    await dispatcher.release()
    assert await bench.states() == {"h:settled:0": ("ready", 0)}
    free.set()
    handler = scripted_handler(Done())
    await bench.round(bench.dispatcher(handler))
    assert [attempt for _, _, attempt in handler.calls] == [1]


async def test_running_until_stopped(bench: Bench) -> None:
    """The loop does what is due, wakes for new work, and ends when stopped, with no lease left."""
    await bench.settle()
    handler = scripted_handler(Done())
    dispatcher = bench.dispatcher(handler)
    stopping = asyncio.Event()
    loop = asyncio.create_task(dispatcher.run(stopping))
    await until(lambda: len(handler.calls) == 1)
    await bench.settle("run_2")
    await until(lambda: len(handler.calls) == 2 and not dispatcher._running)
    stopping.set()
    await asyncio.wait_for(loop, PATIENCE_SECONDS)
    for run_id in ("run_1", "run_2"):
        assert await bench.states(run_id) == {"h:settled:0": ("done", 1)}


async def test_an_answer_that_cannot_be_written_is_kept_until_it_can(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The effect is applied.

    A disk that is full for a moment neither leaves the lease behind nor calls the handler again.
    """
    await bench.settle()
    handler, free = hanging_handler()
    dispatcher = bench.dispatcher(handler)
    await dispatcher.tick(NOW)
    await writable(bench.core.database, False)
    tries = 0
    write = bench.core.database.write

    async def count_writes(job: Any) -> Any:
        nonlocal tries
        tries += 1
        return await write(job)

    monkeypatch.setattr(bench.core.database, "write", count_writes)
    free.set()
    await until(lambda: tries >= 3)
    await writable(bench.core.database, True)
    await dispatcher.drain()
    assert await bench.states() == {"h:settled:0": ("done", 1)}
    assert len(handler.calls) == 1


async def test_what_is_being_written_down_is_not_given_back(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stop comes while the result is being written.

    Released then, the effect would be applied again.
    """
    await bench.settle()
    handler, free = hanging_handler()
    dispatcher = bench.dispatcher(handler)
    await dispatcher.tick(NOW)
    writing, written = asyncio.Event(), asyncio.Event()
    write = bench.core.database.write

    async def slow(job: Any) -> Any:
        writing.set()
        await written.wait()
        return await write(job)

    monkeypatch.setattr(bench.core.database, "write", slow)
    free.set()
    await writing.wait()
    stopping = asyncio.create_task(dispatcher.release())
    await asyncio.sleep(0)
    written.set()
    await stopping
    assert await bench.states() == {"h:settled:0": ("done", 1)}
    await bench.round(bench.dispatcher(handler))
    assert len(handler.calls) == 1


async def test_stopping_does_not_wait_for_a_database_that_is_gone(bench: Bench) -> None:
    """Whoever stops us ends the waiting; nothing goes on behind their back."""
    await bench.settle()
    handler, free = hanging_handler()
    dispatcher = bench.dispatcher(handler)
    await dispatcher.tick(NOW)
    await writable(bench.core.database, False)
    free.set()
    await until(lambda: all(attempt.has_returned for attempt in dispatcher._running.values()))
    stopping = asyncio.create_task(dispatcher.release())
    await asyncio.sleep(0)
    stopping.cancel()
    await asyncio.wait({stopping})
    await until(lambda: not dispatcher._running)
    assert await bench.states() == {"h:settled:0": ("leased", 1)}


async def test_renewing_leaves_alone_what_has_just_ended(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its lease is gone because it is done.

    No process took it over, and listeners get the change.
    """
    await bench.settle()
    handler, free = hanging_handler()
    dispatcher = bench.dispatcher(handler)
    await dispatcher.tick(NOW)
    committed, told = asyncio.Event(), asyncio.Event()
    write = bench.core.database.write

    async def slow(job: Any) -> Any:
        answer = await write(job)
        if not committed.is_set():
            committed.set()
            await told.wait()
        return answer

    monkeypatch.setattr(bench.core.database, "write", slow)
    with bench.core.signals.changes.subscribe("run_1") as listener:
        free.set()
        await committed.wait()
        await dispatcher.renew()
        told.set()
        await dispatcher.drain()
        assert (await asyncio.wait_for(listener.next(), PATIENCE_SECONDS)).state == "done"


async def test_renewing_leaves_alone_what_has_begun_anew(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lease that could not be renewed was the attempt's before.

    The one that runs now has its own.
    """
    await bench.settle()
    handler, free = hanging_handler()
    dispatcher = bench.dispatcher(handler)
    await dispatcher.tick(NOW)
    (before,) = dispatcher._running.values()
    write = bench.core.database.write

    async def meanwhile(job: Any) -> Any:
        if before.task and not before.task.done():
            before.task.cancel()
            await dispatcher.drain()
            await write(lambda tx: queue.release(tx, [before.leased.seq], token=before.token))
            monkeypatch.setattr(bench.core.database, "write", write)
            await dispatcher.tick(bench.core.clock.now)
        return await write(job)

    monkeypatch.setattr(bench.core.database, "write", meanwhile)
    await dispatcher.renew()
    free.set()
    await dispatcher.drain()
    assert await bench.states() == {"h:settled:0": ("done", 1)}


async def test_a_commit_whose_answer_is_lost_is_recognised(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The connection was cut just then.

    The second try finds what the first wrote, and listeners get the change.
    """
    await bench.settle()
    handler, free = hanging_handler()
    dispatcher = bench.dispatcher(handler)
    await dispatcher.tick(NOW)
    write = bench.core.database.write
    tries = 0

    async def cut(job: Any) -> Any:
        nonlocal tries
        tries += 1
        answer = await write(job)
        if tries == 1:
            raise StoreUnavailableError("the connection was cut")
        return answer

    monkeypatch.setattr(bench.core.database, "write", cut)
    with bench.core.signals.changes.subscribe("run_1") as listener:
        free.set()
        await dispatcher.drain()
        assert (await asyncio.wait_for(listener.next(), PATIENCE_SECONDS)).state == "done"
    assert tries == 2
    assert await bench.states() == {"h:settled:0": ("done", 1)}
    assert len(handler.calls) == 1


# --- what a handler gets
# -----------------------------------------------------------------------------------------


async def test_a_context_reserves_and_stores(bench: Bench) -> None:
    """Committed on return, seen by the next attempt, and kept from other runs."""
    seen: list[list[tuple[str, bool]]] = []

    async def act(_run: SettledRun, context: Context) -> Any:
        seen.append([(artifact.location, artifact.stored_at is not None) for artifact in context.artifacts])
        await context.reserve(0, "output_1", "/same")
        await context.store_artifact(0, size=3, sha256="ab", content_type=None)
        return Retry("again") if context.attempt == 1 else Done()

    await bench.settle("run_1")
    dispatcher = bench.dispatcher(Scripted(act))
    await bench.round(dispatcher)
    await bench.round(dispatcher, 10)
    assert seen == [[], [("/same", True)]]
    await bench.settle("run_2")
    await bench.round(dispatcher)
    row = (await bench.core.dispatches("run_2"))[0]
    assert (row.state, row.last_error) == (
        DispatchState.READY,
        f"{LocationTakenError.__name__}: /same belongs to another output, at position 0 of run_1",
    )


async def test_a_handler_that_nobody_loaded_is_left_alone(bench: Bench) -> None:
    """Its dispatches wait for a process that has it."""
    await bench.settle()
    await bench.round(bench.dispatcher(scripted_handler(Done()), names=["other"]))
    assert await bench.states() == {"h:settled:0": ("ready", 0)}
