"""How commands speak: results on standard output (text or JSON), troubles on standard error, exit codes."""

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import typer

from receiver.errors import ConfigError, ReceiverApiError, ReceiverError, StoreUnavailableError

FAILED = 1
"""Exit code: it was tried and did not work."""
USAGE_ERROR = 2
"""Exit code: the settings or options cannot be used."""


_ADVICE: Mapping[type[ReceiverError], str] = {
    StoreUnavailableError: "\nLook at [database] url (RECEIVER_DATABASE__URL), its file and its directory."
}


def print_result(data: Any, text: str, *, as_json: bool) -> None:
    """Print a result, in the form that was asked for."""
    print(json.dumps(data, indent=2, default=str, ensure_ascii=False) if as_json else text)


@contextmanager
def report_errors(*, as_json: bool = False) -> Iterator[None]:
    """Turn our own errors into a message that says what to do, and an exit code; never a traceback."""
    try:
        yield
    except ConfigError as error:
        problems = [{"path": problem.path, "message": problem.message} for problem in error.problems]
        lines = [f"  {problem['path']}: {problem['message']}" for problem in problems]
        print_error(
            {"error": "config", "problems": problems},
            "The settings cannot be used:\n" + "\n".join(lines),
            as_json=as_json,
        )
        raise typer.Exit(USAGE_ERROR) from error
    except ReceiverError as error:
        kind = type(error).__name__.removesuffix("Error").lower()
        advice = _ADVICE.get(type(error), "")
        data: dict[str, Any] = {"error": kind, "message": str(error)}
        if isinstance(error, ReceiverApiError):
            fields = [{"field": field, "message": message} for field, message in error.fields]
            data = {**data, "error": error.code, "fields": fields, "request_id": error.request_id}
            advice = "".join(f"\n  {row['field']}: {row['message']}" for row in fields)
            advice += f"\n  FLORA's request-id: {error.request_id}" if error.request_id else ""
        print_error(data, f"Error: {error}{advice}", as_json=as_json)
        raise typer.Exit(FAILED) from error


def print_error(data: Mapping[str, Any], text: str, *, as_json: bool) -> None:
    """Print a trouble: as JSON where JSON was asked for, else on standard error."""
    if as_json:
        print(json.dumps(data, indent=2, ensure_ascii=False))
    else:
        print(text, file=sys.stderr)


def format_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table of plain text."""
    widths = [max(len(row[place]) for row in (head, *rows)) for place in range(len(head))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in (head, *rows)
    )
