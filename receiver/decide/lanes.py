"""Which dispatches are light and which heavy, and how a handler's slots are shared between the two. Pure.

Small outputs must not wait behind large ones, and large ones must come through an endless stream of small ones. So each
lane has a part of the slots that the other cannot keep from it, and what is left goes to light work first:

    slots   heavy work's own   kept free of heavy work   heavy work at most
    1       one lane: whatever has been due longest
    2       1                  1                         1
    4       1                  1                         3
    8       2                  2                         6
    16      4                  4                         12

Light work may take every slot, since it is over soon; the next slot that it leaves is heavy work's own.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from receiver.model import Event, Lane, Output

HEAVY_BYTES = 64 * 1024**2
"""What a dispatch may have left to fetch and still be light."""
_SHARE = 4
"""Each lane's own part of the slots is one in this many, and at least one."""


@dataclass(frozen=True, slots=True)
class FillStep:
    """One step of filling free slots: these lanes, until `ceiling` of their dispatches are running."""

    lanes: tuple[Lane, ...]
    ceiling: int


def lane_of(
    event: Event,
    outputs: Sequence[Output],
    *,
    sizes: Mapping[int, int] | None = None,
    stored: Collection[int] = (),
) -> Lane:
    """Return the lane of a dispatch, by the bytes it has left to fetch: as measured, else as its outputs' types let expect.

    `sizes` are those that an attempt has learned, `stored` the outputs whose bytes are safe, both by position. Events
    after `settled` find the outputs stored as a rule: only what is measured counts.
    """
    known = sizes or {}
    left = 0
    for output in outputs:
        if output.position not in stored:
            likely = output.likely_bytes if event is Event.SETTLED else 0
            left += known.get(output.position, likely)
    return Lane.HEAVY if left > HEAVY_BYTES else Lane.LIGHT


def fill_order(concurrency: int) -> tuple[FillStep, ...]:
    """Return in which order free slots are filled; the same lane may come again, up to a higher ceiling."""
    if concurrency <= 1:
        return (FillStep(tuple(Lane), 1),)
    own = max(1, concurrency // _SHARE)
    return (
        FillStep((Lane.HEAVY,), own),
        FillStep((Lane.LIGHT,), concurrency),
        FillStep((Lane.HEAVY,), concurrency - own),
    )


def free_slots(turn: FillStep, running: Mapping[Lane, int], concurrency: int) -> int:
    """Return how many more dispatches a turn may start. More may run than its ceiling: light work can turn out heavy."""
    free = concurrency - sum(running.values())
    return max(0, min(free, turn.ceiling - sum(running.get(lane, 0) for lane in turn.lanes)))
