"""The outcome of one attempt of a handler: done, dead, or retried after a pause. Pure."""

import math
from dataclasses import dataclass
from datetime import datetime, timedelta

from receiver.model import DispatchState

_LONGEST_ASKED = 86_400.0
"""Limit of the pause in seconds that a handler may request."""


@dataclass(frozen=True, slots=True)
class Backoff:
    """Pauses between attempts: `first`, then each `factor` times the previous, up to `longest`."""

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
    """The next state of a dispatch, and when it is due if that state is `ready`."""

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
    """Return the outcome of a dispatch whose latest attempt ended with `state`.

    `ready` means that the handler asked for a retry, `after_seconds` from now if it named a pause.
    `attempts` counts the attempts so far; `jitter` is a random number in [0, 1).
    """
    if state is not DispatchState.READY:
        return Outcome(state)
    if attempts >= max_attempts:
        return Outcome(DispatchState.DEAD)
    pause = backoff.pause(attempts) * (1 + 0.25 * jitter)
    if after_seconds is not None and not math.isnan(after_seconds):
        pause = timedelta(seconds=min(max(after_seconds, 0.0), _LONGEST_ASKED))
    return Outcome(DispatchState.READY, now + pause)
