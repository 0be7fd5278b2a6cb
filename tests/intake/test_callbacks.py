"""The door: 2xx means committed, everything folds into few commits, and one bad entry spoils nothing but itself."""

import asyncio
import contextlib
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import Connection, event

from receiver.decide import Changed, Unchanged
from receiver.errors import StoreUnavailableError
from receiver.flora.signature import canary_key, sign
from receiver.intake import group_commit
from receiver.intake.callbacks import Accepted, CallbackResult, Canary, Duplicate, Ignored, Refused, Secret
from receiver.model import (
    CallbackStatus,
    DispatchState,
    Event,
    Output,
    ReadRequested,
    RunState,
    Subscription,
    Verdict,
    When,
)
from receiver.store import Database, SqliteDatabase, ledger
from receiver.store.postgres import PostgresDatabase
from tests.support.core import (
    NOW,
    SECRET,
    Clock,
    Core,
    a_callback_received,
    a_core,
    a_read,
    a_registration,
    callback_body,
    sign_body,
    writable,
)


@contextlib.contextmanager
def commits(core: Core) -> Iterator[list[Connection]]:
    """Count the commits of the writer."""
    seen: list[Connection] = []
    assert isinstance(core.database, SqliteDatabase | PostgresDatabase)
    event.listen(core.database._writing, "commit", note := seen.append)
    yield seen
    event.remove(core.database._writing, "commit", note)


@contextlib.contextmanager
def failing_for(monkeypatch: pytest.MonkeyPatch, run_id: str) -> Iterator[None]:
    """Let the database refuse every batch that holds a new row of this run, as a broken constraint would."""
    real = ledger.add_runs

    def add_runs(tx: Connection, new: Any) -> None:
        real(tx, new)
        if any(run.run_id == run_id for run in new):
            raise ValueError("bad row")

    with monkeypatch.context() as patch:
        patch.setattr(ledger, "add_runs", add_runs)
        yield


# --- answers -----------------------------------------------------------------------------------------------------


async def test_a_canary_comes_in_and_leaves_no_trace(core: Core) -> None:
    """Whatever its bytes are; its key signs nothing else, and a callback's body under it is still only a canary."""
    key = canary_key(SECRET)
    assert key != SECRET
    for body in (b"canary", b"", callback_body()):
        assert await core.intake.accept(body, sign_body(body, secret=key)) == Canary()
    assert await core.find() is None
    assert not core.intake.rejections
    assert not core.signals.poll.is_set()


async def test_a_canary_is_refused_like_anything_else_when_it_is_altered_or_old(core: Core) -> None:
    """Else it would prove nothing: neither the way, nor that the clock is right."""
    key = canary_key(SECRET)
    for body, at in (
        (b"canary ", NOW),
        (b"canary", NOW - timedelta(seconds=61)),
        (b"canary", NOW + timedelta(hours=1)),
    ):
        answer = await core.intake.accept(body, sign_body(b"canary", at, key))
        assert isinstance(answer, Refused)
        assert answer.code == "signature_mismatch"


async def test_an_accepted_callback_is_committed_and_due(core: Core) -> None:
    """Delivery, body and run are there when the answer is; the poller is woken."""
    assert await core.call(error_code="x") == Accepted()
    run = await core.run()
    assert (run.state, run.callback_status, run.reported_at, run.next_poll_at) == (
        RunState.REPORTED,
        CallbackStatus.COMPLETED,
        NOW,
        NOW,
    )
    assert (run.workspace_id, run.run_type) == ("ws_1", "generation")
    assert core.signals.poll.is_set()
    assert not core.signals.dispatch.is_set()
    (row,) = await core.rows("SELECT delivery_id, run_id, event, age, secret, duplicates FROM deliveries")
    assert tuple(row) == ("whd_1", "run_1", "run.completed", 0, 0, 0)
    assert await core.rows("SELECT body FROM delivery_bodies") == [(callback_body(error_code="x"),)]
    assert await core.outputs() == ()


async def test_a_retry_is_a_duplicate(core: Core) -> None:
    """Counted, answered 200, and without another effect; even once its run is settled."""
    assert await core.call() == Accepted()
    core.clock.forward(10)
    assert await core.call() == Duplicate()
    await core.settle(charged_cost=0.1)
    settled = await core.run()
    assert await core.call() == Duplicate()
    assert await core.run() == settled
    assert [tuple(row) for row in await core.rows("SELECT delivery_id, duplicates FROM deliveries")] == [
        ("whd_1", 2)
    ]
    assert len(await core.dispatches()) == 1


