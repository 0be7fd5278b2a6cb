"""`flora-receiver runs batch`: one run for each row of a table; checks all, asks once, waits, writes `results.csv`.

The same command again goes on where the last one ended: every row is known to the service by its key.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from receiver.cli.batch.report import dollars, report
from receiver.cli.batch.results import Spool, summed, write_results
from receiver.cli.batch.runner import Halt, Jobs, Runner, Standing, patiently
from receiver.cli.batch.table import RowProblem, Source, Table, source_of
from receiver.cli.batch.validation import Check, Plan, check, jobs_of, plan_of, technique_of
from receiver.cli.connection import connect
from receiver.cli.output import FAILED, USAGE_ERROR, print_error, report_errors
from receiver.client.client import ReceiverClient
from receiver.errors import TableError

INTERRUPTED = 130
_FIRST_SECONDS = 10.0
"""Patience before anything was started: whoever forgot to start the service wants to know soon."""
_SHOWN = 50
"""Bad rows shown on a screen; `--json` gives all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """The command's options."""

    file: Path
    technique_id: str
    maps: list[str]
    key: str
    name: str | None
    batch: str | None
    parallel: int
    patience: float
    cost_wait: float
    results: Path
    workspace_id: str | None
    yes: bool
    json: bool


def run(**options: Any) -> None:
    order = Order(**options)
    with report_errors(as_json=order.json):
        try:
            with source_of(order.file, sys.stdin.buffer) as source:
                _run(order, source)
        except TableError as error:
            print_error({"error": "table", "message": str(error)}, f"Error: {error}", as_json=order.json)
            raise typer.Exit(USAGE_ERROR) from error
        except KeyboardInterrupt:
            print("Interrupted before anything was started.", file=sys.stderr)
            raise typer.Exit(INTERRUPTED) from None


def _run(order: Order, source: Source) -> None:
    _check_options(order, source)
    table, patience = Table(source), min(order.patience, _FIRST_SECONDS)
    with connect() as receiver:
        found = patiently(lambda: receiver.technique(order.technique_id, order.workspace_id), seconds=patience)
        technique = technique_of(found, order.technique_id)
        plan = plan_of(
            technique,
            batch=order.batch or Path(source.name).stem,
            maps=order.maps,
            key=order.key,
            name=order.name,
            columns=table.columns,
        )
        if isinstance(plan, list):
            _refuse(order, plan, len(plan))
        checked = check(table.rows(), plan, keep=None if order.json else _SHOWN)
        if checked.wrong:
            _refuse(order, checked.problems, checked.wrong)
        known = patiently(lambda: _known(order, receiver, plan, checked), seconds=patience)
        _ask(order, plan, checked, known)
        with Spool() as outcomes:
            _carry_out(order, plan, table, receiver, outcomes, rows=checked.jobs)


def _check_options(order: Order, source: Source) -> None:
    """Refuse what would only be noticed after money was spent."""
    directory = order.results.parent
    if order.batch is None and not source.named:
        raise TableError(f"{source.name} has no name of its own: name the batch by --batch")
    if not directory.is_dir() or not os.access(directory, os.W_OK) or order.results.is_dir():
        raise TableError(f"--results {order.results} cannot be written")
    if order.results.exists() and order.file.exists() and order.results.samefile(order.file):
        raise TableError(f"--results {order.results} would overwrite the table itself")


def _refuse(order: Order, problems: list[RowProblem], count: int) -> NoReturn:
    """Say everything that is wrong, and that nothing was started."""
    lines = [f"  {problem}" for problem in problems[:_SHOWN]]
    if count > len(lines):
        lines.append(f"  … and {count - len(lines)} more (--json shows all)")
    noun = "problem" if count == 1 else "problems"
    print_error(
        {
            "error": "table",
            "message": f"{count} {noun}",
            "total": count,
            "problems": [{"row": each.row, "column": each.column, "message": each.message} for each in problems],
        },
        f"{count} {noun}; nothing was started:\n" + "\n".join(lines),
        as_json=order.json,
    )
    raise typer.Exit(USAGE_ERROR)


