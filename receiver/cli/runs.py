"""`flora-receiver runs …`: starts, follows and repairs runs through the running service's API."""

from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from receiver.cli.arguments import parse_inputs, parse_object
from receiver.cli.connection import api_client
from receiver.cli.explanation import explain_run
from receiver.cli.options import Handler, Json, Limit, Metadata, RunId, Timeout, WorkspaceId
from receiver.cli.output import FAILED, format_table, print_result
from receiver.cli.run_text import (
    describe_end,
    describe_hold,
    describe_run,
    format_cost,
    format_time,
    to_plain,
)

if TYPE_CHECKING:
    from receiver.client.messages import RunView, StartView

_PAGE = 500
"""Rows in one page of the API, at most."""

TechniqueId = Annotated[str | None, typer.Option(help="The technique: tech_… or its slug.")]
Inputs = Annotated[
    list[str] | None,
    typer.Option(
        "--input",
        help="'{id: …, type: …, value: …}' in JSON or YAML; repeat it for each input.",
    ),
]
Mode = Annotated[str, typer.Option(help="async or stream; passed to FLORA unchanged.")]
CallbackUrl = Annotated[
    str | None,
    typer.Option(help="URL of another receiver, so that the run is polled; default: this service's."),
]
IdempotencyKey = Annotated[
    str | None, typer.Option(help="A repeated key starts nothing and returns the same run.")
]
Generate = Annotated[
    str | None,
    typer.Option(help="Body of POST /generate in JSON or YAML, instead of a technique."),
]
Wait = Annotated[bool, typer.Option("--wait", help="Wait until the files are stored, and list them.")]

runs = typer.Typer(help="Start runs, follow them and repair them.", no_args_is_help=True)
techniques_runs = typer.Typer(help="FLORA's own name for `runs start`.", no_args_is_help=True)


@runs.command("start")
@techniques_runs.command("create")
def start(
    technique_id: TechniqueId = None,
    inputs: Inputs = None,
    mode: Mode = "async",
    callback_url: CallbackUrl = None,
    idempotency_key: IdempotencyKey = None,
    generate: Generate = None,
    metadata: Metadata = None,
    workspace_id: WorkspaceId = None,
    wait: Wait = False,
    timeout: Timeout = 3600,
    json: Json = False,
) -> None:
    """Start a run and print its id, with --wait also its files."""
    if (technique_id is None) == (generate is None):
        raise typer.BadParameter("pass either --technique-id with --input, or --generate")
    given = parse_inputs(inputs or ())
    body = parse_object(generate, "--generate")
    data = parse_object(metadata, "--metadata")
    with api_client(json=json) as receiver:
        if technique_id is None:
            begun = receiver.generate(
                body or {}, callback_url=callback_url, idempotency_key=idempotency_key,
                metadata=data, workspace_id=workspace_id,
            )  # fmt: skip
        else:
            begun = receiver.start(
                technique_id, given, mode=mode, callback_url=callback_url,
                idempotency_key=idempotency_key, metadata=data, workspace_id=workspace_id,
            )  # fmt: skip
        if begun.run_id is None:
            _print_pending(begun, json=json)
        elif not wait:
            print_result(to_plain(begun), begun.run_id, as_json=json)
        else:
            if not json:
                print(begun.run_id, flush=True)
            _print_end(receiver.wait(begun.run_id, timeout_seconds=timeout), json=json)


@runs.command("track")
def track(
    run: Annotated[str, typer.Argument(help="The run's id, run_…, or its poll_url.")],
    technique_id: Annotated[str | None, typer.Option(help="The run's technique, if it has one.")] = None,
    run_type: Annotated[str | None, typer.Option(help="technique, generation or action.")] = None,
    callback_expected: Annotated[
        bool, typer.Option("--callback-expected", help="The run's callback_url is this service's.")
    ] = False,
    metadata: Metadata = None,
    workspace_id: WorkspaceId = None,
    json: Json = False,
) -> None:
    """Track a run that was started elsewhere."""
    data = parse_object(metadata, "--metadata")
    run_id, poll_url = (None, run) if "://" in run else (run, None)
    with api_client(json=json) as receiver:
        found = receiver.track(
            run_id, poll_url, technique_id=technique_id, run_type=run_type,
            workspace_id=workspace_id, callback_expected=callback_expected, metadata=data,
        )  # fmt: skip
        print_result(to_plain(found), f"{found.run_id} is tracked ({found.state}).", as_json=json)


