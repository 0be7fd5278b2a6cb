"""`flora-receiver deliveries …`, `dispatches …` and `channel`: what the running service knows besides its runs."""

from itertools import islice

import typer

from receiver.cli.output import FAILED, format_table, print_result
from receiver.cli.runs import talking


def list_deliveries(*, run_id: str | None, limit: int, json: bool) -> None:
    with talking(json=json) as receiver:
        found = list(islice(receiver.deliveries(run_id, min(limit, 500)), limit))
        rows = [
            (
                row["delivery_id"],
                row["event"] or "",
                row["run_id"] or "",
                str(row["duplicates"]),
                _time(row["received_at"]),
            )
            for row in found
        ]
        head = ("delivery", "event", "run", "again", "received")
        print_result(found, format_table(head, rows) if rows else "No callbacks.", as_json=json)


def show_delivery(delivery_id: str, *, json: bool) -> None:
    with talking(json=json) as receiver:
        found = receiver.delivery(delivery_id)
        lines = [f"{name:<18} {value}" for name, value in found.items() if name != "body" and value is not None]
        body = found["body"]
        lines += ["", body if body is not None else "Its body is past its retention ([retention] bodies_days)."]
        print_result(found, "\n".join(lines), as_json=json)


def list_dispatches(*, state: str, limit: int, json: bool) -> None:
    with talking(json=json) as receiver:
        found = list(islice(receiver.dispatches(state, min(limit, 500)), limit))
        rows = [
            (row["run_id"], row["handler"], row["event"], row["state"], str(row["attempts"]), row["last_error"] or "")
            for row in found
        ]
        head = ("run", "handler", "event", "state", "attempts", "last error")
        print_result(found, format_table(head, rows) if rows else f"No dispatches are {state}.", as_json=json)


def retry(*, run_id: str | None, handler: str | None, json: bool) -> None:
    with talking(json=json) as receiver:
        number = receiver.retry_dispatches(handler, run_id)
        print_result({"dispatches": number}, f"{number} dispatches are due again.", as_json=json)


def channel(*, json: bool) -> None:
    with talking(json=json) as receiver:
        found = receiver.channel()
        health = found["health"]
        counts = ", ".join(f"{health[name]} {name}" for name in ("matched", "recovered", "diverged", "lost"))
        lines = [
            f"{'Healthy' if health['ok'] else 'In trouble'}, over the last 24 hours: {counts}, {found['late']} late."
        ]
        if health["cause"]:
            lines += [f"Likely cause: {health['cause']}.", f"What to do: {health['cure']}"]
        print_result(found, "\n".join(lines), as_json=json)
        if not health["ok"]:
            raise typer.Exit(FAILED)


def _time(value: str) -> str:
    return value[:19].replace("T", " ")
