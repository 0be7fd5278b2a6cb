"""What a batch shows at its end: a table of rows, or of counts and failures where there are many."""

import sys
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from urllib.parse import unquote, urlsplit

from rich.console import Console
from rich.table import Table
from rich.text import Text

from receiver.cli.batch.results import COLUMNS, Outcome, Spool, Summary
from receiver.cli.output import print_result

_ROWS = 30
"""A longer result is shown as counts, and its failures one by one."""


def report(
    outcomes: Spool, summary: Summary, results: Path, *, batch: str, as_json: bool, halt: str | None = None
) -> None:
    """Print the end of a batch; as JSON with every row."""
    if as_json:
        rows = [{"row": each.row, **{name: getattr(each, name) for name in COLUMNS}} for each in outcomes]
        data = {
            "ok": summary.ok,
            "batch": batch,
            "rows": summary.rows,
            "succeeded": summary.succeeded,
            "states": summary.states,
            "cost": summary.cost,
            "cost_unknown": summary.cost_unknown,
            "stopped": halt,
            "results": str(results),
            "outcomes": rows,
        }
        print_result(data, "", as_json=True)
        return
    console = Console()
    failures = (outcome for outcome in outcomes if not outcome.ok and outcome.state != "not_started")
    shown: Iterable[Outcome] = outcomes if summary.rows <= _ROWS else failures
    table = _table(islice(shown, _ROWS))
    if table.row_count:
        console.print(table)
    failed = summary.rows - summary.succeeded - summary.states.get("not_started", 0)
    if summary.rows > _ROWS and failed > _ROWS:
        console.print(f"… and {failed - _ROWS} more rows that did not succeed.")
    print(f"{summary.succeeded} of {summary.rows} rows completed and stored: {_counted(summary)}.")
    print(f"Cost: {dollars(summary.cost)}{_unknown(summary)}. Results: {results}")
    if halt is not None:
        sys.stdout.flush()
        print(halt, file=sys.stderr)


def _table(outcomes: Iterable[Outcome]) -> Table:
    table = Table(box=None, pad_edge=False)
    for column in ("key", "run", "state", "cost", "files"):
        table.add_column(column, justify="right" if column == "cost" else "left", overflow="fold")
    for outcome in outcomes:
        why = " ".join(part for part in (outcome.error_code, outcome.error_message) if part)
        table.add_row(
            Text(outcome.key),
            outcome.run_id or "",
            outcome.state,
            "" if outcome.cost is None else dollars(outcome.cost),
            Text(why or " ".join(_file(each) for each in outcome.files)),
        )
    return table


def _file(location: str) -> str:
    parts = urlsplit(location)
    if parts.scheme != "file":
        return location
    path = Path(unquote(parts.path))
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def _counted(summary: Summary) -> str:
    return ", ".join(f"{count} {state}" for state, count in sorted(summary.states.items())) or "none"


def _unknown(summary: Summary) -> str:
    return f" ({summary.cost_unknown} runs' final cost is not known yet)" if summary.cost_unknown else ""


def dollars(amount: float) -> str:
    """Return an amount in USD, with as many digits as small prices need."""
    return f"${amount:,.2f}" if round(amount, 2) == round(amount, 6) else f"${amount:,.4f}"
