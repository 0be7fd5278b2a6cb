"""What follows from one attempt of a handler. Pure."""

import math
from dataclasses import dataclass
from datetime import datetime, timedelta

from receiver.model import DispatchState

_LONGEST_ASKED = 86_400.0
"""Seconds; a handler may ask for any number of them."""


@dataclass(frozen=True, slots=True)
class Backoff:
    """How pauses between attempts grow: `first`, then each `factor` times the one before, up to `longest`."""

    first: timedelta
    factor: float
    longest: timedelta

    def pause(self, attempts: int) -> timedelta:
        """Return the pause after that many attempts."""
        try:
            return min(self.first * self.factor ** max(attempts - 1, 0), self.longest)
        except OverflowError:
            return self.longest


@dataclass(frozen=True, slots=True)
class Outcome:
    """A dispatch's next state, and when it is due if that is `ready`."""

    state: DispatchState
    due_at: datetime | None = None


def conclude(
    state: DispatchState,
    attempts: int,
    max_attempts: int,
    *,
    now: datetime,
    backoff: Backoff,
    after_seconds: float | None = None,
    jitter: float = 0.5,
) -> Outcome:
    """Return what becomes of a dispatch whose `attempts`-th attempt was answered with a state: done, dead or ready."""
    if state is not DispatchState.READY:
        return Outcome(state)
    if attempts >= max_attempts:
        return Outcome(DispatchState.DEAD)
    pause = backoff.pause(attempts) * (1 + 0.25 * jitter)
    if after_seconds is not None and not math.isnan(after_seconds):
        pause = timedelta(seconds=min(max(after_seconds, 0.0), _LONGEST_ASKED))
    return Outcome(DispatchState.READY, now + pause)
