"""The picture of the README: `python -m tests.docs.picture` draws it from a real run of the demo.

The picture stays while its text has the shape of what the demo prints. Times, ids, sizes and ports
differ with every run, and a file that changes with every run cannot be reviewed.
"""

import html
import io
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.terminal_theme import DIMMED_MONOKAI
from rich.text import Text

from tests.docs.source_parts import ROOT

PICTURE = ROOT / "receiver/docs/demo.svg"
COMMAND = "make demo"
COLUMNS = 80
_CHARACTER_WIDTH = 12.2  # of a picture by rich, in its own units
_TOKEN = re.compile(
    r"\x1b\[(?P<count>\d*)(?P<code>[A-Zhl])|\x1b\[\?25[hl]|(?P<text>[^\x1b\r\n]|\x1b\[[\d;]*m)|\r|\n"
)


def run_demo() -> list[str]:
    """Run the demo as `make demo` does and return its lines, colours included."""
    program = Path(sys.executable).with_name("flora-receiver")
    terminal = {"FORCE_COLOR": "1", "TERM": "xterm-256color", "COLUMNS": str(COLUMNS)}
    with tempfile.TemporaryDirectory() as directory:
        done = subprocess.run(
            [program, "demo"], cwd=directory, env=os.environ | terminal, capture_output=True, check=True
        )
    return render_screen(done.stdout.decode())


def render_screen(output: str) -> list[str]:
    """Return the lines that stay on a terminal; the table drawn during the demo is erased."""
    lines, row = [""], 0
    for token in _TOKEN.finditer(output):
        if token["text"]:
            lines[row] += token["text"]
        elif token["code"] == "A":
            row = max(0, row - int(token["count"] or 1))
        elif token["code"] == "K":
            lines[row] = ""
        elif token[0] == "\n":
            row += 1
            lines += [""] * (row - len(lines) + 1)
    return [line.rstrip() for line in lines[: row + 1]]


def draw(lines: list[str]) -> str:
    """Return a terminal with these lines as SVG."""
    console = Console(record=True, width=COLUMNS, file=io.StringIO(), legacy_windows=False)
    console.print(Text(f"$ {COMMAND}", "bold"))
    for line in lines:
        console.print(Text.from_ansi(line), soft_wrap=True)
    drawn = console.export_svg(title=COMMAND, theme=DIMMED_MONOKAI, unique_id="demo")
    # A viewer's own monospaced font will do: no font is fetched from elsewhere.
    drawn = re.sub(r" *@font-face \{.*?\}\n", "", drawn, flags=re.DOTALL)
    return re.sub(r"[ \t]+$", "", drawn, flags=re.MULTILINE)


def read_lines(picture: str) -> list[str]:
    """Return the lines of text in a picture, its title not among them."""
    rows: dict[float, str] = {}
    pattern = r'<text class="demo-r\d+" x="([\d.]+)" y="([\d.]+)"[^>]*clip-path[^>]*>([^<]*)</text>'
    for x, y, text in re.findall(pattern, picture):
        column = round(float(x) / _CHARACTER_WIDTH)
        rows[float(y)] = rows.get(float(y), "").ljust(column) + html.unescape(text).replace("\xa0", " ")
    return [rows[y].rstrip() for y in sorted(rows)]


def normalise(lines: list[str]) -> list[str]:
    """Return lines without ids, numbers and the blanks that align them."""
    plain = (Text.from_ansi(line).plain for line in lines)
    shapes = (re.sub(r"\d+", "0", re.sub(r"run_[0-9a-f]+", "run_ID", line)) for line in plain)
    return [" ".join(line.split()) for line in shapes if line.strip()]


def main() -> None:
    lines = run_demo()
    if not PICTURE.exists() or normalise(read_lines(PICTURE.read_text("utf-8"))) != normalise(
        [f"$ {COMMAND}", *lines]
    ):
        PICTURE.write_text(draw(lines), "utf-8")
        sys.stdout.write(f"{PICTURE.relative_to(ROOT)} was stale and has been drawn anew.\n")


if __name__ == "__main__":
    main()
