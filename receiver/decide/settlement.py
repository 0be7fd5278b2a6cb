"""Dispatches of a settled run, the filters of handlers, and the expiry of its callback. Pure."""

from collections.abc import Sequence
from datetime import datetime
from typing import Any

from receiver.decide.lanes import lane_of
from receiver.decide.policy import Policy
from receiver.model import Dispatch, DispatchState, Event, Output, Run, RunState, Subscription, When

SETTLED_STATES = frozenset({RunState.COMPLETED, RunState.FAILED})


def settle(
    run: Run,
    outputs: Sequence[Output],
    events: Sequence[Event],
    subscriptions: Sequence[Subscription],
    *,
    now: datetime,
    round_: int = 0,
) -> tuple[Dispatch, ...]:
    """Return the dispatches for the events of a run: one for each handler that subscribes to one.

    Filters are evaluated here, once. If a filter does not match, the dispatch is skipped, with the
    reason.
    """
    rows = []
    for event in events:
        counted = run.losses - 1 if event is Event.LOST else round_
        for subscription in subscriptions:
            if event not in subscription.on:
                continue
            reason = filter_reason(run, outputs, subscription.when)
            if event is Event.COST_FINAL and Event.SETTLED in events and Event.SETTLED in subscription.on:
                reason = "the cost came with settled"
            state = DispatchState.READY if reason is None else DispatchState.SKIPPED
            lane = lane_of(event, outputs)
            rows.append(
                Dispatch(
                    run.run_id,
                    subscription.handler,
                    event,
                    counted,
                    state,
                    due_at=now,
                    last_error=reason,
                    lane=lane,
                )
            )
    return tuple(rows)


def filter_reason(run: Run, outputs: Sequence[Output], when: When) -> str | None:
    """Return which part of a filter does not match the run, or None if all of it does."""
    for name, wanted, actual in (
        ("status", when.status, run.state.value),
        ("run_type", when.run_type, run.run_type),
        ("technique_id", when.technique_id, run.technique_id),
        ("workspace_id", when.workspace_id, run.workspace_id),
    ):
        if wanted is not None and actual not in wanted:
            return f"{name} is {actual}"
    if when.output_type is not None and not any(output.type in when.output_type for output in outputs):
        return f"no output of type {', '.join(when.output_type)}"
    for key, value in (when.metadata or {}).items():
        if run.metadata.get(key) != value:
            return f"metadata.{key} is {_short(run.metadata.get(key))}"
    return None


def callback_expires_at(run: Run, policy: Policy) -> datetime:
    """Return when FLORA stops trying to deliver the callback of a settled run."""
    return ended_at(run) + policy.callback_window


def ended_at(run: Run) -> datetime:
    """Return when the run ended by FLORA's clock, limited to the time in which it was observed."""
    settled_at = run.settled_at or run.first_seen_at
    return max(min(run.completed_at or settled_at, settled_at), run.first_seen_at)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}…"
