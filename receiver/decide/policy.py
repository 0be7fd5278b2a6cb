"""The numbers behind the rules. Pure; from `[reconcile]` of the settings."""

from dataclasses import dataclass
from datetime import timedelta


@dataclass(frozen=True, slots=True)
class Policy:
    """The numbers behind the rules; from `[reconcile]`."""

    first_poll: timedelta = timedelta(seconds=60)
    """A run whose callback is expected is first read after this, or after FLORA's own estimate."""
    eager_poll: timedelta = timedelta(seconds=4)
    """A run without a callback is read this often at first (FLORA advises 2–5 s)."""
    max_gap: timedelta = timedelta(minutes=15)
    callback_window: timedelta = timedelta(seconds=420)
    """FLORA has given up on delivering a callback this long after a run's end (10 + 60 + 300 s and time-outs)."""
    deadline: timedelta = timedelta(hours=24)
    ladder: tuple[timedelta, ...] = tuple(timedelta(seconds=s) for s in (0, 1, 2, 4, 8, 15, 30, 60))
    """Pauses between reads after something said that a run is terminal: the API may lag its own callback."""
    cost_window: timedelta = timedelta(minutes=10)
    missing_limit: int = 5
    missing_span: timedelta = timedelta(minutes=10)
