"""Which runs wait for a start that FLORA has not answered yet, and which starts may be repeated."""

from datetime import datetime, timedelta

import pytest

from receiver.decide.starts import may_be_of_start, may_repeat, search_later, young_since
from receiver.model import Operation, Start, StartState
from tests.support.core import NOW

START = NOW - timedelta(seconds=60)


@pytest.mark.parametrize(
    ("seen_at", "oldest_start", "waits"),
    [
        pytest.param(START, START, True, id="seen with the start"),
        pytest.param(START + timedelta(seconds=59), START, True, id="seen after the start"),
        pytest.param(
            START - timedelta(seconds=30), START, True, id="before it by as much as clocks may differ"
        ),
        pytest.param(START - timedelta(seconds=31), START, False, id="known before the start was made"),
        pytest.param(None, START, True, id="FLORA does not date the run"),
        pytest.param(NOW, None, False, id="no start is young"),
        pytest.param(None, None, False, id="neither"),
    ],
)
def test_a_run_may_be_of_a_start(
    seen_at: datetime | None, oldest_start: datetime | None, *, waits: bool
) -> None:
    """A run that was known before the start was made is somebody else's."""
    assert may_be_of_start(seen_at, oldest_start) is waits


def test_a_start_is_young_for_two_minutes() -> None:
    """After that, its run is no longer waited for."""
    assert young_since(NOW) == NOW - timedelta(minutes=2)


@pytest.mark.parametrize(
    ("age", "repeatable", "searched"),
    [
        (timedelta(0), True, True),
        (timedelta(minutes=9), True, True),
        (timedelta(minutes=11), True, False),
        (timedelta(minutes=100), False, False),
        (-timedelta(seconds=30), True, True),
        (-timedelta(days=3), False, False),
    ],
)
def test_a_start_is_repeated_while_its_key_is_known(
    age: timedelta, *, repeatable: bool, searched: bool
) -> None:
    """One whose age is not known, since a clock that was ahead was put right, is not: it might be billed twice."""
    start = Start(
        token="t", workspace_id="", operation=Operation.GENERATE, technique_id="", idempotency_key="k", request="{}",
        request_hash="", metadata={}, callback_expected=True, state=StartState.ASKING, created_at=NOW - age, due_at=NOW,
    )  # fmt: skip
    assert may_repeat(start, now=NOW) is repeatable
    assert (search_later(start, now=NOW) is not None) is searched
