"""The worker threads with a receiver in memory: limits, retries, and an outcome for each row."""

import threading
from collections.abc import Iterator

import pytest

from receiver.cli.batch.concurrency import ConcurrencyLimit
from receiver.cli.batch.results import Outcome, Spool, open_spool
from receiver.cli.batch.runner import Progress, Runner
from receiver.cli.batch.table import RowProblem
from receiver.client.messages import ErrorView
from receiver.errors import ReceiverApiError
from tests.support.batch_fakes import FakeReceiver, a_dispatch, some_jobs
from tests.support.patience import PATIENCE_SECONDS


@pytest.fixture
def spool() -> Iterator[Spool]:
    with open_spool() as spool:
        yield spool


def a_runner(receiver: FakeReceiver, spool: Spool, *, parallel: int = 4, patience: float = 0.0) -> Runner:
    return Runner(
        receiver.connect, spool, technique_id="tech_poster", parallel=parallel, patience_seconds=patience
    )


def refusal(status: int, code: str) -> ReceiverApiError:
    return ReceiverApiError(
        "no", status=status, code=code, fields=[("inputs", "too long")], request_id="req_1"
    )


def ignore(_: Progress) -> None:
    """Do nothing with the progress."""


def test_every_row_gets_its_outcome(spool: Spool) -> None:
    """Outcomes are in the order of the table, and no more rows are active than allowed."""
    receiver = FakeReceiver()
    runner = a_runner(receiver, spool)
    runner.run(some_jobs(50), ignore)
    outcomes = list(spool)
    assert [outcome.key for outcome in outcomes] == [f"row-{number}" for number in range(50)]
    assert outcomes[3] == Outcome(
        row=5,
        key="row-3",
        state="completed",
        run_id="run_row-3",
        verdict="matched",
        cost=0.04,
        files=("file:///out/run_row-3/image.png",),
    )
    assert receiver.most_active <= 4
    assert runner.halt is None
    assert (runner.progress.done, runner.progress.succeeded, runner.progress.active) == (50, 50, 0)


def test_a_refused_row_does_not_stop_the_others(spool: Spool) -> None:
    receiver = FakeReceiver(
        errors={
            "row-1": [refusal(422, "input_validation_error")],
            "row-2": [refusal(422, "idempotency_conflict")],
            "row-3": [refusal(409, "unknown_outcome")],
        },
        runs={
            "row-4": {
                "state": "failed",
                "error_code": "safety_blocked",
                "error_message": "no",
                "artifacts": (),
            },
            "row-5": {"dispatches": (a_dispatch("dead", 12, "disk full"),)},
            "row-6": {"state": "lost", "lost_reason": "deadline"},
        },
    )
    runner = a_runner(receiver, spool)
    runner.run(some_jobs(8), ignore)
    found = {outcome.key: outcome for outcome in spool}
    assert {key: (each.state, each.error_code) for key, each in found.items() if not each.succeeded} == {
        "row-1": ("refused", "input_validation_error"),
        "row-2": ("refused", "idempotency_conflict"),
        "row-3": ("unknown", "unknown_outcome"),
        "row-4": ("failed", "safety_blocked"),
        "row-5": ("completed", "not_stored"),
        "row-6": ("lost", "deadline"),
    }
    assert found["row-1"].error_message == "no; inputs: too long (req_1)"
    assert "another key" in str(found["row-2"].error_message)
    assert found["row-5"].error_message == "storage: disk full"
    assert runner.halt is None
    assert runner.progress.failed == 6


def test_missing_credits_stop_the_batch(spool: Spool) -> None:
    """Active rows are waited for; the others are reported as not started."""
    receiver = FakeReceiver(errors={"row-2": [refusal(402, "insufficient_credits")]})
    runner = a_runner(receiver, spool, parallel=1)
    runner.run(some_jobs(6), ignore)
    assert [outcome.state for outcome in spool] == [
        "completed",
        "completed",
        "refused",
        *["not_started"] * 3,
    ]
    assert runner.halt is not None
    assert runner.halt.code == "insufficient_credits"
    assert receiver.calls == ["row-0", "row-1", "row-2"]


def test_calls_are_retried_during_a_restart(spool: Spool) -> None:
    """No response, 503 and 500 are retried with the same key; nothing is started twice."""
    transient = [
        ReceiverApiError("gone", code="unreachable"),
        refusal(503, "unavailable"),
        refusal(500, "internal_error"),
    ]
    receiver = FakeReceiver(errors={"row-0": [*transient]})
    runner = a_runner(receiver, spool, patience=30)
    runner.run(some_jobs(2), ignore)
    assert all(outcome.succeeded for outcome in spool)
    assert receiver.calls.count("row-0") == 4
    assert receiver.started.count("row-0") == 1


def test_retries_end_with_patience(spool: Spool) -> None:
    """A service that stays unreachable ends the batch; the remaining rows are reported."""
    receiver = FakeReceiver(errors={"row-1": [ReceiverApiError("gone", code="unreachable")] * 9})
    runner = a_runner(receiver, spool, parallel=1)
    runner.run(some_jobs(4), ignore)
    assert [outcome.state for outcome in spool] == ["completed", "unfinished", "not_started", "not_started"]
    assert runner.halt is not None
    assert runner.halt.code == "unreachable"


