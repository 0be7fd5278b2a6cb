"""The commands on a running service: names, options and help. The work is in `runs.py` and `looking.py`."""

from datetime import datetime
from typing import Annotated, Optional

import typer

runs = typer.Typer(help="Runs: start them, wait for them, look at them.", no_args_is_help=True)
techniques_runs = typer.Typer(help="FLORA's own name for `runs start`.", no_args_is_help=True)
deliveries = typer.Typer(help="The callbacks that arrived.", no_args_is_help=True)
dispatches = typer.Typer(help="The handlers' work.", no_args_is_help=True)

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
RunId = Annotated[str, typer.Argument(help="The run, run_….")]
Workspace = Annotated[Optional[str], typer.Option("--workspace-id", help="Whose API key to use.")]  # noqa: UP045
Metadata = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option("--metadata", help="Your own data about the run, a JSON object; file names may use it."),
]
Handler = Annotated[Optional[str], typer.Option("--handler", help="Only this handler.")]  # noqa: UP045
Limit = Annotated[int, typer.Option(min=1, max=100_000, help="Rows, at most.")]
Seconds = Annotated[float, typer.Option("--timeout", min=0, help="Seconds to wait, at most.")]


@runs.command("start")
@techniques_runs.command("create")
def start(
    technique_id: Annotated[Optional[str], typer.Option(help="The technique, tech_… or its slug.")] = None,  # noqa: UP045
    inputs: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option("--input", help="'{id: …, type: …, value: …}', JSON or YAML; once for each input."),
    ] = None,
    mode: Annotated[str, typer.Option(help="async or stream; FLORA gets it as it is.")] = "async",
    callback_url: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Somebody else's; default: this service's. The run is polled then."),
    ] = None,
    idempotency_key: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="The same key again starts nothing and shows the same run."),
    ] = None,
    generate: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Instead of a technique: the body of POST /generate, JSON or YAML."),
    ] = None,
    metadata: Metadata = None,
    workspace_id: Workspace = None,
    wait: Annotated[bool, typer.Option("--wait", help="Wait until its files are stored, and list them.")] = False,
    timeout: Seconds = 3600,
    json: Json = False,
) -> None:
    """Start a run; prints its id, with --wait its files too."""
    from receiver.cli.runs import start as command

    command(
        technique_id=technique_id, inputs=inputs or [], mode=mode, callback_url=callback_url, key=idempotency_key,
        generate=generate, metadata=metadata, workspace_id=workspace_id, wait=wait, timeout=timeout, json=json,
    )  # fmt: skip


@runs.command("track")
def track(
    run: Annotated[str, typer.Argument(help="The run's id, run_…, or its poll_url.")],
    technique_id: Annotated[Optional[str], typer.Option(help="Its technique, where it is a technique's.")] = None,  # noqa: UP045
    run_type: Annotated[Optional[str], typer.Option(help="technique, generation or action.")] = None,  # noqa: UP045
    callback_expected: Annotated[
        bool, typer.Option("--callback-expected", help="Its callback_url is this service's.")
    ] = False,
    metadata: Metadata = None,
    workspace_id: Workspace = None,
    json: Json = False,
) -> None:
    """Take up a run that someone else started."""
    from receiver.cli.runs import track as command

    command(
        run, technique_id=technique_id, run_type=run_type, callback_expected=callback_expected, metadata=metadata,
        workspace_id=workspace_id, json=json,
    )  # fmt: skip


@runs.command("wait")
def wait(run_id: RunId, timeout: Seconds = 3600, json: Json = False) -> None:
    """Wait until a run's files are stored, and list them."""
    from receiver.cli.runs import wait as command

    command(run_id, timeout=timeout, json=json)


@runs.command("list")
def list_runs(
    state: Annotated[Optional[str], typer.Option(help="open, reported, completed, failed or lost.")] = None,  # noqa: UP045
    limit: Limit = 50,
    json: Json = False,
) -> None:
    """List runs, newest first."""
    from receiver.cli.runs import list_runs as command

    command(state=state, limit=limit, json=json)


@runs.command("show")
def show_run(run_id: RunId, json: Json = False) -> None:
    """Show a run with its files and its handlers' work."""
    from receiver.cli.runs import show_run as command

    command(run_id, json=json)


@runs.command("explain")
def explain(run_id: RunId, json: Json = False) -> None:
    """Say why a run stands where it stands, and what happened."""
    from receiver.cli.runs import explain as command

    command(run_id, json=json)


@runs.command("refresh")
def refresh(run_id: RunId, json: Json = False) -> None:
    """Read a run from FLORA now; take up a lost one again."""
    from receiver.cli.runs import refresh as command

    command(run_id, json=json)


@runs.command("redispatch")
def redispatch(
    run_id: Annotated[Optional[str], typer.Argument(help="The run; not with --missing.")] = None,  # noqa: UP045
    handler: Handler = None,
    again: Annotated[
        bool, typer.Option("--again", help="Apply effects once more, under new idempotency keys.")
    ] = False,
    missing: Annotated[
        bool, typer.Option("--missing", help="Tell a handler added later of the runs settled since --since.")
    ] = False,
    since: Annotated[
        Optional[datetime],  # noqa: UP045
        typer.Option(help="With --missing: a date or a time, UTC.", formats=["%Y-%m-%d", "%Y-%m-%dT%H:%M:%S"]),
    ] = None,
    json: Json = False,
) -> None:
    """Have handlers work on a run again, or new ones on old runs."""
    from receiver.cli.runs import redispatch as command

    command(run_id, handler=handler, again=again, missing=missing, since=since, json=json)


@runs.command("resolve")
def resolve(
    start: Annotated[str, typer.Argument(help="The start, by its idempotency key or its token.")],
    run_id: Annotated[Optional[str], typer.Option(help="The run that it made.")] = None,  # noqa: UP045
    no_run: Annotated[bool, typer.Option("--no-run", help="It made none: it may be started again.")] = False,
    json: Json = False,
) -> None:
    """Say what became of a start whose outcome is unknown."""
    from receiver.cli.runs import resolve as command

    command(start, run_id=run_id, no_run=no_run, json=json)


@deliveries.command("list")
def list_deliveries(
    run_id: Annotated[Optional[str], typer.Option(help="Only those about this run.")] = None,  # noqa: UP045
    limit: Limit = 50,
    json: Json = False,
) -> None:
    """List the callbacks that arrived, newest first."""
    from receiver.cli.records import list_deliveries as command

    command(run_id=run_id, limit=limit, json=json)


@deliveries.command("show")
def show_delivery(delivery_id: Annotated[str, typer.Argument(help="The delivery, whd_….")], json: Json = False) -> None:
    """Show a callback with its raw body."""
    from receiver.cli.records import show_delivery as command

    command(delivery_id, json=json)


@dispatches.command("list")
def list_dispatches(
    state: Annotated[str, typer.Option(help="ready, leased, done, dead, skipped, or orphaned.")] = "dead",
    limit: Limit = 50,
    json: Json = False,
) -> None:
    """List the handlers' work in a state, by default what is dead."""
    from receiver.cli.records import list_dispatches as command

    command(state=state, limit=limit, json=json)


@dispatches.command("retry")
def retry(
    run_id: Annotated[Optional[str], typer.Option(help="Only those of this run.")] = None,  # noqa: UP045
    handler: Handler = None,
    json: Json = False,
) -> None:
    """Try what is dead again."""
    from receiver.cli.records import retry as command

    command(run_id=run_id, handler=handler, json=json)


def channel(json: Json = False) -> None:
    """Judge the callback channel over the last 24 hours."""
    from receiver.cli.records import channel as command

    command(json=json)
