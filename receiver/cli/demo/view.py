"""The demo on a terminal: a live table, the list of files at the end, and how to go on."""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from receiver.cli.demo.scenes import DemoRun
from receiver.cli.output import format_size

_COLOURS = {
    "matched": "green",
    "recovered": "yellow",
    "late": "yellow",
    "diverged": "red",
    "unsettled": "red",
}


def make_table(runs: Sequence[DemoRun]) -> Table:
    """Return the current state of the runs as a table that fits 80 columns."""
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0))
    for column in ("run", "state", "callback", "files", "size", "cost"):
        is_number = column in {"size", "cost"}
        table.add_column(column, justify="right" if is_number else "left", no_wrap=True)
    for each in runs:
        verdict = each.run.verdict.value if each.run and each.run.verdict else ""
        outputs = [file for file in each.files if file.name != "run.json"]
        table.add_row(
            each.scene.title,
            each.run.state.value if each.run else "",
            Text(verdict or "…", _COLOURS.get(verdict, "")),
            ", ".join(sorted({file.suffix.lstrip(".") for file in outputs})),
            format_size(each.size) if each.files else "",
            each.cost,
        )
    return table


def print_summary(runs: Sequence[DemoRun], console: Console, outputs: Path, seconds: float) -> None:
    """Print the runs with their files, and how many were settled."""
    for each in runs:
        result = each.run.error_code or each.run.state.value if each.run else "unknown"
        size = format_size(each.size) if each.files else ""
        verdict = (f"{each.verdict:<9}", _COLOURS.get(each.verdict, ""))
        line = Text.assemble(verdict, f"  {each.scene.title:<26}{result}")
        console.print(line, f"{size:>{max(0, 62 - line.cell_len)}}{each.cost:>7}")
        if each.files:
            names = " ".join(sorted(file.name for file in each.files))
            directory = escape(_to_relative(each.files[0].parent))
            console.print(f"  [dim]{directory}/[/dim]  {escape(names)}", soft_wrap=True)
    settled = sum(each.is_finished for each in runs)
    polled = sum(each.verdict == "recovered" for each in runs)
    counts = f"{settled} of {len(runs)} runs settled in {seconds:.0f} s"
    console.print(f"\n{counts}, {polled} of them by polling, without a callback.")
    if settled == len(runs):
        console.print(f"The files are in {outputs}/", soft_wrap=True, markup=False)
    else:
        console.print("The others did not settle in time. This machine may be busy; try again.")


def print_next_steps(
    console: Console, *, base_url: str, api_key: str, callback_url: str, ca: Path, outputs: Path
) -> None:
    """Print how to start another run with the emulator and the receiver that keep running."""
    body = (
        f'{{"mode": "async", "callback_url": "{callback_url}",\n'
        '       "inputs": [{"id": "prompt", "type": "text", "value": "a lighthouse"}]}'
    )
    console.print(
        "\nThe emulator and the receiver keep running until Ctrl-C. "
        f"Start another run; its output is stored in {outputs}/:\n\n"
        f"  curl {base_url}/techniques/emu-image/runs \\\n"
        f"    -H 'Authorization: Bearer {api_key}' -H 'Content-Type: application/json' \\\n"
        f"    -d '{body}'\n\n"
        f"The receiver's certificate is signed by the CA in {ca}",
        soft_wrap=True,
        markup=False,
    )


def _to_relative(file: Path) -> str:
    return str(file.relative_to(Path.cwd()) if file.is_relative_to(Path.cwd()) else file)