async def test_an_unknown_event_is_kept_and_nothing_done(core: Core) -> None:
    """Verified, so FLORA sent it: stored for us to look at."""
    assert await core.call(event="run.paused") == Ignored()
    assert await core.find() is None
    assert await core.count("delivery_bodies") == 1
    assert await core.call(event="run.paused") == Duplicate()


@pytest.mark.parametrize("body", [b"", b"not json", b"{}", b'{"id":"whd_1","data":{}}', b"\xff\x00"])
async def test_an_unreadable_body_is_kept_and_refused(core: Core, body: bytes) -> None:
    """The signature holds, so it is authentic: FLORA may have changed its format, and the body is the only witness."""
    for times in range(2):
        answer = await core.intake.accept(body, sign_body(body))
        assert isinstance(answer, Refused)
        assert answer.code == "invalid_payload"
        (row,) = await core.rows(
            "SELECT delivery_id, readable, duplicates, body FROM deliveries JOIN delivery_bodies USING (seq)"
        )
        assert row[0].startswith("sha256:")
        assert tuple(row)[1:] == (0, times, body)
    assert await core.count("runs") == 0


@pytest.mark.parametrize(
    ("signature", "code"),
    [
        (None, "missing_signature"),
        ("hello", "malformed_signature"),
        (sign(callback_body(), "whsec_other", timestamp=int(NOW.timestamp())), "signature_mismatch"),
    ],
)
async def test_a_refused_callback_leaves_nothing_but_a_note(
    core: Core, signature: str | None, code: str
) -> None:
    """No row, no wake-up; when, why, from where and how large, never the body."""
    body = callback_body()
    answer = await core.intake.accept(body, signature, remote="192.0.2.1")
    assert isinstance(answer, Refused)
    assert answer.code == code
    for table in ("runs", "deliveries", "delivery_bodies"):
        assert await core.count(table) == 0
    (rejection,) = core.intake.rejections
    assert (rejection.code, rejection.remote, rejection.size, rejection.rejected_at) == (
        code,
        "192.0.2.1",
        len(body),
        NOW,
    )
    assert not core.signals.poll.is_set()


async def test_notes_of_refusals_are_bounded(core: Core) -> None:
    """Whoever floods the door fills no memory."""
    for _ in range(1500):
        core.intake.refuse("signature_mismatch", "no", remote=None, size=1)
    assert len(core.intake.rejections) == 1000


async def test_a_workspace_may_not_speak_for_another(database: Database, clock: Clock) -> None:
    """Each secret belongs to its workspace, where the settings say so; one that belongs to none speaks for all."""
    core = a_core(
        database, clock, secrets=[Secret("whsec_a", "ws_a"), Secret("whsec_b", "ws_b"), Secret("whsec_any")]
    )
    body = callback_body(workspace_id="ws_b")
    answer = await core.intake.accept(body, sign_body(body, secret="whsec_a"))
    assert isinstance(answer, Refused)
    assert answer.code == "workspace_mismatch"
    assert await core.count("deliveries") == 0
    assert await core.intake.accept(body, sign_body(body, secret="whsec_b")) == Accepted()
    for number, workspace in enumerate((None, "ws_a")):  # none named: the secret speaks
        body = callback_body(f"whd_a{number}", workspace_id=workspace)
        assert await core.intake.accept(body, sign_body(body, secret="whsec_a")) == Accepted()
    body = callback_body("whd_any", workspace_id="ws_z")
    assert await core.intake.accept(body, sign_body(body, secret="whsec_any")) == Accepted()
    assert {row[0] for row in await core.rows("SELECT secret FROM deliveries")} == {0, 1, 2}


# --- authentic at a wrong time -----------------------------------------------------------------------------------


async def late_call(core: Core, run_id: str = "run_1") -> CallbackResult:
    body = callback_body(run_id=run_id)
    return await core.intake.accept(body, sign_body(body, core.clock.now - timedelta(seconds=901)))


async def test_an_old_callback_makes_a_known_run_due_and_stays_refused(core: Core) -> None:
    """It may be the last that FLORA sends: the run we wait for is worth one look, and nothing else follows."""
    await core.register()
    core.signals.poll.clear()
    core.clock.forward(5)
    answer = await late_call(core)
    assert isinstance(answer, Refused)
    assert answer.code == "timestamp_out_of_tolerance"
    run = await core.run()
    assert (run.state, run.callback_status, run.next_poll_at) == (RunState.OPEN, None, core.clock.now)
    assert core.signals.poll.is_set()
    assert await core.count("deliveries") == 0


