"""What becomes of a dispatch after an attempt."""

from datetime import timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from receiver.decide import Backoff, Outcome, conclude
from receiver.model import DispatchState
from tests.support.core import BACKOFF, NOW


def pause(attempts: int, **options: Any) -> float:
    outcome = conclude(
        DispatchState.READY, attempts, 10**9, now=NOW, **{"jitter": 0.0, "backoff": BACKOFF, **options}
    )
    assert outcome.state is DispatchState.READY
    assert outcome.due_at is not None
    return (outcome.due_at - NOW).total_seconds()


@pytest.mark.parametrize("answered", [DispatchState.DONE, DispatchState.DEAD])
@pytest.mark.parametrize("attempts", [1, 12])
def test_a_final_answer_is_final(answered: DispatchState, attempts: int) -> None:
    """Done is done and rejected is dead, on whichever attempt."""
    assert conclude(answered, attempts, 12, now=NOW, backoff=BACKOFF) == Outcome(answered)


def test_the_last_attempt_decides() -> None:
    """Retry on the last attempt is the end of it; one before, it is not."""
    assert conclude(DispatchState.READY, 11, 12, now=NOW, backoff=BACKOFF).state is DispatchState.READY
    assert conclude(DispatchState.READY, 12, 12, now=NOW, backoff=BACKOFF) == Outcome(DispatchState.DEAD)
    assert conclude(DispatchState.READY, 13, 12, now=NOW, backoff=BACKOFF) == Outcome(DispatchState.DEAD)
    assert conclude(DispatchState.READY, 12, 12, now=NOW, backoff=BACKOFF, after_seconds=1) == Outcome(
        DispatchState.DEAD
    )


def test_pauses_double_up_to_half_an_hour() -> None:
    assert [pause(n) for n in range(1, 13)] == [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 1800]
    assert pause(10**6) == 1800
    assert pause(1, jitter=1.0) == 1.25


def test_a_handler_has_its_own_pauses() -> None:
    """Where the settings say so; growing by its own factor, and never beyond its longest."""
    backoff = Backoff(timedelta(seconds=10), 3.0, timedelta(seconds=100))
    assert [pause(n, backoff=backoff) for n in range(1, 5)] == [10, 30, 90, 100]
    assert pause(10**6, backoff=backoff) == 100
    assert pause(5, backoff=Backoff(timedelta(seconds=5), 1.0, timedelta(seconds=5))) == 5


@pytest.mark.parametrize(
    ("asked", "given_pause"),
    [
        (0, 0),
        (7.5, 7.5),
        (-5, 0),
        (86_400, 86_400),
        (1e300, 86_400),
        (float("inf"), 86_400),
        (float("-inf"), 0),
    ],
)
def test_a_handler_may_name_its_pause(asked: float, given_pause: float) -> None:
    """Any number will do, within a day: a handler's odd number must not leave its lease behind."""
    assert pause(3, after_seconds=asked) == given_pause


def test_no_number_is_the_usual_pause() -> None:
    assert pause(3, after_seconds=float("nan")) == 4


@given(
    attempts=st.integers(0, 10**9),
    after=st.none() | st.floats(),
    jitter=st.floats(0, 1),
    limit=st.integers(1, 10**9),
)
def test_the_next_attempt_is_never_in_the_past_nor_further_than_a_day(
    attempts: int, after: float | None, jitter: float, limit: int
) -> None:
    outcome = conclude(
        DispatchState.READY, attempts, limit, now=NOW, backoff=BACKOFF, after_seconds=after, jitter=jitter
    )
    if outcome.state is DispatchState.READY:
        assert outcome.due_at is not None
        assert NOW <= outcome.due_at <= NOW + timedelta(days=1)
