"""When a run is given up, and the evidence that its deadline is wrong. Pure.

A deadline is set by our own clock. If that was behind when the run was first seen and is put right
later, or jumps ahead, a run that is seconds old is past its deadline. Two facts tell: how old the
run is by FLORA's `created_at`, and how long it has been due without a read.
"""

from datetime import datetime, timedelta

from msgspec.structs import replace

from receiver.decide.policy import Policy
from receiver.model import Run

_NONE = timedelta(0)


def without_unread_time(run: Run, policy: Policy, *, now: datetime) -> Run:
    """Return the run with its time limits put off by the time in which it was due and not read.

    The clock has jumped, or the service was down, or its key was refused: what FLORA would have
    answered meanwhile is not known. A read that is late by less than the longest pause is usual.
    """
    late = _NONE if run.next_poll_at is None else now - run.next_poll_at
    if late <= policy.max_gap:
        return run
    return replace(
        run,
        deadline_at=run.deadline_at + late,
        missing_since=None if run.missing_since is None else run.missing_since + late,
        cost_due_at=None if run.cost_due_at is None else run.cost_due_at + late,
    )


def is_overdue(run: Run, policy: Policy, *, now: datetime) -> bool:
    """Return whether a run is past its deadline, and as old by FLORA's clock."""
    is_young = run.created_at is not None and now - run.created_at < policy.deadline
    return now >= run.deadline_at and not is_young
