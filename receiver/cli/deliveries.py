"""`flora-receiver deliveries …`: the callbacks that the running service has received."""

from itertools import islice
from typing import Annotated

import typer

from receiver.cli.connection import api_client
from receiver.cli.options import Json, Limit
from receiver.cli.output import format_table, print_result

deliveries = typer.Typer(help="Show the callbacks that were received.", no_args_is_help=True)


@deliveries.command("list")
def list_deliveries(
    run_id: Annotated[str | None, typer.Option(help="Only callbacks about this run.")] = None,
    limit: Limit = 50,
    json: Json = False,
) -> None:
    """List callbacks, newest first."""
    head = ("delivery", "event", "run", "again", "received")
    with api_client(json=json) as receiver:
        found = list(islice(receiver.deliveries(run_id, min(limit, 500)), limit))
        rows = [
            (
                row["delivery_id"],
                row["event"] or "",
                row["run_id"] or "",
                str(row["duplicates"]),
                row["received_at"][:19].replace("T", " "),
            )
            for row in found
        ]
        print_result(found, format_table(head, rows) if rows else "No callbacks.", as_json=json)


@deliveries.command("show")
def show_delivery(
    delivery_id: Annotated[str, typer.Argument(help="The delivery's id, whd_….")], json: Json = False
) -> None:
    """Show a callback with its raw body."""
    with api_client(json=json) as receiver:
        found = receiver.delivery(delivery_id)
        lines = [
            f"{name:<18} {value}" for name, value in found.items() if name != "body" and value is not None
        ]
        body = found["body"]
        if body is None:
            body = "The body has been deleted ([retention] bodies_days)."
        print_result(found, "\n".join([*lines, "", body]), as_json=json)
