"""What `dev` shows: a line for each thing that happens, and on a terminal, below them, how the way stands right now."""

import json
import sys
from datetime import datetime
from typing import Any, Self, TextIO

from rich.console import Console
from rich.live import Live
from rich.text import Text

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
    """Lines for people, JSON lines for programs; with rich's help where standard output is a terminal."""

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

    def tell(self, kind: str, text: str, **data: Any) -> None:
        """Show that something happened: `text` to people, `data` to programs."""
        at = datetime.now().astimezone()
        if self._json:
            document = {"at": at.isoformat(timespec="milliseconds"), "kind": kind, **data}
            print(json.dumps(document, default=str, ensure_ascii=False), file=self._stream, flush=True)
            return
        line = f"{at:%H:%M:%S}  {kind:<8}  {text}"
        if self._console is None:
            print(line, file=self._stream, flush=True)
            return
        styled = Text(line)
        for word, colour in _COLOURS.items():
            styled.highlight_regex(rf"\b{word}(?!\w)", colour)
        self._console.print(styled, soft_wrap=True)

    def status(self, text: str, *, fine: bool) -> None:
        """Show how things stand, on a terminal."""
        if self._live is not None:
            self._live.update(Text.assemble(("● ", "green" if fine else "red"), text))