@runs.command("wait")
def wait_for_run(run_id: RunId, timeout: Timeout = 3600, json: Json = False) -> None:
    """Wait until a run's files are stored, and list them."""
    with api_client(json=json) as receiver:
        _print_end(receiver.wait(run_id, timeout_seconds=timeout), json=json)


@runs.command("list")
def list_runs(
    state: Annotated[str | None, typer.Option(help="open, reported, completed, failed or lost.")] = None,
    limit: Limit = 50,
    json: Json = False,
) -> None:
    """List runs, newest first."""
    head = ("run", "state", "callback", "technique", "cost", "first seen")
    with api_client(json=json) as receiver:
        found = list(islice(receiver.runs(state, min(limit, _PAGE)), limit))
        rows = [
            (
                run.run_id,
                run.state,
                run.verdict or "",
                run.technique_id or run.run_type or "",
                format_cost(run),
                format_time(run.first_seen_at),
            )
            for run in found
        ]
        text = format_table(head, rows) if rows else "No runs."
        print_result([to_plain(run) for run in found], text, as_json=json)


@runs.command("show")
def show_run(run_id: RunId, json: Json = False) -> None:
    """Show a run with its files and the work of its handlers."""
    with api_client(json=json) as receiver:
        run = receiver.run(run_id)
        print_result(to_plain(run), "\n".join(describe_run(run)), as_json=json)


@runs.command("explain")
def explain(run_id: RunId, json: Json = False) -> None:
    """Explain the state of a run and list what happened to it."""
    with api_client(json=json) as receiver:
        found = receiver.timeline(run_id)
        lines = explain_run(found)
        print_result({**found, "explanation": lines}, "\n".join(lines), as_json=json)


@runs.command("refresh")
def refresh(run_id: RunId, json: Json = False) -> None:
    """Read a run from FLORA now, also one that was lost."""
    with api_client(json=json) as receiver:
        run = receiver.refresh(run_id)
        why = ", for its newest URLs" if run.settled else ""
        held = describe_hold(run)
        text = (
            f"{run_id} is due to be read{why}." if held is None else f"{run_id} is due to be read. {held}"
        )
        print_result(to_plain(run), text, as_json=json)


@runs.command("redispatch")
def redispatch(
    run_id: Annotated[str | None, typer.Argument(help="The run's id; not with --missing.")] = None,
    handler: Handler = None,
    again: Annotated[
        bool, typer.Option("--again", help="Repeat the effects, under new idempotency keys.")
    ] = False,
    missing: Annotated[
        bool,
        typer.Option(
            "--missing", help="Dispatch the runs settled since --since to a handler that was added later."
        ),
    ] = False,
    since: Annotated[
        datetime | None,
        typer.Option(
            help="With --missing: a date or a time in UTC.", formats=["%Y-%m-%d", "%Y-%m-%dT%H:%M:%S"]
        ),
    ] = None,
    json: Json = False,
) -> None:
    """Dispatch a run again, or old runs to a new handler."""
    if missing:
        if run_id is not None or again or handler is None or since is None:
            raise typer.BadParameter(
                "--missing needs --handler and --since, and excludes a run and --again"
            )
        with api_client(json=json) as receiver:
            count = receiver.redispatch_missing(handler, since.replace(tzinfo=UTC))
            text = f"{count} runs are due for {handler}."
            print_result({"handler": handler, "dispatches": count}, text, as_json=json)
        return
    if run_id is None or since is not None:
        raise typer.BadParameter("pass a run, or --missing with --handler and --since")
    with api_client(json=json) as receiver:
        count = receiver.redispatch(run_id, handler, again=again)
        text = f"{count} dispatches are due again."
        print_result({"run_id": run_id, "dispatches": count}, text, as_json=json)
        if not count:
            raise typer.Exit(FAILED)


