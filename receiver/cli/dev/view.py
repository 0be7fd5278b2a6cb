"""The output of `dev`: a line for each event and, on a terminal, a status line below them."""

import sys
from datetime import datetime
from typing import Any, Self, TextIO

from rich.console import Console
from rich.live import Live
from rich.text import Text

from receiver.cli.output import to_json

__all__ = ["View"]

_COLOURS = {
    "accepted": "green",
    "matched": "green",
    "completed": "green",
    "open": "green",
    "duplicate": "cyan",
    "ignored": "cyan",
    "recovered": "yellow",
    "late": "yellow",
    "moved": "yellow",
    "failed": "red",
    "lost": "red",
    "diverged": "red",
    "dead": "red",
    "refused": "red",
    "TUNNEL:": "bold red",
    "RECEIVER:": "bold red",
    "FLORA:": "bold red",
}


class View:
    """Prints text lines, coloured on a terminal, or JSON lines for programs."""

    def __init__(self, *, as_json: bool, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stdout
        self._json = as_json
        terminal = self._stream.isatty() and not as_json
        self._console = Console(file=self._stream, highlight=False) if terminal else None
        self._live = Live(Text(), console=self._console, refresh_per_second=4) if self._console else None

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.update(Text())
            self._live.stop()

    def show(self, kind: str, text: str, **data: Any) -> None:
        """Print one event: `text` for people, or `data` as JSON."""
        at = datetime.now().astimezone()
        if self._json:
            document = {"at": at.isoformat(timespec="milliseconds"), "kind": kind, **data}
            print(to_json(document, self._stream), file=self._stream, flush=True)
            return
        line = f"{at:%H:%M:%S}  {kind:<8}  {text}"
        if self._console is None:
            print(line, file=self._stream, flush=True)
            return
        styled = Text(line)
        for word, colour in _COLOURS.items():
            styled.highlight_regex(rf"\b{word}(?!\w)", colour)
        self._console.print(styled, soft_wrap=True)

    def show_status(self, text: str, *, is_healthy: bool) -> None:
        """Replace the status line; without a terminal there is none."""
        if self._live is not None:
            self._live.update(Text.assemble(("● ", "green" if is_healthy else "red"), text))
