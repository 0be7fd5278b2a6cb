"""Merges what a report contains into the row of its run. Pure steps that the rules share."""

from msgspec.structs import replace

from receiver.decide.poll_schedule import route
from receiver.model import CallbackReceived, CallbackStatus, Origin, Run, RunRegistered, RunState, Snapshot

# From the origin that knows least about a run to the one that knows most.
_RANKS = (Origin.DISCOVERED, Origin.CALLBACK, Origin.TRACKED, Origin.STARTED)


def _with_origin(run: Run, origin: Origin, *, callback_expected: bool) -> Run:
    """Take over the origin, and whether to expect a callback, from a better informed report."""
    if _RANKS.index(origin) <= _RANKS.index(run.origin):
        return run
    return replace(run, origin=origin, callback_expected=callback_expected)


def with_registration(run: Run, report: RunRegistered) -> Run:
    merged = replace(
        _with_origin(run, report.origin, callback_expected=report.callback_expected),
        run_type=run.run_type or report.run_type,
        technique_id=run.technique_id or report.technique_id,
        workspace_id=run.workspace_id or report.workspace_id,
        project_id=run.project_id or report.project_id,
        poll_url=run.poll_url or report.poll_url,
        quoted_cost=report.quoted_cost if run.quoted_cost is None else run.quoted_cost,
        metadata={**report.metadata, **run.metadata},
    )
    if run.state is RunState.REPORTED and route(merged) is not route(run):
        return replace(merged, next_poll_at=report.registered_at)  # now it can be read
    return merged


def with_callback(run: Run, report: CallbackReceived) -> Run:
    return replace(
        _with_origin(run, Origin.CALLBACK, callback_expected=True),
        run_type=run.run_type or report.run_type,
        workspace_id=run.workspace_id or report.workspace_id,
    )


def with_snapshot(run: Run, snapshot: Snapshot) -> Run:
    """Take over the fields of a read; those that it lacks stay as they are."""
    return replace(
        run,
        run_type=snapshot.run_type or run.run_type,
        technique_id=snapshot.technique_id or run.technique_id,
        workspace_id=snapshot.workspace_id or run.workspace_id,
        project_id=snapshot.project_id or run.project_id,
        poll_url=snapshot.poll_url or run.poll_url,
        progress=run.progress if snapshot.progress is None else snapshot.progress,
        created_at=snapshot.created_at or run.created_at,
        started_at=snapshot.started_at or run.started_at,
        completed_at=snapshot.completed_at or run.completed_at,
        error_code=snapshot.error_code or run.error_code,
        error_message=snapshot.error_message or run.error_message,
        charged_cost=run.charged_cost if snapshot.charged_cost is None else snapshot.charged_cost,
    )


def read_succeeded(run: Run) -> Run:
    return replace(run, polls=run.polls + 1, failures=0, missing=0, missing_since=None)


def combine_status(before: CallbackStatus | None, says: CallbackStatus) -> CallbackStatus:
    return says if before is None or before is says else CallbackStatus.CONFLICTING
