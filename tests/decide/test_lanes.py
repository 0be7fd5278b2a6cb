"""Which work is light and which heavy, and that neither keeps the other from a handler's slots."""

from collections import Counter
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from receiver.decide import HEAVY_BYTES, fill_order, free_slots, lane_of, settle
from receiver.model import Event, Lane, Output, RunState, Subscription
from tests.support.core import NOW, a_run

LIGHT, HEAVY = Lane.LIGHT, Lane.HEAVY


def outputs(*kinds: str) -> tuple[Output, ...]:
    return tuple(
        Output(position, f"o{position}", kind, "https://x.example") for position, kind in enumerate(kinds)
    )


@pytest.mark.parametrize(
    ("kinds", "lane"),
    [
        ((), LIGHT),
        (("text",), LIGHT),
        (("imageUrl",), LIGHT),
        (("documentUrl", "audioUrl", "imageUrl", "text"), LIGHT),
        (("videoUrl",), HEAVY),
        (("imageUrl", "videoUrl"), HEAVY),
        (("somethingNewUrl",), HEAVY),
        (("imageUrl",) * 16, LIGHT),
        (("imageUrl",) * 17, HEAVY),
    ],
)
def test_types_tell_while_nothing_is_measured(kinds: Sequence[str], lane: Lane) -> None:
    """A video may be large, a type that we do not know as well, and so are many images together."""
    assert lane_of(Event.SETTLED, outputs(*kinds)) is lane
    (row,) = settle(
        a_run(RunState.COMPLETED), outputs(*kinds), [Event.SETTLED], [Subscription("h")], now=NOW
    )
    assert row.lane is lane


@pytest.mark.parametrize(
    ("kinds", "sizes", "stored", "lane"),
    [
        (("videoUrl",), {0: 5_000_000}, (), LIGHT),
        (("imageUrl",), {0: HEAVY_BYTES}, (), LIGHT),
        (("imageUrl",), {0: HEAVY_BYTES + 1}, (), HEAVY),
        (("videoUrl", "imageUrl"), {}, (0,), LIGHT),
        (("videoUrl", "imageUrl"), {0: 10**10}, (0,), LIGHT),
        (("videoUrl", "imageUrl"), {}, (1,), HEAVY),
        (("imageUrl", "imageUrl"), {0: HEAVY_BYTES // 2, 1: HEAVY_BYTES // 2 + 1}, (), HEAVY),
        (("imageUrl",), {9: 10**10}, (-1, 9), LIGHT),
    ],
)
def test_what_is_measured_counts_and_what_is_stored_does_not(
    kinds: Sequence[str], sizes: dict[int, int], stored: Sequence[int], lane: Lane
) -> None:
    """A short video is light, a large image is heavy, and a retry is as heavy as what it still has to fetch."""
    assert lane_of(Event.SETTLED, outputs(*kinds), sizes=sizes, stored=stored) is lane


@pytest.mark.parametrize("event", [event for event in Event if event is not Event.SETTLED])
def test_later_events_are_light(event: Event) -> None:
    """The video is stored by then; where it has to be fetched after all, its size is measured."""
    assert lane_of(event, outputs("videoUrl")) is LIGHT
    assert lane_of(event, outputs("videoUrl"), sizes={0: 10**10}) is HEAVY


def fill(concurrency: int, running: Counter[Lane], waiting: Counter[Lane]) -> Counter[Lane]:
    """Fill the free slots as the dispatcher does; return what was started, and take it from what waits."""
    started: Counter[Lane] = Counter()
    for turn in fill_order(concurrency):
        for lane in turn.lanes:
            taken = min(free_slots(turn, running + started, concurrency), waiting[lane])
            started[lane] += taken
            waiting[lane] -= taken
    return started


@pytest.mark.parametrize(
    ("concurrency", "running", "waiting", "started"),
    [
        (8, (0, 0), (99, 0), (8, 0)),
        (8, (0, 0), (0, 99), (0, 6)),
        (8, (0, 0), (99, 99), (6, 2)),
        (8, (0, 0), (3, 99), (3, 5)),
        (8, (0, 0), (1, 99), (1, 6)),
        (8, (0, 6), (1, 99), (1, 0)),
        (8, (0, 6), (99, 99), (2, 0)),
        (8, (7, 0), (99, 99), (0, 1)),
        (8, (8, 0), (99, 99), (0, 0)),
        (8, (0, 8), (99, 99), (0, 0)),
        (8, (0, 7), (99, 99), (1, 0)),
        (2, (0, 0), (99, 99), (1, 1)),
        (2, (0, 1), (0, 99), (0, 0)),
        (2, (1, 0), (99, 99), (0, 1)),
        (3, (0, 0), (0, 99), (0, 2)),
        (16, (0, 0), (99, 99), (12, 4)),
        (1, (0, 0), (0, 99), (0, 1)),
        (1, (0, 0), (99, 0), (1, 0)),
        (1, (0, 1), (99, 0), (0, 0)),
    ],
)
def test_how_free_slots_are_filled(
    concurrency: int, running: tuple[int, int], waiting: tuple[int, int], started: tuple[int, int]
) -> None:
    """Pairs are light and heavy. Heavy work has its own part first, then light work all it can use, then heavy the rest."""
    before, queue = (Counter(dict(zip(Lane, pair, strict=True))) for pair in (running, waiting))
    filled = fill(concurrency, before, queue)
    assert (filled[LIGHT], filled[HEAVY]) == started


COUNTS = st.integers(0, 40)


@given(
    concurrency=st.integers(1, 32), light=COUNTS, heavy=COUNTS, waiting_light=COUNTS, waiting_heavy=COUNTS
)
def test_slots_are_never_exceeded_and_none_is_wasted(
    concurrency: int, light: int, heavy: int, waiting_light: int, waiting_heavy: int
) -> None:
    """Never more than allowed; light work leaves no slot empty; heavy work leaves light work's own slots alone."""
    running = Counter({LIGHT: light, HEAVY: heavy})
    waiting = Counter({LIGHT: waiting_light, HEAVY: waiting_heavy})
    started = fill(concurrency, running, waiting)
    assert started.total() <= max(0, concurrency - running.total())
    after = running + started
    if waiting[LIGHT]:
        assert after.total() >= concurrency
    if concurrency > 1 and started[HEAVY]:
        assert after[HEAVY] <= concurrency - max(1, concurrency // 4)
    if waiting[HEAVY] and after.total() < concurrency:
        assert after[HEAVY] >= concurrency - max(1, concurrency // 4)


@given(
    concurrency=st.integers(2, 16), endings=st.lists(st.sampled_from(list(Lane)), min_size=40, max_size=60)
)
def test_neither_lane_starves(concurrency: int, endings: list[Lane]) -> None:
    """With endless work in both, whatever ends: heavy work has its part as soon as slots come free, light work always."""
    own = max(1, concurrency // 4)
    for only in Lane:
        running: Counter[Lane] = fill(concurrency, Counter(), Counter({only: 99}))
        freed = 0
        for lane in endings:
            freed += lane is LIGHT and running[LIGHT] > 0
            running -= Counter([lane])
            running += fill(concurrency, running, Counter({LIGHT: 99, HEAVY: 99}))
            assert running.total() == concurrency
            assert running[LIGHT] >= own
            assert running[HEAVY] >= min(own, freed)
