"""When a run is read next, and by which call."""

from datetime import timedelta
from typing import Any

import pytest

from receiver.decide import Policy, Route, failure_pause, is_404_conclusive, next_poll, route
from tests.support.core import NOW, POLICY, a_run


def pause(seconds_old: float, policy: Policy = POLICY, *, jitter: float = 0.0, **fields: Any) -> float:
    run = a_run(first_seen_at=NOW - timedelta(seconds=seconds_old), **fields)
    return (next_poll(run, policy, now=NOW, jitter=jitter) - NOW).total_seconds()


@pytest.mark.parametrize(
    ("unconfirmed_reads", "seconds"), [(1, 1), (2, 2), (3, 4), (7, 60), (8, 60), (10**6, 60)]
)
def test_unconfirmed_reads_follow_the_configured_delays(unconfirmed_reads: int, seconds: float) -> None:
    """Short at first, since the API lags its own callback by seconds; past its end the last step stays."""
    assert pause(0, unconfirmed_reads=unconfirmed_reads) == seconds


def test_after_the_last_delay_the_pause_grows_with_age() -> None:
    assert pause(1000, unconfirmed_reads=50) == 250
    assert pause(10**6, unconfirmed_reads=50) == POLICY.max_gap.total_seconds()


def test_a_run_whose_callback_is_expected_is_read_seldom() -> None:
    """Never more often than every 30 s, and some ten times in all, however long it takes."""
    assert pause(0) == 30
    age, reads = 60.0, 0
    while age < 3600:
        age += pause(age)
        reads += 1
    assert reads <= 11


def test_a_run_without_a_callback_is_read_every_few_seconds_at_first() -> None:
    """FLORA advises 2–5 s when polling is all there is."""
    assert pause(0, callback_expected=False) == 4
    assert pause(100, callback_expected=False) == 20


def test_jitter_only_ever_adds() -> None:
    """Runs that were started together are not read together."""
    assert pause(0, jitter=0.999) == pytest.approx(30 * 1.25, rel=0.01)


def test_a_first_seen_that_is_still_to_come_counts_as_now() -> None:
    """The clock was set back."""
    assert pause(-(10**7)) == 30


def test_pauses_after_failures() -> None:
    """1, 2, 4 … 256, then 300 s; never more, however long the outage."""
    assert [failure_pause(n).total_seconds() for n in range(1, 11)] == [
        1,
        2,
        4,
        8,
        16,
        32,
        64,
        128,
        256,
        300,
    ]
    assert failure_pause(10**6) == timedelta(seconds=300)


@pytest.mark.parametrize(
    ("run_type", "technique_id", "failures", "expected", "counts"),
    [
        ("technique", "tech_1", 0, Route.TECHNIQUE_RUN, True),
        (None, "tech_1", 0, Route.TECHNIQUE_RUN, True),
        ("technique", None, 0, Route.LISTED, False),
        ("generation", None, 0, Route.RUN, True),
        ("action", None, 0, Route.RUN, True),
        ("generation", "tech_1", 0, Route.RUN, True),
        (None, None, 0, Route.RUN, False),
        (None, None, 1, Route.LISTED, False),
        ("brand new", None, 0, Route.RUN, False),
        ("brand new", None, 1, Route.LISTED, False),
    ],
)
def test_routes(
    run_type: str | None, technique_id: str | None, failures: int, expected: Route, *, counts: bool
) -> None:
    """A 404 counts on the one route that must know the run; of an unknown type, both are tried in turn."""
    run = a_run(run_type=run_type, technique_id=technique_id, failures=failures)
    assert route(run) is expected
    assert is_404_conclusive(run) is counts
