"""`flora-receiver runs …`: everything is asked of the running service, through its operations API."""

import json as js
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from itertools import islice
from typing import Any

import typer
import yaml

from receiver.cli.connection import connect
from receiver.cli.explanation import explained_run
from receiver.cli.output import FAILED, format_table, print_result, report_errors
from receiver.client.client import ReceiverClient
from receiver.client.messages import RunView, StartView


@contextmanager
def talking(*, json: bool) -> Iterator[ReceiverClient]:
    """Give a client inside the block; whatever goes wrong is told, with what to do."""
    with report_errors(as_json=json), connect() as receiver:
        yield receiver


def start(
    *,
    technique_id: str | None,
    inputs: Sequence[str],
    mode: str,
    callback_url: str | None,
    key: str | None,
    generate: str | None,
    metadata: str | None,
    workspace_id: str | None,
    wait: bool,
    timeout: float,
    json: bool,
) -> None:
    if (technique_id is None) == (generate is None):
        raise typer.BadParameter("give --technique-id with --input, or --generate")
    given = [row for text in inputs for row in _inputs(text)]
    body = None if generate is None else _object(generate, "--generate")
    known = _object(metadata, "--metadata") if metadata is not None else None
    with talking(json=json) as receiver:
        if body is not None:
            begun = receiver.generate(
                body, idempotency_key=key, metadata=known, callback_url=callback_url, workspace_id=workspace_id
            )
        else:
            begun = receiver.start(
                technique_id or "", given, mode=mode, idempotency_key=key, metadata=known, callback_url=callback_url,
                workspace_id=workspace_id,
            )  # fmt: skip
        if begun.run_id is None:
            _still_asking(begun, json=json)
        elif not wait:
            print_result(plain(begun), begun.run_id, as_json=json)
        else:
            if not json:
                print(begun.run_id, flush=True)
            _end(receiver.wait(begun.run_id, timeout_seconds=timeout), json=json)


def track(
    run: str,
    *,
    technique_id: str | None,
    run_type: str | None,
    callback_expected: bool,
    metadata: str | None,
    workspace_id: str | None,
    json: bool,
) -> None:
    known = _object(metadata, "--metadata") if metadata is not None else None
    is_url = "://" in run
    with talking(json=json) as receiver:
        found = receiver.track(
            None if is_url else run, run if is_url else None, technique_id=technique_id, run_type=run_type,
            workspace_id=workspace_id, callback_expected=callback_expected, metadata=known,
        )  # fmt: skip
        print_result(plain(found), f"{found.run_id} is tracked ({found.state}).", as_json=json)


def wait(run_id: str, *, timeout: float, json: bool) -> None:
    with talking(json=json) as receiver:
        _end(receiver.wait(run_id, timeout_seconds=timeout), json=json)


def list_runs(*, state: str | None, limit: int, json: bool) -> None:
    with talking(json=json) as receiver:
        found = list(islice(receiver.runs(state, min(limit, 500)), limit))
        rows = [
            (run.run_id, run.state, run.verdict or "", run.technique_id or run.run_type or "", _cost(run), _age(run))
            for run in found
        ]
        text = (
            format_table(("run", "state", "callback", "technique", "cost", "first seen"), rows) if rows else "No runs."
        )
        print_result([plain(run) for run in found], text, as_json=json)


def show_run(run_id: str, *, json: bool) -> None:
    with talking(json=json) as receiver:
        run = receiver.run(run_id)
        print_result(plain(run), "\n".join(_lines(run)), as_json=json)


def explain(run_id: str, *, json: bool) -> None:
    with talking(json=json) as receiver:
        found = receiver.timeline(run_id)
        lines = explained_run(found)
        print_result({**found, "explanation": lines}, "\n".join(lines), as_json=json)


def refresh(run_id: str, *, json: bool) -> None:
    with talking(json=json) as receiver:
        run = receiver.refresh(run_id)
        told = "is read once more, for the newest URLs" if run.settled else "is being read now"
        print_result(plain(run), f"{run_id} {told}.", as_json=json)


def redispatch(
    run_id: str | None, *, handler: str | None, again: bool, missing: bool, since: datetime | None, json: bool
) -> None:
    if missing:
        if run_id is not None or again or handler is None or since is None:
            raise typer.BadParameter("--missing goes with --handler and --since, and with no run and no --again")
        with talking(json=json) as receiver:
            number = receiver.redispatch_missing(handler, since.replace(tzinfo=UTC))
            print_result(
                {"handler": handler, "dispatches": number}, f"{handler} is due for {number} runs.", as_json=json
            )
        return
    if run_id is None or since is not None:
        raise typer.BadParameter("name a run, or give --missing, --handler and --since")
    with talking(json=json) as receiver:
        number = receiver.redispatch(run_id, handler, again=again)
        print_result({"run_id": run_id, "dispatches": number}, f"{number} dispatches are due again.", as_json=json)
        if not number:
            raise typer.Exit(FAILED)


