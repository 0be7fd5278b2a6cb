"""The workers against a receiver in memory: bounded, patient, and never without an outcome."""

import threading
from collections.abc import Iterator

import pytest

from receiver.cli.batch.concurrency import ConcurrencyLimit
from receiver.cli.batch.results import Outcome, Spool
from receiver.cli.batch.runner import Progress, Runner, passes, patiently
from receiver.cli.batch.table import RowProblem
from receiver.client.messages import DispatchView, ErrorView
from receiver.errors import ReceiverApiError
from tests.support.batch_fakes import FakeReceiver, jobs


@pytest.fixture
def spool() -> Iterator[Spool]:
    with Spool() as made:
        yield made


def a_runner(receiver: FakeReceiver, spool: Spool, *, parallel: int = 4, patience: float = 0.0) -> Runner:
    return Runner(receiver.connect, spool, technique_id="tech_poster", parallel=parallel, patience_seconds=patience)


def refusal(status: int, code: str) -> ReceiverApiError:
    return ReceiverApiError("no", status=status, code=code, fields=[("inputs", "too long")], request_id="req_1")


def nobody(_: Progress) -> None:
    """Nobody watches."""


def test_every_row_is_seen_through(spool: Spool) -> None:
    """Outcomes are in the order of the file, whatever the order of ends; no more rows in hand than allowed."""
    receiver = FakeReceiver()
    runner = a_runner(receiver, spool)
    runner.run(jobs(50), nobody)
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
    assert receiver.most_in_hand <= 4
    assert runner.halt is None
    assert (runner.progress.done, runner.progress.succeeded, runner.progress.in_hand) == (50, 50, 0)


