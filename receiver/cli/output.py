"""How commands speak: results on standard output (text or JSON), troubles on standard error, exit codes."""

import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import typer

from receiver.errors import ConfigError, ReceiverError

WRONG = 1
"""Exit code: it was tried and did not work."""
MISUSED = 2
"""Exit code: the settings or options cannot be used."""


def show(data: Any, text: str, *, as_json: bool) -> None:
    """Print a result, in the form that was asked for."""
    print(json.dumps(data, indent=2, default=str, ensure_ascii=False) if as_json else text)


@contextmanager
def explained(*, as_json: bool = False) -> Iterator[None]:
    """Turn our own errors into a message that says what to do, and an exit code; never a traceback."""
    try:
        yield
    except ConfigError as error:
        problems = [{"path": problem.path, "message": problem.message} for problem in error.problems]
        lines = [f"  {problem['path']}: {problem['message']}" for problem in problems]
        _fail({"error": "config", "problems": problems}, "The settings cannot be used:\n" + "\n".join(lines), as_json)
        raise typer.Exit(MISUSED) from error
    except ReceiverError as error:
        kind = type(error).__name__.removesuffix("Error").lower()
        _fail({"error": kind, "message": str(error)}, f"Error: {error}", as_json)
        raise typer.Exit(WRONG) from error


def _fail(data: Mapping[str, Any], text: str, as_json: bool) -> None:
    if as_json:
        print(json.dumps(data, indent=2, ensure_ascii=False))
    else:
        print(text, file=sys.stderr)
