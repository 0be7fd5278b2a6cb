"""What FLORA's response to a start means, and what to do if there is none. Pure.

FLORA's idempotency key makes repeating a start safe for two hours: a repeated key never makes a
second run (FLORA contract, section 4). Starts are not repeated after that.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum

from msgspec.structs import replace

from receiver.errors import FloraError
from receiver.model import Origin, RunRegistered, Snapshot, Start, StartState

SAFE_TO_REPEAT = timedelta(minutes=100)
"""FLORA keeps a key for two hours (its site says 24); a margin is left."""

SEARCH_FOR = timedelta(minutes=10)
"""How long the run of a start is searched for before the start is marked as unknown."""

_SKEW = timedelta(seconds=30)
"""Tolerated difference between the clocks of FLORA and of several receivers."""
_YOUNG = timedelta(minutes=2)
"""How long the response to a start may take."""
_LONGEST_PAUSE_SECONDS = 30.0
_UNKNOWN = (
    "FLORA may have started a run for this, and it is not known which: look it up in FLORA, then name it with "
    "`flora-receiver runs resolve`; its callback also resolves the start"
)
_USED_BEFORE = (
    "FLORA has a run of this key from a start that is not in this ledger, as after the restore of an older backup: "
    "look it up in FLORA, then name it with `flora-receiver runs resolve`; another key starts and bills a new run"
)
USED_BEFORE = "key_used_before"
"""The code of a start whose key FLORA knew before the start was made."""
_CONFLICTS = frozenset({"idempotency_conflict", "idempotency_key_reused"})


class Reply(StrEnum):
    """The meaning of a failed start request."""

    DENIED = "denied"
    """FLORA refused: nothing was started, and repeating the request does not help."""
    EXISTS = "exists"
    """The key was used before: a run exists, and the response does not name it."""
    UNCLEAR = "again"
    """Whether a run was started is unknown: repeat the request with the same key."""


def reply_of(error: FloraError) -> Reply:
    """Return the meaning of a failed start request, by FLORA's table of errors."""
    if error.status == 409:
        return Reply.EXISTS
    if error.status is None or error.status == 429 or error.status >= 500 or error.status < 400:
        return Reply.UNCLEAR
    return Reply.DENIED


def may_repeat(start: Start, *, now: datetime) -> bool:
    """Return whether repeating the request is sure not to start a second run.

    A start from the future was made by a clock that was ahead: how old it is, is not known.
    """
    return -_SKEW <= now - start.created_at < SAFE_TO_REPEAT


def refuse_start(start: Start, error: FloraError) -> Start:
    """Return the start as refused, with FLORA's reasons."""
    return replace(_with_error(start, error), state=StartState.REFUSED)


def defer_start(start: Start, error: FloraError, *, now: datetime, jitter: float = 0.5) -> Start:
    """Return the start to be repeated after the pause that FLORA named, else 1, 2, 4 … 30 s."""
    pause = error.retry_after
    if pause is None:
        pause = 5.0 if error.status == 429 else min(2.0 ** min(start.attempts, 5), _LONGEST_PAUSE_SECONDS)
        pause *= 1 + 0.25 * jitter
    explained = _with_error(start, error)
    return replace(explained, attempts=start.attempts + 1, due_at=now + timedelta(seconds=min(pause, 3600)))


def search_later(start: Start, *, now: datetime, jitter: float = 0.5) -> Start | None:
    """Return the start with its next search for a run, or None after `SEARCH_FOR`.

    After a crash there are often several starts without a run and several runs without a start.
    Callbacks link most of them while the runs take; the last one left is then unambiguous.
    """
    if not -_SKEW <= now - start.created_at < SEARCH_FOR:
        return None
    exists = FloraError(
        "FLORA has a run of this key, and it is not known which yet: waiting for its callback, searching the list",
        status=409, code="idempotency_duplicate", request_id=start.request_id,
    )  # fmt: skip
    return defer_start(start, exists, now=now, jitter=jitter)


def give_up_on(start: Start) -> Start:
    """Return the start as unknown: only its callback, or an operator, can resolve it."""
    return replace(start, state=StartState.UNKNOWN, error_code="unknown_outcome", error_message=_UNKNOWN)


def is_key_of_another(start: Start, error: FloraError, *, is_first: bool) -> bool:
    """Return whether FLORA knows the key of a start from a start that the ledger does not have.

    So it is if FLORA knows the key at the very first request. An equal request is 409; one with a
    callback URL of ours differs by the token in it, and is 422. Without such a URL, 422 means that
    the inputs differ, and is a refusal.
    """
    if error.code in _CONFLICTS:
        return start.callback_expected
    return is_first and reply_of(error) is Reply.EXISTS


def give_up_on_used_key(start: Start, error: FloraError) -> Start:
    """Return a start as unknown whose key is that of another start.

    The run is older than the start and has another token in its callback URL. So neither the list
    of runs since the start nor a callback can name it: a search could only find the run of others.
    """
    explained = _with_error(start, error)
    return replace(explained, state=StartState.UNKNOWN, error_code=USED_BEFORE, error_message=_USED_BEFORE)


def retry_refused(start: Start, *, token: str, request: str, now: datetime) -> Start:
    """Return a refused start as a new intent: FLORA released its key when it refused."""
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
    """Return the earliest time of a start whose response may still come."""
    return now - _YOUNG


def may_be_of_start(seen_at: datetime | None, oldest_start: datetime | None) -> bool:
    """Return whether a run may be that of a start whose response has not come yet.

    `seen_at` is when the run was created or first seen (None: unknown); `oldest_start` is when the
    oldest such start was made (None: there is none). A run that is older than it is not its run.
    """
    if oldest_start is None:
        return False
    return seen_at is None or seen_at >= oldest_start - _SKEW


@dataclass(frozen=True, slots=True)
class Window:
    """The period in which the run of a start must have been created, by FLORA's clock."""

    since: datetime
    until: datetime


def window_of(start: Start, *, now: datetime) -> Window:
    return Window(start.created_at - _SKEW, now + _SKEW)


def candidates(snapshots: Sequence[Snapshot], start: Start, *, now: datetime) -> tuple[Snapshot, ...]:
    """Return the runs of its technique's list that were created while a start was in progress."""
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
    """Return the registration of the run that a start made."""
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
