"""What an answer to a start means, and what to do about a start that was not answered. Pure.

FLORA's idempotency key makes asking again safe for two hours: a repeated key never makes a second run (FLORA contract,
section 4). After that nothing does, so we stop asking before.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum

from msgspec.structs import replace

from receiver.errors import FloraError
from receiver.model import Origin, RunRegistered, Snapshot, Start, StartState

SAFE_TO_REPEAT = timedelta(minutes=100)
"""FLORA's key lives two hours (its site says 24): we trust it for less."""

SEARCH_FOR = timedelta(minutes=10)
"""How long a run that exists is searched for before its start is called unknown: callbacks and other starts sort it out."""

_SKEW = timedelta(seconds=30)
"""How far apart the clocks of FLORA, and of several receivers, may be."""
_YOUNG = timedelta(minutes=2)
"""How long a start that FLORA has not answered may still be about to name its run."""
_LONGEST_PAUSE_SECONDS = 30.0
_UNKNOWN = (
    "FLORA may have started this run and we could not tell which it is: look it up in FLORA, then say so with "
    "`flora-receiver runs resolve`; its callback settles the question by itself"
)


class Reply(StrEnum):
    """What FLORA's refusal of a start means."""

    DENIED = "denied"
    """It said no: nothing was started, and the same question gets the same answer."""
    EXISTS = "exists"
    """The key was used before: the run exists, and this answer does not name it."""
    UNCLEAR = "again"
    """It did not say: ask again with the same key."""


def reply_of(error: FloraError) -> Reply:
    """Return what a failed start means, by FLORA's table of errors."""
    if error.status == 409:
        return Reply.EXISTS
    if error.status is None or error.status == 429 or error.status >= 500 or error.status < 400:
        return Reply.UNCLEAR
    return Reply.DENIED


def may_repeat(start: Start, *, now: datetime) -> bool:
    """Return whether asking again cannot start a second run."""
    return now - start.created_at < SAFE_TO_REPEAT


def refuse_start(start: Start, error: FloraError) -> Start:
    """Return the start as FLORA refused it, with its reasons kept."""
    return replace(_with_error(start, error), state=StartState.REFUSED)


def defer_start(start: Start, error: FloraError, *, now: datetime, jitter: float = 0.5) -> Start:
    """Return the start to be asked about again: after what FLORA named, else 1, 2, 4 … 30 s."""
    pause = error.retry_after
    if pause is None:
        pause = 5.0 if error.status == 429 else min(2.0 ** min(start.attempts, 5), _LONGEST_PAUSE_SECONDS)
        pause *= 1 + 0.25 * jitter
    explained = _with_error(start, error)
    return replace(explained, attempts=start.attempts + 1, due_at=now + timedelta(seconds=min(pause, 3600)))


def search_later(start: Start, *, now: datetime, jitter: float = 0.5) -> Start | None:
    """Return the start to be searched for again a little later, or None once that has gone on for long enough.

    Right after a crash there are often several starts without a run and several runs without a start. Callbacks name
    most of them within a run's length; what is left is told apart by being the only one.
    """
    if now - start.created_at >= SEARCH_FOR:
        return None
    exists = FloraError(
        "FLORA has a run of this key; which one is not clear yet: waiting for its callback, and searching the list",
        status=409, code="idempotency_duplicate", request_id=start.request_id,
    )  # fmt: skip
    return defer_start(start, exists, now=now, jitter=jitter)


def give_up_on(start: Start) -> Start:
    """Return the start as one that only its callback, or an operator, can resolve."""
    return replace(start, state=StartState.UNKNOWN, error_code="unknown_outcome", error_message=_UNKNOWN)


def retry_refused(start: Start, *, token: str, request: str, now: datetime) -> Start:
    """Return a refused start as a fresh intent: its key was released when FLORA refused it."""
    return replace(
        start,
        token=token,
        request=request,
        state=StartState.ASKING,
        created_at=now,
        due_at=now,
        attempts=0,
        error_status=None,
        error_code=None,
        error_message=None,
        error_fields=(),
        request_id=None,
    )


def young_since(now: datetime) -> datetime:
    """Return when a start that may still be about to name its run can have been made at the earliest."""
    return now - _YOUNG


def may_be_of_start(seen_at: datetime | None, oldest_start: datetime | None) -> bool:
    """Return whether a run may be that of an unanswered start, so that its start should name it first.

    `seen_at` is when the run was created or first seen (None: unknown), `oldest_start` when the oldest unanswered start
    that is still young was made (None: there is none). A run that was there before that start is somebody else's.
    """
    if oldest_start is None:
        return False
    return seen_at is None or seen_at >= oldest_start - _SKEW


@dataclass(frozen=True, slots=True)
class Window:
    """When the run of a start must have been created, by FLORA's clock, allowing for ours."""

    since: datetime
    until: datetime


def window_of(start: Start, *, now: datetime) -> Window:
    return Window(start.created_at - _SKEW, now + _SKEW)


def candidates(snapshots: Sequence[Snapshot], start: Start, *, now: datetime) -> tuple[Snapshot, ...]:
    """Return the listed runs that could be this start's: its technique, created while it was being asked for."""
    window = window_of(start, now=now)
    return tuple(
        snapshot
        for snapshot in snapshots
        if snapshot.created_at is not None and window.since <= snapshot.created_at <= window.until
    )


def _with_error(start: Start, error: FloraError) -> Start:
    return replace(
        start,
        error_status=error.status,
        error_code=error.code,
        error_message=str(error),
        error_fields=error.fields,
        request_id=error.request_id,
    )


def to_registration(start: Start, run_id: str, now: datetime) -> RunRegistered:
    """Return what a start knows about the run that it made."""
    return RunRegistered(
        run_id=run_id,
        origin=Origin.STARTED,
        registered_at=now,
        callback_expected=start.callback_expected,
        run_type="technique" if start.technique_id else "generation",
        technique_id=start.technique_id or None,
        workspace_id=start.workspace_id or None,
        metadata=start.metadata,
    )