def resolve(start: str, *, run_id: str | None, no_run: bool, json: bool) -> None:
    if (run_id is None) != no_run:
        raise typer.BadParameter("give --run-id, or --no-run")
    with talking(json=json) as receiver:
        begun = receiver.resolve(start, run_id)
        told = f"made {begun.run_id}" if begun.run_id else "made no run: it may be started again"
        print_result(plain(begun), f"Noted: the start {begun.idempotency_key} {told}.", as_json=json)


def _still_asking(begun: StartView, *, json: bool) -> None:
    why = f" ({begun.error.message})" if begun.error else ""
    text = (
        f"FLORA has not answered yet{why}. The service goes on asking; to hear more, run the same command with\n"
        f"  --idempotency-key {begun.idempotency_key}"
    )
    print_result(plain(begun), text, as_json=json)
    raise typer.Exit(FAILED)


def _end(run: RunView, *, json: bool) -> None:
    """Show how a run ended, its files first; exit code 1 unless all went well."""
    lines = [str(file.path or file.location) for file in run.files]
    if not run.finished:
        lines.append(f"Not finished yet: {run.state}. Wait on with: flora-receiver runs wait {run.run_id}")
    elif not run.succeeded:
        reason = run.error_message or run.error_code or run.lost_reason or ""
        lines.append(f"{run.state}{f': {reason}' if reason else ''}")
        lines += [f"{one.handler} gave up: {one.last_error}" for one in run.dispatches if one.state == "dead"]
    print_result(plain(run), "\n".join(lines) or run.state, as_json=json)
    if not run.succeeded:
        raise typer.Exit(FAILED)


def _lines(run: RunView) -> Iterator[str]:
    yield f"{run.run_id}  {run.state}{f' ({run.verdict})' if run.verdict else ''}"
    facts = {
        "technique": run.technique_id,
        "workspace": run.workspace_id,
        "error": " ".join(filter(None, (run.error_code, run.error_message))) or run.lost_reason,
        "cost": _cost(run),
        "metadata": js.dumps(dict(run.metadata), ensure_ascii=False) if run.metadata else None,
    }
    yield from (f"  {name:<10} {value}" for name, value in facts.items() if value)
    for file in run.files:
        yield f"  {'file':<10} {file.path or file.location}  {file.size} bytes"
    for one in run.dispatches:
        error = f"  {one.last_error}" if one.last_error else ""
        state = f"{one.state} (orphaned: no such handler is configured)" if one.orphaned else one.state
        yield f"  {'handler':<10} {one.handler} ({one.event}): {state}, {one.attempts} attempts{error}"


def plain(view: RunView | StartView) -> Any:
    """Return a view as JSON values."""
    return _plain(asdict(view))


def _plain(value: Any) -> Any:
    match value:
        case datetime():
            return value.isoformat()
        case Mapping():
            return {key: _plain(each) for key, each in value.items()}
        case list() | tuple():
            return [_plain(each) for each in value]
        case _:
            return value


def _cost(run: RunView) -> str:
    if run.charged_cost is None:
        return ""
    return f"${run.charged_cost:.2f}{'' if run.cost_final else ' so far'}"


def _age(run: RunView) -> str:
    return run.first_seen_at.strftime("%Y-%m-%d %H:%M:%S") if run.first_seen_at else ""


def _inputs(text: str) -> list[Mapping[str, Any]]:
    """Return the input, or the inputs, in one `--input`."""
    # YAML's own idea of a number or a date must not change a text: every scalar stays the text that was written.
    found = _parsed(text, "--input", yaml.BaseLoader)
    rows = found if isinstance(found, list) else [found]
    if not all(isinstance(row, dict) and {"id", "type", "value"} <= row.keys() for row in rows):
        raise typer.BadParameter(f"--input {text!r} is not like {{id: prompt, type: text, value: a lighthouse}}")
    return rows


def _object(text: str, option: str) -> Mapping[str, Any]:
    found = _parsed(text, option, yaml.SafeLoader)
    if not isinstance(found, dict) or not all(isinstance(key, str) for key in found):
        raise typer.BadParameter(f"{option} is not an object like {{key: value}}")
    try:
        js.dumps(found)
    except (TypeError, ValueError) as error:
        raise typer.BadParameter(f"{option} holds what JSON cannot: put dates in quotes") from error
    return found


def _parsed(text: str, option: str, loader: type[yaml.BaseLoader | yaml.SafeLoader]) -> Any:
    try:
        return js.loads(text)
    except (ValueError, RecursionError):
        pass
    try:
        return yaml.load(text, Loader=loader)  # noqa: S506 -- both loaders build plain values only
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise typer.BadParameter(f"{option} is neither JSON nor YAML: {text!r}") from error