@runs.command("resolve")
def resolve(
    start: Annotated[str, typer.Argument(help="The start's idempotency key or token.")],
    run_id: Annotated[str | None, typer.Option(help="The run that was started.")] = None,
    no_run: Annotated[
        bool, typer.Option("--no-run", help="No run was started; the start may be repeated.")
    ] = False,
    json: Json = False,
) -> None:
    """Resolve a start whose outcome is unknown."""
    if (run_id is None) != no_run:
        raise typer.BadParameter("pass either --run-id or --no-run")
    with api_client(json=json) as receiver:
        begun = receiver.resolve(start, run_id)
        what = f"started {begun.run_id}" if begun.run_id else "started no run and may be repeated"
        text = f"Resolved: {begun.idempotency_key} {what}."
        print_result(to_plain(begun), text, as_json=json)


@runs.command("batch")
def batch(
    file: Annotated[Path, typer.Argument(help="CSV or JSON Lines in UTF-8; - for standard input.")],
    technique_id: Annotated[str, typer.Option(help="The technique: tech_… or its slug.")],
    key: Annotated[str, typer.Option(help="Template of a row's unique key, such as '{market_code}'.")],
    maps: Annotated[
        list[str],
        typer.Option(
            "--map",
            help="Template of an input, such as 'headline={headline}'; repeat it for each input.",
        ),
    ],
    name: Annotated[
        str | None, typer.Option(help="Template of a row's name in file names; default: its key.")
    ] = None,
    separator: Annotated[
        str | None,
        typer.Option(help="Separator of a CSV file, such as ';' or tab; default: as its rows tell."),
    ] = None,
    batch: Annotated[
        str | None, typer.Option(help="Name of the batch; default: the file's name without its suffix.")
    ] = None,
    parallel: Annotated[
        int, typer.Option(min=1, max=256, help="Maximum number of rows in progress at once.")
    ] = 8,
    results: Annotated[Path, typer.Option(help="File for the results.")] = Path("results.csv"),
    patience: Annotated[
        float,
        typer.Option(min=0, max=86400, help="Seconds to keep trying while the service does not respond."),
    ] = 120,
    cost_wait: Annotated[
        float, typer.Option(min=0, max=3600, help="Seconds to wait for final costs at the end.")
    ] = 90,
    workspace_id: Annotated[
        str | None, typer.Option(help="Workspace whose API key starts the runs.")
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask for confirmation.")] = False,
    json: Json = False,
) -> None:
    """Start a run for each row of a table and wait for all of them."""
    from receiver.cli.batch.command import Options, run

    options = Options(
        file=file, technique_id=technique_id, key=key, maps=maps, name=name, separator=separator, batch=batch,
        parallel=parallel, results=results, patience=patience, cost_wait=cost_wait,
        workspace_id=workspace_id, yes=yes, json=json,
    )  # fmt: skip
    run(options)


def _print_pending(begun: "StartView", *, json: bool) -> None:
    why = f" ({begun.error.message})" if begun.error else ""
    text = (
        f"FLORA has not responded yet{why}. The service keeps trying; to see the result, run the "
        f"same command with\n  --idempotency-key {begun.idempotency_key}"
    )
    print_result(to_plain(begun), text, as_json=json)
    raise typer.Exit(FAILED)


def _print_end(run: "RunView", *, json: bool) -> None:
    """Print how a run ended, its files first; the exit code is 1 unless it succeeded."""
    print_result(to_plain(run), "\n".join(describe_end(run)) or run.state, as_json=json)
    if not run.succeeded:
        raise typer.Exit(FAILED)
