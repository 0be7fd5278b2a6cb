"""The parameters of the rules. Pure; `receiver.service` fills them in from `[reconcile]`."""

from dataclasses import dataclass
from datetime import timedelta


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """How long to wait for callbacks, and how often to read runs."""

    first_poll: timedelta
    """Time to the first read of a run whose callback is expected and whose duration FLORA did not
    estimate."""
    eager_poll: timedelta
    """Pause between the first reads of a run for which no callback is expected."""
    max_gap: timedelta
    """Longest pause between two reads of an unsettled run."""
    callback_window: timedelta
    """Time after a run's end until FLORA has given up on delivering its callback."""
    deadline: timedelta
    """Age at which a run that is still not terminal is given up."""
    confirmation_delays: tuple[timedelta, ...]
    """Pauses between reads after a report that a run is terminal: the API may lag behind its own
    callback."""
    cost_window: timedelta
    """Time after settling for which a missing cost is read again."""
