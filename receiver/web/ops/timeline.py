"""What happened to a run, in order: pure, from what the ledger holds."""

from collections.abc import Collection, Iterator, Sequence
from datetime import datetime
from typing import Any

from receiver.store.queries import Attempt, DeliveryRecord, RunDetails
from receiver.web.ops.views import account_json, time_json

Entry = tuple[datetime, dict[str, Any]]


def timeline(
    account: RunDetails, arrivals: Sequence[DeliveryRecord], attempts: Sequence[Attempt], handlers: Collection[str]
) -> dict[str, Any]:
    """Return `{"run", "reads", "entries": [{"at", "kind", …}]}`, oldest entry first."""
    entries = sorted(
        (*_of_run(account), *_of_deliveries(arrivals), *_of_attempts(attempts), *_of_artifacts(account)),
        key=lambda entry: entry[0],
    )
    return {
        "run_id": account.run.run_id,
        "run": account_json(account, handlers),
        "reads": account.run.polls,
        "entries": [{"at": time_json(at), **entry} for at, entry in entries],
    }


def _of_run(account: RunDetails) -> Iterator[Entry]:
    run, start = account.run, account.start
    if start is not None:
        yield (
            start.created_at,
            {"kind": "asked", "idempotency_key": start.idempotency_key, "attempts": start.attempts + 1},
        )
    yield run.first_seen_at, {"kind": "first_seen", "origin": run.origin.value}
    for at, kind in ((run.created_at, "created"), (run.started_at, "started"), (run.completed_at, "ended")):
        if at is not None:
            yield at, {"kind": kind, "clock": "flora"}
    if run.settled_at is not None:
        yield run.settled_at, {"kind": "settled", "state": run.state.value, "error_code": run.error_code}


def _of_deliveries(arrivals: Sequence[DeliveryRecord]) -> Iterator[Entry]:
    for arrival in arrivals:
        shown = {"kind": "callback", "delivery_id": arrival.delivery_id, "event": arrival.event}
        yield arrival.received_at, {**shown, "age_seconds": arrival.age, "duplicates": arrival.duplicates}
        if arrival.last_duplicate_at is not None:
            yield arrival.last_duplicate_at, {"kind": "callback_again", "delivery_id": arrival.delivery_id}


def _of_attempts(attempts: Sequence[Attempt]) -> Iterator[Entry]:
    for attempt in attempts:
        shown = {"handler": attempt.handler, "event": attempt.event, "attempt": attempt.attempt}
        yield attempt.started_at, {"kind": "attempt", **shown}
        if attempt.ended_at is not None:
            yield (
                attempt.ended_at,
                {"kind": "attempt_ended", **shown, "outcome": attempt.outcome, "error": attempt.error},
            )


def _of_artifacts(account: RunDetails) -> Iterator[Entry]:
    for artifact in account.artifacts:
        if artifact.stored_at is not None:
            shown = {"kind": "stored", "handler": artifact.handler, "position": artifact.position}
            yield artifact.stored_at, {**shown, "location": artifact.location, "size": artifact.size}