def _known(order: Order, receiver: ReceiverClient, plan: Plan, found: Check) -> int:
    """Count the rows that have been started before and so cost nothing now; refused ones are asked for again."""
    return sum(
        start["state"] != "refused"
        and (start["technique_id"], start["workspace_id"]) == (plan.technique.technique_id, order.workspace_id)
        and found.knows(start["idempotency_key"])
        for start in receiver.starts(prefix=plan.idempotency_key(""), limit=500)
    )


def _ask(order: Order, plan: Plan, found: Check, known: int) -> None:
    new, cost = found.jobs - known, plan.technique.run_cost
    before = f", {known} of them started before" if known else ""
    lines = [f"Batch {plan.batch}: {found.jobs} rows{before}."]
    if cost is None:
        lines.append(f"{new} runs of {order.technique_id}; FLORA does not say what one costs.")
    else:
        lines.append(f"{new} runs of {order.technique_id} × {dollars(cost)} = {dollars(new * cost)}")
    print("\n".join(lines), file=sys.stderr)
    if order.yes or not new:
        return
    if not sys.stdin.isatty():
        message = "nobody is there to be asked: add --yes to start the batch"
        print_error({"error": "unconfirmed", "message": message}, f"Error: {message}", as_json=order.json)
        raise typer.Exit(USAGE_ERROR)
    if not typer.confirm("Start them?", err=True):
        print("Nothing was started.", file=sys.stderr)
        raise typer.Exit(FAILED)


def _carry_out(order: Order, plan: Plan, table: Table, receiver: ReceiverClient, outcomes: Spool, *, rows: int) -> None:
    runner = Runner(
        connect,
        outcomes,
        technique_id=plan.technique.technique_id,
        workspace_id=order.workspace_id,
        parallel=min(order.parallel, rows),
        patience_seconds=order.patience,
    )
    interrupted = False
    try:
        _see_through(order, runner, jobs_of(table.rows(), plan), receiver, rows=rows)
    except KeyboardInterrupt:
        interrupted = True
    finally:
        try:
            write_results(order.results, outcomes)
        except OSError as error:
            print(f"Error: {order.results} cannot be written: {error}", file=sys.stderr)
    summary = summed(outcomes)
    report(outcomes, summary, order.results, batch=plan.batch, as_json=order.json, halt=_explained(runner.halt))
    if interrupted:
        raise typer.Exit(INTERRUPTED)
    if not summary.ok:
        raise typer.Exit(FAILED)


def _see_through(order: Order, runner: Runner, jobs: Jobs, receiver: ReceiverClient, *, rows: int) -> None:
    """Run all jobs, then wait for their final costs, under a progress bar."""
    with _progress(rows) as (progress, task):
        runner.run(jobs, lambda now: progress.update(task, completed=now.done, told=_told(now)))
        if runner.halt is None or runner.halt.code != "unreachable":
            runner.settle_costs(
                receiver,
                seconds=order.cost_wait,
                watch=lambda left: progress.update(task, told=f"waiting for the final cost of {left} runs"),
            )


def _told(standing: Standing) -> str:
    failed = f", {standing.failed} not" if standing.failed else ""
    return f"{standing.succeeded} stored{failed}, {standing.in_hand} in hand, {dollars(standing.cost)}"


def _explained(halt: Halt | None) -> str | None:
    """Return why a batch ended early, and what to do."""
    if halt is None:
        return None
    again = "run the same command again: it goes on where it ended, and starts no row twice."
    match halt.code:
        case "interrupted":
            return f"Interrupted. What was started goes on at FLORA and in the service. To see it through, {again}"
        case "insufficient_credits":
            return f"Stopped: FLORA has no credits left ({halt.message}). Top up, then {again}"
        case "unreachable":
            return f"Stopped: {halt.message}. What was started goes on at FLORA. Once the service is back, {again}"
        case _:
            return f"Stopped: every further row would be refused as well ({halt.code}: {halt.message}). Then {again}"


@contextmanager
def _progress(rows: int) -> Iterator[tuple[Progress, TaskID]]:
    console = Console(stderr=True)
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[told]}"), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:
        yield progress, progress.add_task("batch", total=rows, told="")
