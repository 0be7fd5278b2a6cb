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
from receiver.cli.run_text import describe_end, describe_run, format_cost, format_time, to_plain

if TYPE_CHECKING:
    from receiver.client.messages import RunView, StartView

_PAGE = 500
"""Rows in one page of the API, at most."""

runs = typer.Typer(help="Runs: start them, wait for them, look at them.", no_args_is_help=True)
techniques_runs = typer.Typer(help="FLORA's own name for `runs start`.", no_args_is_help=True)


@runs.command("start")
@techniques_runs.command("create")
def start(
    technique_id: Annotated[str | None, typer.Option(help="The technique, tech_… or its slug.")] = None,
    inputs: Annotated[
        list[str] | None,
        typer.Option("--input", help="'{id: …, type: …, value: …}', JSON or YAML; once for each input."),
    ] = None,
    mode: Annotated[str, typer.Option(help="async or stream; FLORA gets it as it is.")] = "async",
    callback_url: Annotated[
        str | None,
        typer.Option(help="Somebody else's; default: this service's. The run is polled then."),
    ] = None,
    idempotency_key: Annotated[
        str | None,
        typer.Option(help="The same key again starts nothing and shows the same run."),
    ] = None,
    generate: Annotated[
        str | None,
        typer.Option(help="Instead of a technique: the body of POST /generate, JSON or YAML."),
    ] = None,
    metadata: Metadata = None,
    workspace_id: WorkspaceId = None,
    wait: Annotated[bool, typer.Option("--wait", help="Wait until its files are stored, and list them.")] = False,
    timeout: Timeout = 3600,
    json: Json = False,
) -> None:
    """Start a run; prints its id, with --wait its files too."""
    if (technique_id is None) == (generate is None):
        raise typer.BadParameter("give --technique-id with --input, or --generate")
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
    technique_id: Annotated[str | None, typer.Option(help="Its technique, where it is a technique's.")] = None,
    run_type: Annotated[str | None, typer.Option(help="technique, generation or action.")] = None,
    callback_expected: Annotated[
        bool, typer.Option("--callback-expected", help="Its callback_url is this service's.")
    ] = False,
    metadata: Metadata = None,
    workspace_id: WorkspaceId = None,
    json: Json = False,
) -> None:
    """Take up a run that someone else started."""
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
    """Show a run with its files and its handlers' work."""
    with api_client(json=json) as receiver:
        run = receiver.run(run_id)
        print_result(to_plain(run), "\n".join(describe_run(run)), as_json=json)


@runs.command("explain")
def explain(run_id: RunId, json: Json = False) -> None:
    """Say why a run stands where it stands, and what happened."""
    with api_client(json=json) as receiver:
        found = receiver.timeline(run_id)
        lines = explain_run(found)
        print_result({**found, "explanation": lines}, "\n".join(lines), as_json=json)


@runs.command("refresh")
def refresh(run_id: RunId, json: Json = False) -> None:
    """Read a run from FLORA now; take up a lost one again."""
    with api_client(json=json) as receiver:
        run = receiver.refresh(run_id)
        what = "is read once more, for the newest URLs" if run.settled else "is being read now"
        print_result(to_plain(run), f"{run_id} {what}.", as_json=json)


@runs.command("redispatch")
def redispatch(
    run_id: Annotated[str | None, typer.Argument(help="The run; not with --missing.")] = None,
    handler: Handler = None,
    again: Annotated[
        bool, typer.Option("--again", help="Apply effects once more, under new idempotency keys.")
    ] = False,
    missing: Annotated[
        bool,
        typer.Option("--missing", help="Tell a handler added later of the runs settled since --since."),
    ] = False,
    since: Annotated[
        datetime | None,
        typer.Option(help="With --missing: a date or a time, UTC.", formats=["%Y-%m-%d", "%Y-%m-%dT%H:%M:%S"]),
    ] = None,
    json: Json = False,
) -> None:
    """Have handlers work on a run again, or new ones on old runs."""
    if missing:
        if run_id is not None or again or handler is None or since is None:
            raise typer.BadParameter("--missing goes with --handler and --since, and with no run and no --again")
        with api_client(json=json) as receiver:
            count = receiver.redispatch_missing(handler, since.replace(tzinfo=UTC))
            text = f"{handler} is due for {count} runs."
            print_result({"handler": handler, "dispatches": count}, text, as_json=json)
        return
    if run_id is None or since is not None:
        raise typer.BadParameter("name a run, or give --missing, --handler and --since")
    with api_client(json=json) as receiver:
        count = receiver.redispatch(run_id, handler, again=again)
        text = f"{count} dispatches are due again."
        print_result({"run_id": run_id, "dispatches": count}, text, as_json=json)
        if not count:
            raise typer.Exit(FAILED)


