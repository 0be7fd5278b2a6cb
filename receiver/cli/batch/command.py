"""`flora-receiver runs batch`: checks a table, starts a run for each row and writes `results.csv`.

The same command again resumes the batch: the service knows every row by its key.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import NoReturn

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as ProgressBar

from receiver.cli.batch.report import format_dollars, print_report
from receiver.cli.batch.results import (
    Spool,
    check_path,
    open_spool,
    print_results,
    summarize,
    write_results,
)
from receiver.cli.batch.retries import call_with_retries
from receiver.cli.batch.runner import Halt, Jobs, Progress, Runner
from receiver.cli.batch.separators import parse_separator
from receiver.cli.batch.signals import Interruption
from receiver.cli.batch.table import RowProblem, Source, Table, open_source
from receiver.cli.batch.validation import Check, Plan, check_rows, make_jobs, make_plan, to_technique
from receiver.cli.connection import connect
from receiver.cli.output import FAILED, USAGE_ERROR, print_error, report_errors
from receiver.client.client import ReceiverClient
from receiver.errors import TableError

_MAX_FIRST_PATIENCE_SECONDS = 10.0
"""Patience before anything was started: a service that is not running is reported soon."""
_MAX_PROBLEMS = 50
"""Problems printed on a terminal; `--json` prints all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """The options of the command."""

    file: Path
    technique_id: str
    maps: list[str]
    key: str
    name: str | None
    separator: str | None
    batch: str | None
    parallel: int
    patience: float
    cost_wait: float
    results: Path
    workspace_id: str | None
    yes: bool
    json: bool


def run(options: Options) -> None:
    with report_errors(as_json=options.json), Interruption() as interruption:
        try:
            with open_source(options.file, sys.stdin.buffer) as source:
                _run(options, source, interruption)
        except TableError as error:
            data = {"error": "table", "message": str(error)}
            print_error(data, f"Error: {error}", as_json=options.json)
            raise typer.Exit(USAGE_ERROR) from error
        except KeyboardInterrupt:
            print("Interrupted before anything was started.", file=sys.stderr)
            raise typer.Exit(interruption.exit_code or FAILED) from None


def _run(options: Options, source: Source, interruption: Interruption) -> None:
    _check_options(options, source)
    table = Table(
        source, separator=None if options.separator is None else parse_separator(options.separator)
    )
    patience = min(options.patience, _MAX_FIRST_PATIENCE_SECONDS)
    with connect() as receiver:
        read = partial(receiver.technique, options.technique_id, options.workspace_id)
        technique = to_technique(call_with_retries(read, seconds=patience), options.technique_id)
        plan = make_plan(
            technique,
            batch=options.batch or Path(source.name).stem,
            maps=options.maps,
            key=options.key,
            name=options.name,
            columns=table.columns,
            separator=table.separator,
        )
        if isinstance(plan, list):
            _refuse(options, plan, len(plan))
        check = check_rows(table.rows(), plan, keep=None if options.json else _MAX_PROBLEMS)
        if check.wrong:
            _refuse(options, check.problems, check.wrong)
        count = partial(_count_known, options, receiver, plan, check)
        _confirm(options, plan, check, known=call_with_retries(count, seconds=patience))
        with open_spool() as outcomes:
            _execute(options, plan, table, receiver, outcomes, interruption, rows=check.jobs)


def _check_options(options: Options, source: Source) -> None:
    """Refuse what would otherwise fail only after money was spent."""
    results = options.results
    if options.batch is None and not source.has_name:
        raise TableError(f"{source.name} has no name: name the batch with --batch")
    if results.exists() and options.file.exists() and results.samefile(options.file):
        raise TableError(f"--results {results} would overwrite the table itself")
    try:
        check_path(results)
    except OSError as error:
        raise TableError(f"--results {results} cannot be written: {error.strerror}") from error


def _refuse(options: Options, problems: list[RowProblem], count: int) -> NoReturn:
    """Print the problems and exit; nothing was started."""
    lines = [f"  {problem}" for problem in problems[:_MAX_PROBLEMS]]
    if count > len(lines):
        lines.append(f"  … and {count - len(lines)} more (--json shows all)")
    message = f"{count} {'problem' if count == 1 else 'problems'}"
    data = {
        "error": "table",
        "message": message,
        "total": count,
        "problems": [asdict(each) for each in problems],
    }
    text = "\n".join([f"{message}; nothing was started:", *lines])
    print_error(data, text, as_json=options.json)
    raise typer.Exit(USAGE_ERROR)


def _count_known(options: Options, receiver: ReceiverClient, plan: Plan, check: Check) -> int:
    """Return how many rows were started before and cost nothing now; refused rows start again."""
    expected = (plan.technique.technique_id, options.workspace_id)
    return sum(
        start["state"] != "refused"
        and (start["technique_id"], start["workspace_id"]) == expected
        and check.has_key(start["idempotency_key"])
        for start in receiver.starts(prefix=plan.idempotency_key(""), limit=500)
    )


