"""`flora-receiver channel`: the health of the callback channel."""

import typer

from receiver.cli.connection import api_client
from receiver.cli.options import Json
from receiver.cli.output import FAILED, print_result


def channel(json: Json = False) -> None:
    """Show the health of callbacks over the last 24 hours."""
    with api_client(json=json) as receiver:
        found = receiver.channel()
        health = found["health"]
        names = ("matched", "recovered", "diverged", "lost")
        counts = ", ".join(f"{health[name]} {name}" for name in names)
        state = "Healthy" if health["ok"] else "Unhealthy"
        lines = [f"{state} over the last 24 hours: {counts}, {found['late']} late."]
        if health["cause"]:
            lines += [f"Likely cause: {health['cause']}.", f"What to do: {health['cure']}"]
        print_result(found, "\n".join(lines), as_json=json)
        if not health["ok"]:
            raise typer.Exit(FAILED)