def test_a_refused_row_does_not_keep_the_others(spool: Spool) -> None:
    receiver = FakeReceiver(
        troubles={
            "row-1": [refusal(422, "input_validation_error")],
            "row-2": [refusal(422, "idempotency_conflict")],
            "row-3": [refusal(409, "unknown_outcome")],
        },
        runs={
            "row-4": {"state": "failed", "error_code": "safety_blocked", "error_message": "no", "artifacts": ()},
            "row-5": {"dispatches": (DispatchView("storage", "settled", 0, "dead", 12, "disk full"),)},
            "row-6": {"state": "lost", "lost_reason": "deadline"},
        },
    )
    runner = a_runner(receiver, spool)
    runner.run(jobs(8), nobody)
    found = {outcome.key: outcome for outcome in spool}
    assert {key: (each.state, each.error_code) for key, each in found.items() if not each.ok} == {
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


def test_no_credits_stops_the_starts(spool: Spool) -> None:
    """Rows in hand are waited for; the others are told as not started."""
    receiver = FakeReceiver(troubles={"row-2": [refusal(402, "insufficient_credits")]})
    runner = a_runner(receiver, spool, parallel=1)
    runner.run(jobs(6), nobody)
    assert [outcome.state for outcome in spool] == ["completed", "completed", "refused", *["not_started"] * 3]
    assert runner.halt is not None
    assert runner.halt.code == "insufficient_credits"
    assert receiver.calls == ["row-0", "row-1", "row-2"]


def test_a_restart_is_waited_out(spool: Spool) -> None:
    """No answer, 503 and 500 are asked again with the same key; nothing is started twice."""
    passing = [
        ReceiverApiError("gone", code="unreachable"), refusal(503, "unavailable"), refusal(500, "internal_error"),
    ]  # fmt: skip
    receiver = FakeReceiver(troubles={"row-0": list(passing)})
    runner = a_runner(receiver, spool, patience=30)
    runner.run(jobs(2), nobody)
    assert all(outcome.ok for outcome in spool)
    assert receiver.calls.count("row-0") == 4
    assert receiver.started.count("row-0") == 1


def test_patience_ends(spool: Spool) -> None:
    """A service that stays away ends the batch; what was left is told."""
    receiver = FakeReceiver(troubles={"row-1": [ReceiverApiError("gone", code="unreachable")] * 9})
    runner = a_runner(receiver, spool, parallel=1)
    runner.run(jobs(4), nobody)
    assert [outcome.state for outcome in spool] == ["completed", "unfinished", "not_started", "not_started"]
    assert runner.halt is not None
    assert runner.halt.code == "unreachable"


def test_rows_in_hand_halve_while_flora_limits(spool: Spool) -> None:
    """A start that still waits behind a 429 halves the room once; good rows give it back one by one."""
    waiting = ErrorView("rate_limited", "slow down", 429)
    receiver = FakeReceiver(troubles={"row-0": [waiting, waiting], "row-1": [waiting]})
    runner = a_runner(receiver, spool, parallel=8)
    seen: list[int] = []
    runner.run(jobs(5), lambda progress: seen.append(progress.allowed))
    assert all(outcome.ok for outcome in spool)
    assert seen[-1] == 4


def test_room_halves_once_for_a_burst_and_grows_slowly() -> None:
    now = 0.0
    room = ConcurrencyLimit(8, clock=lambda: now)
    room.limited()
    room.limited()
    assert room.allowed == 4
    now = 6.0
    room.limited()
    assert room.allowed == 2
    for _ in range(20):
        room.went_well()
    assert room.allowed == 4
    for _ in range(3):
        now += 6
        room.limited()
    assert room.allowed == 1
    for _ in range(1000):
        room.went_well()
    assert room.allowed == 8


def test_an_interrupt_waits_for_nothing(spool: Spool) -> None:
    """Rows in hand keep their run's id; the others are not started, then or later."""
    reached, never = threading.Semaphore(0), threading.Event()

    def hang(run_id: str) -> None:
        if run_id != "run_row-0":
            reached.release()
            never.wait(30)

    receiver = FakeReceiver(on_wait=hang)
    runner = a_runner(receiver, spool, parallel=2)

    def interrupt(progress: Progress) -> None:
        if progress.done == 1 and reached.acquire(timeout=10) and reached.acquire(timeout=10):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        runner.run(jobs(6), interrupt)
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


def test_a_bug_in_a_worker_is_not_silent(spool: Spool) -> None:
    def broken(_: str) -> None:
        raise ZeroDivisionError

    runner = a_runner(FakeReceiver(on_wait=broken), spool)
    with pytest.raises(ZeroDivisionError):
        runner.run(jobs(3), nobody)


def test_a_file_that_changed_costs_nothing(spool: Spool) -> None:
    """A row that passed the check and is wrong now is refused here."""
    receiver = FakeReceiver()
    first, _, third = jobs(3)
    a_runner(receiver, spool).run([first, (1, RowProblem(3, "url", "is empty")), third], nobody)
    assert [outcome.state for outcome in spool] == ["completed", "refused", "completed"]
    assert list(spool)[1].error_message == "the file has changed since it was checked: row 3, column 'url': is empty"


def test_costs_are_read_again_until_they_are_final(spool: Spool) -> None:
    receiver = FakeReceiver(runs={"row-1": {"charged_cost": None, "cost_final": False, "verdict": None}})
    runner = a_runner(receiver, spool)
    runner.run(jobs(3), nobody)
    assert [outcome.cost for outcome in spool] == [0.04, None, 0.04]
    runner.settle_costs(receiver, seconds=5, watch=lambda _: None)
    assert [(outcome.cost, outcome.verdict) for outcome in spool] == [(0.04, "matched")] * 3
    assert receiver.reads == 1


@pytest.mark.parametrize(
    ("status", "code", "expected"),
    [
        (None, "unreachable", True), (503, "flora_rate_limited", True), (500, "internal_error", True),
        (429, "rate_limited", True), (502, "not_a_receiver", True), (502, "flora_unauthorized", False),
        (401, "unauthorized", False), (404, "not_found", False), (409, "unknown_outcome", False),
    ],
)  # fmt: skip
def test_what_may_work_later(status: int | None, code: str, expected: bool) -> None:
    assert passes(ReceiverApiError("x", status=status, code=code)) is expected


def test_patiently_gives_up_on_what_will_not_change() -> None:
    def refused() -> None:
        raise refusal(404, "not_found")

    with pytest.raises(ReceiverApiError):
        patiently(refused, seconds=60)
    answers = iter([ReceiverApiError("gone", code="unreachable"), None])

    def later() -> str:
        if (trouble := next(answers)) is not None:
            raise trouble
        return "here"

    assert patiently(later, seconds=60) == "here"
