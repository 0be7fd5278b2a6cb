"""The summary that a batch prints at its end."""

import shlex
import sys
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from urllib.parse import unquote, urlsplit

from rich.console import Console
from rich.table import Table
from rich.text import Text

from receiver.cli.batch.results import COLUMNS, NOT_STARTED, UNKNOWN, Outcome, Spool, Summary
from receiver.cli.output import print_result

_MAX_ROWS = 30
"""Rows in the table; of a longer batch it shows only rows that did not succeed."""


def print_report(
    outcomes: Spool,
    summary: Summary,
    results: Path,
    *,
    batch: str,
    as_json: bool,
    stopped: str | None = None,
    unwritten: str | None = None,
) -> None:
    """Print the outcomes and their summary; as JSON with every row.

    `unwritten` is why the file with the results could not be written, if it could not.
    """
    if as_json:
        written = results if unwritten is None else None
        _print_json(outcomes, summary, written, batch=batch, stopped=stopped, unwritten=unwritten)
        return
    console = Console()
    failures = (each for each in outcomes if not each.succeeded and each.state != NOT_STARTED)
    shown: Iterable[Outcome] = outcomes if summary.rows <= _MAX_ROWS else failures
    table = _table(islice(shown, _MAX_ROWS))
    if table.row_count:
        console.print(table)
    failed = summary.rows - summary.succeeded - summary.states.get(NOT_STARTED, 0)
    if summary.rows > _MAX_ROWS and failed > _MAX_ROWS:
        console.print(f"… and {failed - _MAX_ROWS} more rows that did not succeed.")
    counts = ", ".join(f"{count} {state}" for state, count in sorted(summary.states.items()))
    unknown = ""
    if summary.cost_unknown:
        unknown = f" ({summary.cost_unknown} runs have no final cost yet)"
    print(f"{summary.succeeded} of {summary.rows} rows completed and stored: {counts or 'none'}.")
    where = (
        f"Results: {results}"
        if unwritten is None
        else f"The results could not be written ({unwritten}); they are:"
    )
    print(f"Cost: {format_dollars(summary.cost)}{unknown}. {where}")
    sys.stdout.flush()
    for text in (_advise_on_unknown(outcomes, summary, batch), stopped):
        if text is not None:
            print(text, file=sys.stderr)


def _print_json(
    outcomes: Spool,
    summary: Summary,
    results: Path | None,
    *,
    batch: str,
    stopped: str | None,
    unwritten: str | None,
) -> None:
    rows = [{"row": each.row, **{name: getattr(each, name) for name in COLUMNS}} for each in outcomes]
    data = {
        "ok": summary.ok and unwritten is None,
        "batch": batch,
        "rows": summary.rows,
        "succeeded": summary.succeeded,
        "states": summary.states,
        "cost": summary.cost,
        "cost_unknown": summary.cost_unknown,
        "stopped": stopped,
        "advice": _advise_on_unknown(outcomes, summary, batch),
        "results": None if results is None else str(results),
        "results_error": unwritten,
        "outcomes": rows,
    }
    print_result(data, "", as_json=True)


def _advise_on_unknown(outcomes: Spool, summary: Summary, batch: str) -> str | None:
    """Return what to do about rows of which FLORA may have a run that cannot be identified."""
    count = summary.states.get(UNKNOWN, 0)
    if not count:
        return None
    first = next(outcome for outcome in outcomes if outcome.state == UNKNOWN)
    start = shlex.quote(f"batch:{batch}:{first.key}")
    rows = "1 row is" if count == 1 else f"{count} rows are"
    return (
        f"{rows} unknown: FLORA may have a run, and it is not known which. Look it up in FLORA or in "
        f"`flora-receiver runs list`, then name it:\n"
        f"  flora-receiver runs resolve {start} --run-id run_…\n"
        f"or, if there is none, with --no-run; then run the same command again. Another --batch name "
        f"starts every row anew, and is billed again."
    )


def _table(outcomes: Iterable[Outcome]) -> Table:
    table = Table(box=None, pad_edge=False)
    for column in ("key", "run", "state", "cost", "files"):
        table.add_column(column, justify="right" if column == "cost" else "left", overflow="fold")
    for outcome in outcomes:
        error = " ".join(part for part in (outcome.error_code, outcome.error_message) if part)
        table.add_row(
            Text(outcome.key),
            outcome.run_id or "",
            outcome.state,
            "" if outcome.cost is None else format_dollars(outcome.cost),
            Text(error or " ".join(_format_location(each) for each in outcome.files)),
        )
    return table


def _format_location(location: str) -> str:
    parts = urlsplit(location)
    if parts.scheme != "file":
        return location
    path = Path(unquote(parts.path))
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def format_dollars(amount: float) -> str:
    """Return an amount in USD, with four decimals if two would round it."""
    digits = 2 if round(amount, 2) == round(amount, 6) else 4
    return f"${amount:,.{digits}f}"
