"""`flora-receiver dispatches …`: the work of the handlers on settled runs."""

from itertools import islice
from typing import Annotated

import typer

from receiver.cli.connection import api_client
from receiver.cli.options import Handler, Json, Limit
from receiver.cli.output import format_table, print_result

dispatches = typer.Typer(help="Show and retry the work of handlers.", no_args_is_help=True)


@dispatches.command("list")
def list_dispatches(
    state: Annotated[str, typer.Option(help="ready, leased, done, dead, skipped or orphaned.")] = "dead",
    limit: Limit = 50,
    json: Json = False,
) -> None:
    """List dispatches in a state, by default the dead ones."""
    head = ("run", "handler", "event", "state", "attempts", "last error")
    with api_client(json=json) as receiver:
        found = list(islice(receiver.dispatches(state, min(limit, 500)), limit))
        rows = [
            (
                row["run_id"],
                row["handler"],
                row["event"],
                row["state"],
                str(row["attempts"]),
                row["last_error"] or "",
            )
            for row in found
        ]
        text = format_table(head, rows) if rows else f"No dispatches are {state}."
        print_result(found, text, as_json=json)


@dispatches.command("retry")
def retry(
    run_id: Annotated[str | None, typer.Option(help="Only dispatches of this run.")] = None,
    handler: Handler = None,
    all_dead: Annotated[bool, typer.Option("--all", help="All of them.")] = False,
    json: Json = False,
) -> None:
    """Retry dead dispatches: those of a run or a handler, or all."""
    if all_dead == (run_id is not None or handler is not None):
        raise typer.BadParameter("pass --run-id or --handler or both, or else --all")
    with api_client(json=json) as receiver:
        count = receiver.retry_dispatches(handler, run_id, all_dead=all_dead)
        print_result({"dispatches": count}, f"{count} dispatches are due again.", as_json=json)