@runs.command("resolve")
def resolve(
    start: Annotated[str, typer.Argument(help="The start, by its idempotency key or its token.")],
    run_id: Annotated[str | None, typer.Option(help="The run that it made.")] = None,
    no_run: Annotated[bool, typer.Option("--no-run", help="It made none: it may be started again.")] = False,
    json: Json = False,
) -> None:
    """Say what became of a start whose outcome is unknown."""
    if (run_id is None) != no_run:
        raise typer.BadParameter("give --run-id, or --no-run")
    with api_client(json=json) as receiver:
        begun = receiver.resolve(start, run_id)
        what = f"made {begun.run_id}" if begun.run_id else "made no run: it may be started again"
        text = f"Noted: the start {begun.idempotency_key} {what}."
        print_result(to_plain(begun), text, as_json=json)


@runs.command("batch")
def batch(
    file: Annotated[Path, typer.Argument(help="CSV or JSON Lines, UTF-8; - for standard input.")],
    technique_id: Annotated[str, typer.Option(help="The technique, tech_… or its slug.")],
    key: Annotated[str, typer.Option(help="What tells rows apart, such as '{market_code}'.")],
    maps: Annotated[
        list[str],
        typer.Option(
            "--map",
            help="An input of the technique from the row's columns: 'headline={headline}'.",
        ),
    ],
    name: Annotated[str | None, typer.Option(help="The row's name for files; default: its key.")] = None,
    batch: Annotated[str | None, typer.Option(help="The batch's name; default: the file's, without .csv.")] = None,
    parallel: Annotated[int, typer.Option(min=1, max=256, help="Rows in hand at the same time, at most.")] = 8,
    results: Annotated[Path, typer.Option(help="Where the results go.")] = Path("results.csv"),
    patience: Annotated[
        float,
        typer.Option(min=0, max=86400, help="Seconds to go on while the service does not answer."),
    ] = 120,
    cost_wait: Annotated[
        float, typer.Option(min=0, max=3600, help="Seconds to wait for final costs, at the end.")
    ] = 90,
    workspace_id: Annotated[str | None, typer.Option(help="Whose API key starts the runs.")] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask before spending.")] = False,
    json: Json = False,
) -> None:
    """Start one run for each row of a table and see all through."""
    from receiver.cli.batch.command import Options, run

    options = Options(
        file=file, technique_id=technique_id, key=key, maps=maps, name=name, batch=batch,
        parallel=parallel, results=results, patience=patience, cost_wait=cost_wait,
        workspace_id=workspace_id, yes=yes, json=json,
    )  # fmt: skip
    run(options)


def _print_pending(begun: "StartView", *, json: bool) -> None:
    why = f" ({begun.error.message})" if begun.error else ""
    text = (
        f"FLORA has not answered yet{why}. The service goes on asking; to hear more, run the same "
        f"command with\n  --idempotency-key {begun.idempotency_key}"
    )
    print_result(to_plain(begun), text, as_json=json)
    raise typer.Exit(FAILED)


def _print_end(run: "RunView", *, json: bool) -> None:
    """Print how a run ended, its files first; exit code 1 unless all went well."""
    print_result(to_plain(run), "\n".join(describe_end(run)) or run.state, as_json=json)
    if not run.succeeded:
        raise typer.Exit(FAILED)