async def test_an_old_callback_creates_nothing(core: Core) -> None:
    """A recorded callback that is replayed for ever must not bring runs back, nor make settled ones due."""
    await late_call(core)
    assert await core.find() is None
    await core.register()
    settled = await core.settle(charged_cost=0.1)
    await late_call(core)
    assert await core.run() == settled


async def test_a_forged_callback_at_a_wrong_time_makes_nothing_due(core: Core) -> None:
    """Only an authentic one earns a look."""
    before = await core.register()
    body = callback_body()
    await core.intake.accept(body, sign(body, "whsec_other", timestamp=1))
    assert await core.run() == before


async def test_a_broken_ledger_does_not_turn_a_refusal_into_an_error(
    database: Database, clock: Clock
) -> None:
    """The look is a favour; without it the answer is the same."""
    core = a_core(database, clock)
    await core.register()
    await writable(core.database, False)
    assert isinstance(await late_call(core), Refused)
    await writable(core.database, True)


# --- batches -----------------------------------------------------------------------------------------------------


async def test_two_hundred_callbacks_take_a_few_commits(core: Core) -> None:
    """While one commit is on its way, the next batch gathers: an fsync is shared by all who wait for it."""
    with commits(core) as seen:
        answers = await asyncio.gather(*(core.call(f"whd_{n}", f"run_{n}") for n in range(200)))
    assert answers == [Accepted()] * 200
    assert len(seen) <= 5
    assert await core.count("runs") == await core.count("delivery_bodies") == 200


async def test_the_same_delivery_twice_in_a_batch(core: Core) -> None:
    """One is new, the others are duplicates of it; exactly one row."""
    with commits(core) as seen:
        answers = await asyncio.gather(*(core.call() for _ in range(5)))
    assert len(seen) == 1
    assert answers.count(Accepted()) == 1
    assert answers.count(Duplicate()) == 4
    assert [tuple(row) for row in await core.rows("SELECT delivery_id, duplicates FROM deliveries")] == [
        ("whd_1", 4)
    ]


async def test_several_deliveries_of_one_run_in_a_batch(core: Core) -> None:
    """Each sees what the ones before it did: the run ends as if they had come one by one."""
    answers = await asyncio.gather(
        core.call("whd_1"), core.call("whd_2"), core.call("whd_3", event="run.failed"), core.call("whd_4")
    )
    assert list(answers) == [Accepted()] * 4
    run = await core.run()
    assert (run.state, run.callback_status, run.version) == (
        RunState.REPORTED,
        CallbackStatus.CONFLICTING,
        0,
    )
    assert await core.count("deliveries") == 4


async def test_everything_about_a_run_in_one_batch(core: Core) -> None:
    """Registered, heard and read at once, in whatever order: one row, its outputs, one dispatch."""
    await asyncio.gather(
        core.intake.apply(a_registration(metadata={"a": 1})),
        core.call(),
        core.intake.apply(a_read("completed", charged_cost=0.5)),
        core.intake.apply(a_read("completed", charged_cost=0.5)),
        core.call(),
    )
    run = await core.run()
    assert (run.state, run.verdict, run.metadata) == (RunState.COMPLETED, Verdict.MATCHED, {"a": 1})
    assert len(await core.outputs()) == 1
    assert [row.idempotency_key for row in await core.dispatches()] == ["run_1:h:settled:0"]
    assert core.signals.dispatch.is_set()


async def test_more_entries_than_a_batch_holds(core: Core, monkeypatch: pytest.MonkeyPatch) -> None:
    """What does not fit goes with the next one; nobody is forgotten."""
    monkeypatch.setattr(group_commit, "_MAX_BATCH", 3)
    assert (
        await asyncio.gather(*(core.call(f"whd_{n}", f"run_{n % 4}") for n in range(20)))
        == [Accepted()] * 20
    )
    assert await core.count("deliveries") == 20
    assert await core.count("runs") == 4


