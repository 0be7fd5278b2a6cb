"""Runs and starts of the operations API, as text for a terminal and as JSON values."""

import json
from collections.abc import Iterator, Mapping
from datetime import datetime
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from receiver.client.messages import RunView, StartView


def describe_run(run: "RunView") -> Iterator[str]:
    """Yield the lines of `runs show`."""
    yield f"{run.run_id}  {run.state}{f' ({run.verdict})' if run.verdict else ''}"
    facts = {
        "technique": run.technique_id,
        "workspace": run.workspace_id,
        "error": " ".join(filter(None, (run.error_code, run.error_message))) or run.lost_reason,
        "cost": format_cost(run),
        "reads": describe_hold(run),
        "metadata": json.dumps(dict(run.metadata), ensure_ascii=False) if run.metadata else None,
    }
    yield from (f"  {name:<10} {value}" for name, value in facts.items() if value)
    for file in run.files:
        yield f"  {'file':<10} {file.path or file.location}  {file.size} bytes"
    for work in run.dispatches:
        error = f"  {work.last_error}" if work.last_error else ""
        orphaned = " (orphaned: no such handler is configured)" if work.orphaned else ""
        state = f"{work.state}{orphaned}, {work.attempts} attempts"
        yield f"  {'handler':<10} {work.handler} ({work.event}): {state}{error}"


def describe_end(run: "RunView") -> Iterator[str]:
    """Yield the files of a run that was waited for, then what went wrong."""
    yield from (str(file.path or file.location) for file in run.files)
    if not run.finished:
        command = f"flora-receiver runs wait {run.run_id}"
        yield f"Not finished yet: {run.state}. To keep waiting: {command}"
        if held := describe_hold(run):
            yield held
    elif not run.succeeded:
        reason = run.error_message or run.error_code or run.lost_reason or ""
        yield f"{run.state}{f': {reason}' if reason else ''}"
        for work in run.dispatches:
            if work.state == "dead":
                yield f"{work.handler} gave up: {work.last_error}"


def describe_hold(run: "RunView") -> str | None:
    """Return why the run is not read from FLORA now, as a sentence."""
    held = run.reads_held
    return None if held is None else f"Nothing is read until {format_time(held.until)} UTC: {held.reason}."


def format_cost(run: "RunView") -> str:
    """Return the cost of a run in USD, marked unless it is final."""
    if run.charged_cost is None:
        return ""
    return f"${run.charged_cost:.2f}{'' if run.cost_final else ' so far'}"


def format_time(moment: datetime | None) -> str:
    """Return a time in UTC, to the second."""
    return moment.strftime("%Y-%m-%d %H:%M:%S") if moment else ""


def to_plain(view: "RunView | StartView") -> Any:
    """Return a view as JSON values."""
    return _to_plain(view.model_dump())


def _to_plain(value: Any) -> Any:
    match value:
        case datetime():
            return value.isoformat()
        case Mapping():
            return {key: _to_plain(each) for key, each in value.items()}
        case list() | tuple():
            return [_to_plain(each) for each in value]
        case _:
            return value