def _confirm(options: Options, plan: Plan, check: Check, *, known: int) -> None:
    """Print the cost of the new runs and ask for confirmation; exit if it is refused."""
    new, cost = check.jobs - known, plan.technique.run_cost
    before = f", {known} of them started before" if known else ""
    print(f"Batch {plan.batch}: {check.jobs} rows{before}.", file=sys.stderr)
    runs = f"{new} runs of {options.technique_id}"
    if cost is None:
        print(f"{runs}; FLORA does not say what one costs.", file=sys.stderr)
    else:
        print(f"{runs} × {format_dollars(cost)} = {format_dollars(new * cost)}", file=sys.stderr)
    if options.yes or not new:
        return
    if not sys.stdin.isatty():
        message = "there is no terminal to confirm on: add --yes to start the batch"
        data = {"error": "unconfirmed", "message": message}
        print_error(data, f"Error: {message}", as_json=options.json)
        raise typer.Exit(USAGE_ERROR)
    if not typer.confirm("Start them?", err=True):
        print("Nothing was started.", file=sys.stderr)
        raise typer.Exit(FAILED)


def _execute(
    options: Options,
    plan: Plan,
    table: Table,
    receiver: ReceiverClient,
    outcomes: Spool,
    interruption: Interruption,
    *,
    rows: int,
) -> None:
    """Run the batch, then write and print its results, also after Ctrl-C or SIGTERM."""
    runner = Runner(
        connect,
        outcomes,
        technique_id=plan.technique.technique_id,
        workspace_id=options.workspace_id,
        parallel=min(options.parallel, rows),
        patience_seconds=options.patience,
        notify=lambda text: print(text, file=sys.stderr),
    )
    unwritten: str | None = None
    try:
        _run_with_progress(options, runner, make_jobs(table.rows(), plan), receiver, rows=rows)
        interruption.hold()
    except KeyboardInterrupt:
        pass  # every row has an outcome
    finally:
        interruption.hold()
        unwritten = _write(options.results, outcomes, table.separator)
    interruption.release()
    summary = summarize(outcomes)
    print_report(
        outcomes,
        summary,
        options.results,
        batch=plan.batch,
        as_json=options.json,
        stopped=_describe_end(runner.halt, interruption),
        unwritten=unwritten,
    )
    if unwritten is not None and not options.json:
        print_results(outcomes, separator=table.separator)
    if interruption.exit_code is not None:
        raise typer.Exit(interruption.exit_code)
    if not summary.ok or unwritten is not None:
        raise typer.Exit(FAILED)


def _write(path: Path, outcomes: Spool, separator: str) -> str | None:
    """Write the results; return why they cannot be written, which is printed as well."""
    try:
        write_results(path, outcomes, separator=separator)
    except OSError as error:
        reason = error.strerror or str(error)
        print(f"Error: {path} cannot be written: {reason}", file=sys.stderr)
        return reason
    return None


def _run_with_progress(
    options: Options, runner: Runner, jobs: Jobs, receiver: ReceiverClient, *, rows: int
) -> None:
    """Run all jobs, then wait for their final costs, with a progress bar on a terminal."""
    with _progress_bar(rows) as (bar, task):
        runner.run(jobs, lambda now: bar.update(task, completed=now.done, text=_format_progress(now)))
        if runner.halt is None or runner.halt.code != "unreachable":
            runner.read_final_costs(
                receiver,
                seconds=options.cost_wait,
                watch=lambda left: bar.update(task, text=f"waiting for {left} final costs"),
            )


def _format_progress(now: Progress) -> str:
    failed = f", {now.failed} failed" if now.failed else ""
    cost = format_dollars(now.cost)
    return f"{now.succeeded} stored{failed}, {now.active} in progress, {cost}"


def _describe_end(halt: Halt | None, interruption: Interruption) -> str | None:
    """Return why a batch ended early, and what to do."""
    if halt is None:
        if interruption.exit_code is None:
            return None
        return "Interrupted. All rows are over; run the same command again for costs that are not final."
    again = "run the same command again: it resumes the batch and starts no row twice."
    on = "Runs that were started continue at FLORA"
    match halt.code:
        case "interrupted":
            return f"Interrupted. {on} and in the service. To follow them, {again}"
        case "insufficient_credits":
            return f"Stopped: FLORA has no credits left ({halt.message}). Top up, then {again}"
        case "unreachable":
            return f"Stopped: {halt.message}. {on}. Once the service is back, {again}"
        case _:
            reason = f"every further row would be refused too ({halt.code}: {halt.message})"
            return f"Stopped: {reason}. Once that is fixed, {again}"


@contextmanager
def _progress_bar(rows: int) -> Iterator[tuple[ProgressBar, TaskID]]:
    console = Console(stderr=True)
    text = TextColumn("{task.fields[text]}")
    columns = (BarColumn(), MofNCompleteColumn(), text, TimeElapsedColumn())
    disable = not console.is_terminal
    with ProgressBar(*columns, console=console, disable=disable, transient=True) as bar:
        yield bar, bar.add_task("batch", total=rows, text="")
