"""The history of a run, from what the ledger holds. Pure."""

from collections.abc import Collection, Iterator, Sequence
from datetime import datetime
from typing import Any

from receiver.client.messages import TimelineView
from receiver.store.queries import Attempt, DeliveryRecord, RunDetails
from receiver.web.ops.views import to_full_run

Entry = tuple[datetime, dict[str, Any]]


def to_timeline(
    details: RunDetails,
    deliveries: Sequence[DeliveryRecord],
    attempts: Sequence[Attempt],
    handlers: Collection[str],
) -> TimelineView:
    """Return what happened to a run, oldest entry first; `handlers` are the configured ones."""
    entries = sorted(
        (
            *_of_run(details),
            *_of_reads(details),
            *_of_deliveries(deliveries),
            *_of_attempts(attempts),
            *_of_artifacts(details),
        ),
        key=lambda entry: entry[0],
    )
    run = to_full_run(details, handlers)
    return TimelineView(
        run_id=run.run_id,
        run=run,
        reads=run.polls,
        failed_reads=run.failed_polls,
        entries=[{"at": at, **entry} for at, entry in entries],
    )


def _of_run(details: RunDetails) -> Iterator[Entry]:
    run, start = details.run, details.start
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


def _of_reads(details: RunDetails) -> Iterator[Entry]:
    for read in details.reads:
        response = {"http_status": read.http_status, "request_id": read.request_id, "seconds": read.seconds}
        shown = {"outcome": read.outcome.value, "run_status": read.run_status, "problem": read.problem}
        yield read.requested_at, {"kind": "read", "source": read.source, **shown, **response}


def _of_deliveries(deliveries: Sequence[DeliveryRecord]) -> Iterator[Entry]:
    for delivery in deliveries:
        callback = {"kind": "callback", "delivery_id": delivery.delivery_id, "event": delivery.event}
        yield (
            delivery.received_at,
            {**callback, "age_seconds": delivery.age, "duplicates": delivery.duplicates},
        )
        if delivery.last_duplicate_at is not None:
            yield (
                delivery.last_duplicate_at,
                {"kind": "callback_again", "delivery_id": delivery.delivery_id},
            )


def _of_attempts(attempts: Sequence[Attempt]) -> Iterator[Entry]:
    for attempt in attempts:
        call = {"handler": attempt.handler, "event": attempt.event, "attempt": attempt.attempt}
        yield attempt.started_at, {"kind": "attempt", **call}
        if attempt.ended_at is not None:
            result = {"outcome": attempt.outcome, "error": attempt.error}
            yield attempt.ended_at, {"kind": "attempt_ended", **call, **result}


def _of_artifacts(details: RunDetails) -> Iterator[Entry]:
    for artifact in details.artifacts:
        if artifact.stored_at is not None:
            place = {
                "handler": artifact.handler,
                "position": artifact.position,
                "location": artifact.location,
            }
            yield artifact.stored_at, {"kind": "stored", **place, "size": artifact.size}
