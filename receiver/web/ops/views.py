"""The nouns as JSON, for the operations API. Times are ISO 8601 in UTC; money is US dollars. Pure."""

from collections.abc import Collection
from dataclasses import asdict
from datetime import datetime
from typing import Any

from receiver.decide.channel import ChannelHealth
from receiver.flora.messages import Technique
from receiver.model import Artifact, Dispatch, DispatchState, Rejection, Run, Start, StartState
from receiver.store.changes import Change
from receiver.store.queries import DeliveryRecord, RunDetails


def run_json(run: Run, *, finished: bool) -> dict[str, Any]:
    """Return a run as lists show it."""
    return {
        "run_id": run.run_id,
        "state": run.state.value,
        "settled": run.settled_at is not None,
        "finished": finished,
        "verdict": run.verdict and run.verdict.value,
        "origin": run.origin.value,
        "run_type": run.run_type,
        "technique_id": run.technique_id,
        "workspace_id": run.workspace_id,
        "project_id": run.project_id,
        "progress": run.progress,
        "first_seen_at": time_json(run.first_seen_at),
        "created_at": time_json(run.created_at),
        "started_at": time_json(run.started_at),
        "completed_at": time_json(run.completed_at),
        "reported_at": time_json(run.reported_at),
        "settled_at": time_json(run.settled_at),
        "deadline_at": time_json(run.deadline_at),
        "next_poll_at": time_json(run.next_poll_at),
        "polls": run.polls,
        "callback_expected": run.callback_expected,
        "told": run.callback_status and run.callback_status.value,
        "error_code": run.error_code,
        "error_message": run.error_message,
        "lost_reason": run.lost_reason and run.lost_reason.value,
        "charged_cost": run.charged_cost,
        "quoted_cost": run.quoted_cost,
        "cost_final": run.settled_at is not None and run.cost_due_at is None,
        "metadata": dict(run.metadata),
    }


def account_json(account: RunDetails, handlers: Collection[str]) -> dict[str, Any]:
    """Return a run with its outputs, artifacts, dispatches and start; `handlers` are the configured ones."""
    return {
        **run_json(account.run, finished=account.is_finished_for(handlers)),
        "outputs": [asdict(output) for output in account.outputs],
        "artifacts": [artifact_json(artifact) for artifact in account.artifacts],
        "dispatches": [
            {**dispatch_json(dispatch, handlers), "result": dispatch.result} for dispatch in account.dispatches
        ],
        "start": None if account.start is None else start_json(account.start),
    }


def artifact_json(artifact: Artifact) -> dict[str, Any]:
    return {
        "handler": artifact.handler,
        "position": artifact.position,
        "output_id": artifact.output_id,
        "location": artifact.location,
        "size": artifact.size,
        "sha256": artifact.sha256,
        "content_type": artifact.content_type,
        "stored_at": time_json(artifact.stored_at),
    }


def dispatch_json(dispatch: Dispatch, handlers: Collection[str]) -> dict[str, Any]:
    """Return a dispatch; it is orphaned while it waits for a handler that is not configured."""
    waits = dispatch.state in {DispatchState.READY, DispatchState.LEASED}
    return {
        "run_id": dispatch.run_id,
        "handler": dispatch.handler,
        "event": dispatch.event.value,
        "round": dispatch.round,
        "state": dispatch.state.value,
        "orphaned": waits and dispatch.handler not in handlers,
        "attempts": dispatch.attempts,
        "due_at": time_json(dispatch.due_at),
        "last_error": dispatch.last_error,
    }


def start_json(start: Start) -> dict[str, Any]:
    """Return a start; its request is left out, since it holds what the caller sent."""
    error = None
    if start.error_code is not None or start.error_message is not None:
        error = {
            "code": start.error_code or "unknown",
            "message": start.error_message or "",
            "status": start.error_status,
            "fields": [{"field": field, "message": message} for field, message in start.error_fields],
            "request_id": start.request_id,
        }
    return {
        "token": start.token,
        "state": start.state.value,
        "run_id": start.run_id,
        "operation": start.operation.value,
        "technique_id": start.technique_id or None,
        "workspace_id": start.workspace_id or None,
        "idempotency_key": start.idempotency_key,
        "created_at": time_json(start.created_at),
        "asked_again_at": time_json(start.due_at) if start.state is StartState.ASKING and start.attempts else None,
        "attempts": start.attempts,
        "callback_expected": start.callback_expected,
        "metadata": dict(start.metadata),
        "error": error,
    }


def arrival_json(arrival: DeliveryRecord) -> dict[str, Any]:
    """Return a delivery; with its body where that was read."""
    shown: dict[str, Any] = {
        "delivery_id": arrival.delivery_id,
        "run_id": arrival.run_id,
        "event": arrival.event,
        "api_version": arrival.api_version,
        "received_at": time_json(arrival.received_at),
        "age_seconds": arrival.age,
        "readable": arrival.readable,
        "duplicates": arrival.duplicates,
        "last_duplicate_at": time_json(arrival.last_duplicate_at),
    }
    return shown


def rejection_json(rejection: Rejection) -> dict[str, Any]:
    return {
        "rejected_at": time_json(rejection.rejected_at),
        "code": rejection.code,
        "remote": rejection.remote,
        "size": rejection.size,
    }


def technique_json(technique: Technique) -> dict[str, Any]:
    return asdict(technique)


def health_json(health: ChannelHealth) -> dict[str, Any]:
    return asdict(health)


def change_json(change: Change) -> dict[str, Any]:
    """Return a change as the event stream tells it."""
    if change.kind == "start":  # published under the start's token, since it has no run yet
        return {
            "kind": "start",
            "token": change.run_id,
            "run_id": change.detail or None,
            "state": change.state,
            "detail": "",
        }
    return {"kind": change.kind, "run_id": change.run_id, "state": change.state, "detail": change.detail}


def time_json(moment: datetime | None) -> str | None:
    return None if moment is None else moment.isoformat()