def test_a_key_of_another_ledger_is_not_waited_for(spool: Spool) -> None:
    """Other unknown outcomes may be resolved by the run's callback; this one cannot."""
    start = {"error": {"code": "key_used_before", "message": "no"}}
    used = ReceiverApiError("used", status=409, code="unknown_outcome", start=start)
    receiver = FakeReceiver(errors={"row-0": [used], "row-1": [refusal(409, "unknown_outcome")]})
    runner = a_runner(receiver, spool, parallel=1, patience=30)
    runner.run(some_jobs(2), ignore)
    assert [outcome.state for outcome in spool] == ["unknown", "completed"]
    assert receiver.calls == ["row-0", "row-1", "row-1"]


def test_a_wait_is_explained_once(spool: Spool) -> None:
    """A batch that waits for FLORA or for the service is not silent."""
    waiting = ErrorView(code="service_unavailable", message="maintenance", status=503)
    gone = [ReceiverApiError("gone", code="unreachable")] * 5
    receiver = FakeReceiver(errors={"row-0": [waiting, waiting], "row-1": [waiting, *gone]})
    notices: list[str] = []
    runner = Runner(
        receiver.connect, spool, technique_id="t", parallel=1, patience_seconds=30, notify=notices.append
    )
    runner.run(some_jobs(2), ignore)
    assert notices == [
        "Row 2 waits, and others may: maintenance (service_unavailable).",
        "Row 3 waits, and others may: gone (unreachable).",
    ]


def test_active_rows_halve_while_flora_limits(spool: Spool) -> None:
    """A start that waits behind a 429 halves the limit once; successes raise it one by one."""
    waiting = ErrorView(code="rate_limited", message="slow down", status=429)
    receiver = FakeReceiver(errors={"row-0": [waiting, waiting], "row-1": [waiting]})
    runner = a_runner(receiver, spool, parallel=8)
    seen: list[int] = []
    runner.run(some_jobs(5), lambda progress: seen.append(progress.limit))
    assert all(outcome.succeeded for outcome in spool)
    assert seen[-1] == 4


def test_the_limit_halves_once_for_a_burst_and_grows_slowly() -> None:
    now = 0.0
    concurrency = ConcurrencyLimit(8, clock=lambda: now)
    concurrency.halve()
    concurrency.halve()
    assert concurrency.limit == 4
    now = 6.0
    concurrency.halve()
    assert concurrency.limit == 2
    for _ in range(20):
        concurrency.record_success()
    assert concurrency.limit == 4
    for _ in range(3):
        now += 6
        concurrency.halve()
    assert concurrency.limit == 1
    for _ in range(1000):
        concurrency.record_success()
    assert concurrency.limit == 8


def test_an_interruption_waits_for_no_run(spool: Spool) -> None:
    """Active rows keep their run's id; the others are not started, then or later."""
    reached, never = threading.Semaphore(0), threading.Event()

    def hang(run_id: str) -> None:
        if run_id != "run_row-0":
            reached.release()
            never.wait(PATIENCE_SECONDS)

    receiver = FakeReceiver(on_wait=hang)
    runner = a_runner(receiver, spool, parallel=2)

    def interrupt(progress: Progress) -> None:
        if (
            progress.done == 1
            and reached.acquire(timeout=PATIENCE_SECONDS)
            and reached.acquire(timeout=PATIENCE_SECONDS)
        ):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        runner.run(some_jobs(6), interrupt)
    states = [(outcome.state, outcome.run_id) for outcome in spool]
    assert states == [
        ("completed", "run_row-0"),
        ("unfinished", "run_row-1"),
        ("unfinished", "run_row-2"),
        *[("not_started", None)] * 3,
    ]
    assert runner.halt is not None
    assert runner.halt.code == "interrupted"
    never.set()
    assert len(receiver.started) == 3


def test_an_exception_in_a_worker_propagates(spool: Spool) -> None:
    def fail(_: str) -> None:
        raise ZeroDivisionError

    runner = a_runner(FakeReceiver(on_wait=fail), spool)
    with pytest.raises(ZeroDivisionError):
        runner.run(some_jobs(3), ignore)


def test_a_row_that_changed_costs_nothing(spool: Spool) -> None:
    """A row that passed the check and has an error now is refused."""
    receiver = FakeReceiver()
    first, _, third = some_jobs(3)
    a_runner(receiver, spool).run([first, (1, RowProblem(3, "url", "is empty")), third], ignore)
    assert [outcome.state for outcome in spool] == ["completed", "refused", "completed"]
    assert (
        list(spool)[1].error_message
        == "the file has changed since it was checked: row 3, column 'url': is empty"
    )


def test_costs_are_read_again_until_they_are_final(spool: Spool) -> None:
    receiver = FakeReceiver(runs={"row-1": {"charged_cost": None, "cost_final": False, "verdict": None}})
    runner = a_runner(receiver, spool)
    runner.run(some_jobs(3), ignore)
    assert [outcome.cost for outcome in spool] == [0.04, None, 0.04]
    runner.read_final_costs(receiver, seconds=5, watch=lambda _: None)
    assert [(outcome.cost, outcome.verdict) for outcome in spool] == [(0.04, "matched")] * 3
    assert receiver.reads == 1
