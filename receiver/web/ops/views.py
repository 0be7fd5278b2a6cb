"""Rows of the ledger as messages of the operations API. Pure."""

from collections.abc import Collection
from typing import Any, TypeVar

from receiver.client import messages
from receiver.client.messages import DeliveryView, DispatchView, ErrorView, Message, ReadView, RunView
from receiver.model import Dispatch, DispatchState, Run, Start, StartState
from receiver.store.changes import Change
from receiver.store.queries import DeliveryRecord, RunDetails

M = TypeVar("M", bound=Message)


def _fill(model: type[M], source: object, *, without: Collection[str] = (), **given: Any) -> M:
    """Return a message with the given fields, and the others from attributes of `source`."""
    names = model.model_fields.keys() - given.keys() - set(without)
    return model(**{name: getattr(source, name) for name in names if hasattr(source, name)}, **given)


def to_run(run: Run, *, finished: bool, **given: Any) -> RunView:
    """Return a run as lists show it, with the further fields that are `given`."""
    return _fill(
        RunView,
        run,
        settled=run.settled_at is not None,
        finished=finished,
        polls=run.polls - run.failed_polls,
        told=run.callback_status,
        cost_final=run.settled_at is not None and run.cost_due_at is None,
        **given,
    )


def to_full_run(details: RunDetails, handlers: Collection[str]) -> RunView:
    """Return a run with its last reads, outputs, artifacts, dispatches and start.

    `handlers` are the names of the configured ones.
    """
    return to_run(
        details.run,
        finished=details.is_finished_for(handlers),
        outputs=details.outputs,
        last_reads=[_fill(ReadView, attempt) for attempt in details.reads],
        artifacts=details.artifacts,
        dispatches=[
            to_dispatch(dispatch, handlers, result=dispatch.result) for dispatch in details.dispatches
        ],
        start=None if details.start is None else to_start(details.start),
    )


def to_dispatch(dispatch: Dispatch, handlers: Collection[str], **given: Any) -> DispatchView:
    """Return a dispatch, without its result unless that is `given`."""
    waits = dispatch.state in {DispatchState.READY, DispatchState.LEASED}
    orphaned = waits and dispatch.handler not in handlers
    return _fill(
        DispatchView,
        dispatch,
        without=("result",),
        attempts=dispatch.last_attempt,
        orphaned=orphaned,
        **given,
    )


def to_start(start: Start) -> messages.Start:
    """Return a start without its request, which holds the caller's inputs."""
    error = None
    if start.error_code is not None or start.error_message is not None:
        error = ErrorView(
            code=start.error_code or "unknown",
            message=start.error_message or "",
            status=start.error_status,
            fields=start.error_fields,
            request_id=start.request_id,
        )
    return _fill(
        messages.Start,
        start,
        technique_id=start.technique_id or None,
        workspace_id=start.workspace_id or None,
        asked_again_at=start.due_at if start.state is StartState.ASKING and start.attempts else None,
        error=error,
    )


def to_delivery(delivery: DeliveryRecord, **given: Any) -> DeliveryView:
    """Return a delivery, without its signature and body unless they are `given`."""
    return _fill(DeliveryView, delivery, without=("signature", "body"), age_seconds=delivery.age, **given)


def to_change(change: Change) -> dict[str, Any]:
    """Return a change as the event stream sends it."""
    if change.kind == "start":  # published under the start's token, since it has no run yet
        return {
            "kind": "start",
            "token": change.run_id,
            "run_id": change.detail or None,
            "state": change.state,
            "detail": "",
        }
    return {"kind": change.kind, "run_id": change.run_id, "state": change.state, "detail": change.detail}
