"""Which dispatches are light or heavy, and how a handler's slots are shared between them. Pure.

Small outputs must not wait behind large ones, and a steady stream of small ones must not hold up
the large. So each lane has slots that the other cannot take, and light work gets the rest first:

    slots   reserved for heavy   kept free of heavy       heavy at most
    1       one lane: the dispatch that has been due longest
    2       1                  1                         1
    4       1                  1                         3
    8       2                  2                         6
    16      4                  4                         12

Light work may take every slot, since it ends soon; heavy work then gets the next slot that is free.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from receiver.model import Event, Lane, Output

HEAVY_BYTES = 64 * 1024**2
"""Bytes that a light dispatch may have left to download."""
_SHARE = 4
"""One slot in this many is reserved for each lane, and at least one."""


@dataclass(frozen=True, slots=True)
class FillStep:
    """A step of filling free slots: claim from `lanes` until `ceiling` of their dispatches run."""

    lanes: tuple[Lane, ...]
    ceiling: int


def lane_of(
    event: Event,
    outputs: Sequence[Output],
    *,
    sizes: Mapping[int, int] | None = None,
    stored: Collection[int] = (),
) -> Lane:
    """Return the lane of a dispatch by the bytes it has left to download.

    `sizes` has the sizes measured by earlier attempts and `stored` the outputs already stored, both
    by position. Other sizes are guessed from the type, for `settled` only: at later events the
    outputs are usually stored.
    """
    known = sizes or {}
    left = 0
    for output in outputs:
        if output.position not in stored:
            likely = output.likely_bytes if event is Event.SETTLED else 0
            left += known.get(output.position, likely)
    return Lane.HEAVY if left > HEAVY_BYTES else Lane.LIGHT


def fill_order(concurrency: int) -> tuple[FillStep, ...]:
    """Return the steps in which free slots are filled; a lane may recur with a higher ceiling."""
    if concurrency <= 1:
        return (FillStep(tuple(Lane), 1),)
    own = max(1, concurrency // _SHARE)
    return (
        FillStep((Lane.HEAVY,), own),
        FillStep((Lane.LIGHT,), concurrency),
        FillStep((Lane.HEAVY,), concurrency - own),
    )


def free_slots(turn: FillStep, running: Mapping[Lane, int], concurrency: int) -> int:
    """Return how many more dispatches a step may start.

    More than its ceiling may be running: a light dispatch can turn out to be heavy.
    """
    free = concurrency - sum(running.values())
    return max(0, min(free, turn.ceiling - sum(running.get(lane, 0) for lane in turn.lanes)))