async def test_a_bad_row_fails_alone(core: Core, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its sender gets a 503; the others in its batch are committed, and it can come again."""
    with failing_for(monkeypatch, "run_3"):
        answers = await asyncio.gather(
            *(core.call(f"whd_{n}", f"run_{n}") for n in range(6)), return_exceptions=True
        )
    assert [type(answer) for answer in answers] == [
        StoreUnavailableError if n == 3 else Accepted for n in range(6)
    ]
    assert {row[0] for row in await core.rows("SELECT run_id FROM runs")} == {
        f"run_{n}" for n in range(6) if n != 3
    }
    assert await core.count("deliveries") == 5
    assert await core.call("whd_3", "run_3") == Accepted()


async def test_the_same_delivery_id_with_another_body_makes_its_run_due_as_well(core: Core) -> None:
    """A duplicate by its id; but the run that it names may be one whose callback is lost otherwise."""
    assert await core.call("whd_1", "run_1") == Accepted()
    assert await core.call("whd_1", "run_2") == Duplicate()
    assert (await core.run("run_2")).state is RunState.REPORTED
    answers = await asyncio.gather(core.call("whd_9", "run_3"), core.call("whd_9", "run_4"))
    assert list(answers) == [Accepted(), Duplicate()]
    assert (await core.run("run_4")).state is RunState.REPORTED
    assert await core.count("deliveries") == 2


# --- reports -----------------------------------------------------------------------------------------------------


async def test_learning_returns_what_was_decided(core: Core) -> None:
    assert isinstance(await core.intake.apply(a_registration()), Changed)
    assert await core.intake.apply(a_registration()) == Unchanged()
    assert await core.intake.apply(a_read("completed", run_id="run_nowhere")) == Unchanged()


async def test_dispatches_come_with_the_settling(database: Database, clock: Clock) -> None:
    """In the same commit, one per handler; skipped ones say why; late outputs do not matter any more."""
    core = a_core(
        database,
        clock,
        subscriptions=[
            Subscription("h"),
            Subscription("video", when=When(output_type=("videoUrl",))),
            Subscription("cost", on=(Event.COST_FINAL,)),
            Subscription("alert", on=(Event.LOST, Event.DIVERGED)),
        ],
    )
    await core.register()
    await core.settle()
    rows = {row.handler: (row.state, row.last_error) for row in await core.dispatches()}
    assert rows == {
        "h": (DispatchState.READY, None),
        "video": (DispatchState.SKIPPED, "no output of type videoUrl"),
    }
    clock.forward(60)
    await core.settle(charged_cost=0.5)
    assert [row.handler for row in await core.dispatches(event=Event.COST_FINAL)] == ["cost"]
    # An event after settling judges filters by the outputs in the ledger.
    await core.call(event="run.failed")
    assert [row.handler for row in await core.dispatches(event=Event.DIVERGED)] == ["alert"]


async def test_each_loss_has_its_own_dispatch(database: Database, clock: Clock) -> None:
    """Lost, brought back by a callback, and lost again: two alerts, each once."""
    core = a_core(database, clock, subscriptions=[Subscription("alert", on=(Event.LOST,))])
    await core.register()
    for losses in (1, 2):
        clock.forward(days=2)
        while (run := await core.run()).next_poll_at is not None:
            clock.now = max(clock.now, run.next_poll_at)
            await core.intake.apply(a_read("running", clock.now))
        assert (run.state, run.losses) == (RunState.LOST, losses)
        await core.call(f"whd_{losses}")
        clock.forward(days=2)
    assert [row.idempotency_key for row in await core.dispatches()] == [
        "run_1:alert:lost:0",
        "run_1:alert:lost:1",
    ]


# --- bad weather -------------------------------------------------------------------------------------------------


async def test_a_ledger_that_cannot_be_written_is_told_and_the_retry_is_new(core: Core) -> None:
    """Nobody is told 200 for what is not durable; FLORA's retry is then no duplicate."""
    await writable(core.database, False)
    answers = await asyncio.gather(*(core.call(f"whd_{n}") for n in range(3)), return_exceptions=True)
    assert {type(answer) for answer in answers} == {StoreUnavailableError}
    await writable(core.database, True)
    assert await core.call("whd_0") == Accepted()


async def test_an_entry_times_out_before_flora_does(core: Core, monkeypatch: pytest.MonkeyPatch) -> None:
    """A waiter gets its 503 while FLORA still listens; what it brought may be committed later, and is a duplicate then."""
    monkeypatch.setattr(group_commit, "_TIMEOUT_SECONDS", 0.01)
    free = asyncio.Event()
    write = core.database.write

    async def write_when_free(
        job: Any,
    ) -> Any:  # a job that only blocks one of PostgreSQL's connections would hold nobody up
        await free.wait()
        return await write(job)

    monkeypatch.setattr(core.database, "write", write_when_free)
    with pytest.raises(StoreUnavailableError):
        await core.call()
    free.set()
    await core.intake.close()
    monkeypatch.undo()
    assert await core.call() == Duplicate()


async def test_the_number_of_waiting_entries_is_limited(
    core: Core, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A database that hangs must not fill our memory: who comes then is told at once, and what waits is committed."""
    monkeypatch.setattr(group_commit, "_MAX_WAITING", 3)
    calls = [asyncio.create_task(core.call(f"whd_{n}", f"run_{n}")) for n in range(5)]
    answers = await asyncio.gather(*calls, return_exceptions=True)
    assert [type(answer) for answer in answers] == [Accepted] * 3 + [StoreUnavailableError] * 2
    assert await core.count("deliveries") == 3
    assert await core.call("whd_3", "run_3") == Accepted()


async def test_a_sender_that_hangs_up_takes_nothing_along(core: Core) -> None:
    """Its callback is committed with the others of its batch."""
    calls = [asyncio.create_task(core.call(f"whd_{n}", f"run_{n}")) for n in range(3)]
    await asyncio.sleep(0)
    calls[1].cancel()
    await asyncio.wait(calls)
    await core.intake.close()
    assert await core.count("deliveries") == 3
    assert calls[0].result() == calls[2].result() == Accepted()


async def test_closing_commits_what_has_arrived(core: Core) -> None:
    calls = [asyncio.create_task(core.call(f"whd_{n}")) for n in range(10)]
    await asyncio.sleep(0)
    await core.intake.close()
    assert await core.count("deliveries") == 10
    await asyncio.gather(*calls)
    await core.intake.close()


async def test_verdicts_are_counted_once(core: Core) -> None:
    """The metric that an alarm hangs on counts runs, not deliveries."""

    def count(verdict: Verdict) -> float:
        return float(core.metrics.verdicts.labels(verdict.value)._value.get())

    await core.register()
    await core.settle(charged_cost=0.1)
    await asyncio.gather(core.call("whd_1"), core.call("whd_2"))
    await core.call("whd_3")
    assert count(Verdict.MATCHED) == 1
    await core.call("whd_4", event="run.failed")
    assert (count(Verdict.MATCHED), count(Verdict.DIVERGED)) == (1, 1)


async def test_a_report_from_a_year_ahead_does_not_stay_there(core: Core) -> None:
    """The clock jumped, a callback came, the clock came back: the run is read at once, and not in a spin."""
    core.clock.forward(days=365)
    await core.call()
    core.clock.now = NOW
    await core.intake.apply(a_read("running", NOW))
    run = await core.run()
    assert run.next_poll_at is not None
    assert NOW < run.next_poll_at <= NOW + timedelta(minutes=20)
    await core.intake.apply(a_callback_received(received_at=NOW))
    assert isinstance(await core.intake.apply(a_read("completed", NOW)), Changed)


def test_secrets_do_not_show() -> None:
    """Whoever prints the door's parts prints no secret."""
    assert SECRET not in repr(Secret(SECRET, "ws_1"))


# --- outputs of a later read ---------------------------------------------------------------------------------------


async def test_a_later_read_in_another_order_moves_no_output(database: Database) -> None:
    """Two outputs share an id, and the second one's URL has expired: it gets its fresh one, not the first one's."""
    core = a_core(database, Clock())
    await core.register()
    first, second = (f"https://media.flora.example/{name}" for name in "ab")
    await core.settle(outputs=(Output(0, "o", "imageUrl", first), Output(1, "o", "imageUrl", second)))
    for fresh in (f"{second}?again", f"{second}?once-more"):
        await core.intake.apply(ReadRequested("run_1", core.clock.forward(1)))
        await core.settle(outputs=(Output(0, "o", "imageUrl", fresh), Output(1, "o", "imageUrl", first)))
        assert [output.value for output in await core.outputs()] == [first, fresh]


async def test_reads_in_one_batch_refresh_outputs_one_after_the_other(database: Database) -> None:
    """The second read is matched with what the first one has left, though neither is written yet."""
    core = a_core(database, Clock())
    await core.register()
    reads = [
        a_read(
            "completed", NOW, outputs=tuple(Output(n, "o", "imageUrl", url) for n, url in enumerate(urls))
        )
        for urls in (["A", "B"], ["B2", "A"], ["A", "B3"])
    ]
    await asyncio.gather(*(core.intake.apply(read) for read in reads))
    assert [output.value for output in await core.outputs()] == ["A", "B3"]
