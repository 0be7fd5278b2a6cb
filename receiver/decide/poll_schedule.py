"""When to read a run next, and by which call. Pure."""

from datetime import datetime, timedelta
from enum import StrEnum

from receiver.decide.policy import Policy
from receiver.model import Run


def next_poll(run: Run, policy: Policy, *, now: datetime, jitter: float = 0.5) -> datetime:
    """Return when to read an unsettled run next, given that a read has just succeeded.

    While its end awaits confirmation, the delays are those of the policy. Otherwise the pause grows
    with the age of the run, so that it is read about ten times however long it takes, with pauses
    of at most `max_gap`.
    """
    age = max(now - (run.reported_at or run.first_seen_at), timedelta(0))
    delays = policy.confirmation_delays
    if run.unconfirmed_reads:
        is_past = run.unconfirmed_reads >= len(delays)
        pause = max(delays[-1], age * 0.25) if is_past else delays[run.unconfirmed_reads]
    elif run.callback_expected:
        pause = max(policy.first_poll * 0.5, age * 0.5)
    else:
        pause = max(policy.eager_poll, age * 0.2)
    return now + min(pause, policy.max_gap) * (1 + 0.25 * jitter)


def failure_pause(failures: int) -> timedelta:
    """Return the pause after `failures` consecutive failed reads: 1, 2, 4 … 256, 300 s."""
    return timedelta(seconds=min(2 ** min(failures - 1, 9), 300))


class Route(StrEnum):
    """The API call that returns a run (FLORA contract, section 3)."""

    TECHNIQUE_RUN = "technique_run"
    """`GET /techniques/{technique_id}/runs/{run_id}`; a 404 here counts."""
    RUN = "run"
    """`GET /runs/{run_id}`; a 404 counts for generations and actions only."""
    LISTED = "listed"
    """`GET /technique-runs`: a technique run of unknown technique; absence never counts."""


def route(run: Run) -> Route:
    """Return the route by which to read a run, as far as it is known."""
    if run.technique_id is not None and run.run_type in {"technique", None}:
        return Route.TECHNIQUE_RUN
    if run.run_type == "technique":
        return Route.LISTED
    if run.run_type in {"generation", "action"}:
        return Route.RUN
    return Route.LISTED if run.failures % 2 else Route.RUN  # an unknown type: try both, in turn


def is_404_conclusive(run: Run) -> bool:
    """Return whether a 404 on `route(run)` means that FLORA does not know the run."""
    return route(run) is Route.TECHNIQUE_RUN or run.run_type in {"generation", "action"}
