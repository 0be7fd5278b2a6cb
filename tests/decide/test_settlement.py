"""Dispatches that follow from an event, filters, and when a callback is written off."""

from datetime import datetime, timedelta
from typing import Any

import pytest

from receiver.decide import callback_expires_at, filter_reason, settle
from receiver.model import DispatchState, Event, Output, RunState, Subscription, When
from tests.support.core import NOW, OUTPUT, POLICY, a_run

RUN = a_run(
    RunState.COMPLETED,
    run_type="technique",
    technique_id="tech_1",
    workspace_id="ws_1",
    metadata={"market": "DE", "n": 1},
)
OUTPUTS = (OUTPUT, Output(1, "caption", "text", "A lighthouse"))


@pytest.mark.parametrize(
    ("when", "reason"),
    [
        ({}, None),
        ({"status": ("completed",)}, None),
        ({"status": ("failed", "completed")}, None),
        ({"status": ("failed",)}, "status is completed"),
        ({"status": ()}, "status is completed"),
        ({"run_type": ("generation",)}, "run_type is technique"),
        ({"technique_id": ("tech_1",)}, None),
        ({"technique_id": ("tech_2",)}, "technique_id is tech_1"),
        ({"workspace_id": ("ws_2",)}, "workspace_id is ws_1"),
        ({"output_type": ("videoUrl", "text")}, None),
        ({"output_type": ("videoUrl",)}, "no output of type videoUrl"),
        ({"metadata": {"market": "DE"}}, None),
        ({"metadata": {"market": "FR"}}, "metadata.market is 'DE'"),
        ({"metadata": {"absent": None}}, None),
        ({"metadata": {"absent": 1}}, "metadata.absent is None"),
        ({"status": ("completed",), "technique_id": ("tech_2",)}, "technique_id is tech_1"),
    ],
)
def test_filters(when: dict[str, Any], reason: str | None) -> None:
    """Every given part must match, and the part that does not is named."""
    assert filter_reason(RUN, OUTPUTS, When(**when)) == reason


def test_a_filter_on_a_fact_that_is_not_known_does_not_match() -> None:
    """Unknown is not a wildcard."""
    assert filter_reason(a_run(), (), When(technique_id=("tech_1",))) == "technique_id is None"


def test_a_reason_never_carries_a_long_value() -> None:
    """Metadata is the user's: a reason is a line for operators."""
    run = a_run(metadata={"k": "x" * 500})
    assert len(filter_reason(run, (), When(metadata={"k": 1})) or "") < 80


def test_one_row_per_handler_that_listens() -> None:
    """Ready where the filter matches, skipped with its reason where not, none where nobody listens."""
    rows = settle(
        RUN,
        OUTPUTS,
        [Event.SETTLED],
        [
            Subscription("a"),
            Subscription("b", when=When(status=("failed",))),
            Subscription("c", on=(Event.LOST, Event.DIVERGED)),
        ],
        now=NOW,
    )
    assert [(row.handler, row.event, row.round, row.state, row.last_error) for row in rows] == [
        ("a", Event.SETTLED, 0, DispatchState.READY, None),
        ("b", Event.SETTLED, 0, DispatchState.SKIPPED, "status is completed"),
    ]
    assert {row.due_at for row in rows} == {NOW}
    assert rows[0].idempotency_key == "run_1:a:settled:0"


def test_a_cost_that_comes_with_settled_is_told_once() -> None:
    """Who listens to both hears of it in `settled`; who listens to the cost alone gets it."""
    both = Subscription("both", on=(Event.SETTLED, Event.COST_FINAL))
    cost = Subscription("cost", on=(Event.COST_FINAL,))
    rows = settle(RUN, OUTPUTS, [Event.SETTLED, Event.COST_FINAL], [both, cost], now=NOW)
    assert {(row.handler, row.event, row.state) for row in rows} == {
        ("both", Event.SETTLED, DispatchState.READY),
        ("both", Event.COST_FINAL, DispatchState.SKIPPED),
        ("cost", Event.COST_FINAL, DispatchState.READY),
    }
    later = settle(RUN, OUTPUTS, [Event.COST_FINAL], [both, cost], now=NOW)
    assert {row.state for row in later} == {DispatchState.READY}


def test_each_loss_is_told_anew() -> None:
    """A run that is lost, reopened and lost again is another loss, and needs another key."""
    subscription = Subscription("alert", on=(Event.LOST,))
    for losses in (1, 2):
        run = a_run(RunState.LOST, losses=losses)
        assert settle(run, (), [Event.LOST], [subscription], now=NOW)[0].round == losses - 1


@pytest.mark.parametrize(
    ("first_seen", "completed", "settled", "ended"),
    [
        (0, 10, 20, 10),
        (0, None, 20, 20),
        (0, 30, 20, 20),  # FLORA's clock is ahead of ours: it did not end after we saw its end
        (15, 10, 20, 15),  # tracked after its end: the callback had no place to come to before
        (25, 10, 20, 25),
    ],
)
def test_when_a_callback_is_gone(first_seen: int, completed: int | None, settled: int, ended: int) -> None:
    """A window after the run's end, as far as the channel could know of it."""

    def at(seconds: int | None) -> datetime | None:
        return None if seconds is None else NOW + timedelta(seconds=seconds)

    run = a_run(
        RunState.COMPLETED, first_seen_at=at(first_seen), completed_at=at(completed), settled_at=at(settled)
    )
    assert callback_expires_at(run, POLICY) == NOW + timedelta(seconds=ended) + POLICY.callback_window
