"""`flora-receiver runs batch`: one run for each row of a table; checks all, asks once, waits, writes `results.csv`.

The same command again goes on where the last one ended: every row is known to the service by its key.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as ProgressBar

from receiver.cli.batch.report import dollars, report
from receiver.cli.batch.results import Spool, summed, write_results
from receiver.cli.batch.runner import Halt, Jobs, Progress, Runner, patiently
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
class Options:
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


def run(options: Options) -> None:
    with report_errors(as_json=options.json):
        try:
            with source_of(options.file, sys.stdin.buffer) as source:
                _run(options, source)
        except TableError as error:
            print_error({"error": "table", "message": str(error)}, f"Error: {error}", as_json=options.json)
            raise typer.Exit(USAGE_ERROR) from error
        except KeyboardInterrupt:
            print("Interrupted before anything was started.", file=sys.stderr)
            raise typer.Exit(INTERRUPTED) from None


def _run(options: Options, source: Source) -> None:
    _check_options(options, source)
    table, patience = Table(source), min(options.patience, _FIRST_SECONDS)
    with connect() as receiver:
        found = patiently(lambda: receiver.technique(options.technique_id, options.workspace_id), seconds=patience)
        technique = technique_of(found, options.technique_id)
        plan = plan_of(
            technique,
            batch=options.batch or Path(source.name).stem,
            maps=options.maps,
            key=options.key,
            name=options.name,
            columns=table.columns,
        )
        if isinstance(plan, list):
            _refuse(options, plan, len(plan))
        checked = check(table.rows(), plan, keep=None if options.json else _SHOWN)
        if checked.wrong:
            _refuse(options, checked.problems, checked.wrong)
        known = patiently(lambda: _known(options, receiver, plan, checked), seconds=patience)
        _ask(options, plan, checked, known)
        with Spool() as outcomes:
            _carry_out(options, plan, table, receiver, outcomes, rows=checked.jobs)


def _check_options(options: Options, source: Source) -> None:
    """Refuse what would only be noticed after money was spent."""
    directory = options.results.parent
    if options.batch is None and not source.named:
        raise TableError(f"{source.name} has no name of its own: name the batch by --batch")
    if not directory.is_dir() or not os.access(directory, os.W_OK) or options.results.is_dir():
        raise TableError(f"--results {options.results} cannot be written")
    if options.results.exists() and options.file.exists() and options.results.samefile(options.file):
        raise TableError(f"--results {options.results} would overwrite the table itself")


def _refuse(options: Options, problems: list[RowProblem], count: int) -> NoReturn:
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
        as_json=options.json,
    )
    raise typer.Exit(USAGE_ERROR)


def _known(options: Options, receiver: ReceiverClient, plan: Plan, found: Check) -> int:
    """Count the rows that have been started before and so cost nothing now; refused ones are asked for again."""
    return sum(
        start["state"] != "refused"
        and (start["technique_id"], start["workspace_id"]) == (plan.technique.technique_id, options.workspace_id)
        and found.knows(start["idempotency_key"])
        for start in receiver.starts(prefix=plan.idempotency_key(""), limit=500)
    )


def _ask(options: Options, plan: Plan, found: Check, known: int) -> None:
    new, cost = found.jobs - known, plan.technique.run_cost
    before = f", {known} of them started before" if known else ""
    lines = [f"Batch {plan.batch}: {found.jobs} rows{before}."]
    if cost is None:
        lines.append(f"{new} runs of {options.technique_id}; FLORA does not say what one costs.")
    else:
        lines.append(f"{new} runs of {options.technique_id} × {dollars(cost)} = {dollars(new * cost)}")
    print("\n".join(lines), file=sys.stderr)
    if options.yes or not new:
        return
    if not sys.stdin.isatty():
        message = "nobody is there to be asked: add --yes to start the batch"
        print_error({"error": "unconfirmed", "message": message}, f"Error: {message}", as_json=options.json)
        raise typer.Exit(USAGE_ERROR)
    if not typer.confirm("Start them?", err=True):
        print("Nothing was started.", file=sys.stderr)
        raise typer.Exit(FAILED)


def _carry_out(
    options: Options, plan: Plan, table: Table, receiver: ReceiverClient, outcomes: Spool, *, rows: int
) -> None:
    runner = Runner(
        connect,
        outcomes,
        technique_id=plan.technique.technique_id,
        workspace_id=options.workspace_id,
        parallel=min(options.parallel, rows),
        patience_seconds=options.patience,
    )
    interrupted = False
    try:
        _see_through(options, runner, jobs_of(table.rows(), plan), receiver, rows=rows)
    except KeyboardInterrupt:
        interrupted = True
    finally:
        try:
            write_results(options.results, outcomes)
        except OSError as error:
            print(f"Error: {options.results} cannot be written: {error}", file=sys.stderr)
    summary = summed(outcomes)
    report(outcomes, summary, options.results, batch=plan.batch, as_json=options.json, halt=_explained(runner.halt))
    if interrupted:
        raise typer.Exit(INTERRUPTED)
    if not summary.ok:
        raise typer.Exit(FAILED)


def _see_through(options: Options, runner: Runner, jobs: Jobs, receiver: ReceiverClient, *, rows: int) -> None:
    """Run all jobs, then wait for their final costs, under a progress bar."""
    with _progress_bar(rows) as (bar, task):
        runner.run(jobs, lambda now: bar.update(task, completed=now.done, text=_format_progress(now)))
        if runner.halt is None or runner.halt.code != "unreachable":
            runner.settle_costs(
                receiver,
                seconds=options.cost_wait,
                watch=lambda left: bar.update(task, text=f"waiting for the final cost of {left} runs"),
            )


def _format_progress(now: Progress) -> str:
    failed = f", {now.failed} not" if now.failed else ""
    return f"{now.succeeded} stored{failed}, {now.in_hand} in hand, {dollars(now.cost)}"


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
def _progress_bar(rows: int) -> Iterator[tuple[ProgressBar, TaskID]]:
    console = Console(stderr=True)
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[text]}"), TimeElapsedColumn())
    with ProgressBar(*columns, console=console, disable=not console.is_terminal, transient=True) as bar:
        yield bar, bar.add_task("batch", total=rows, text="")
