"""Output of commands: results as text or JSON, errors with advice, exit codes."""

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from http import HTTPStatus
from typing import Any, TextIO

import typer

from receiver.cli.streams import is_unicode
from receiver.errors import ConfigError, ReceiverApiError, ReceiverError, StoreUnavailableError
from receiver.net.scrubber import mask, mask_all

FAILED = 1
"""Exit code: the command was carried out and failed."""
USAGE_ERROR = 2
"""Exit code: the settings or options are wrong; nothing was done."""
_KIB = 1024


def print_result(data: Any, text: str, *, as_json: bool) -> None:
    """Print `data` as JSON, or `text`."""
    print(to_json(data, sys.stdout, indent=2) if as_json else text)


def to_json(data: Any, stream: TextIO, *, indent: int | None = None) -> str:
    """Return `data` as JSON for a stream: with escapes where its encoding lacks characters."""
    return json.dumps(data, indent=indent, default=str, ensure_ascii=not is_unicode(stream))


def print_findings(data: Any, text: str, *, as_json: bool) -> None:
    """Print what a command found out about the set-up, with keys, secrets and passwords masked."""
    print_result(mask_all(data), mask(text), as_json=as_json)


def print_error(data: Mapping[str, Any], text: str, *, as_json: bool) -> None:
    """Print `data` as JSON on standard output, or `text` on standard error; both are masked."""
    if as_json:
        print(to_json(mask_all(data), sys.stdout, indent=2))
    else:
        print(mask(text), file=sys.stderr)


@contextmanager
def report_errors(*, as_json: bool = False) -> Iterator[None]:
    """Print a ReceiverError of the block with advice, and exit with its code."""
    try:
        yield
    except ConfigError as error:
        problems = [{"path": each.path, "message": each.message} for each in error.problems]
        lines = [f"  {each.path}: {each.message}" for each in error.problems]
        text = "\n".join(["The settings cannot be used:", *lines])
        print_error({"error": "config", "problems": problems}, text, as_json=as_json)
        raise typer.Exit(USAGE_ERROR) from error
    except ReceiverApiError as error:
        fields = [{"field": field, "message": message} for field, message in error.fields]
        lines = [f"Error: {error}", *(f"  {field}: {message}" for field, message in error.fields)]
        if error.request_id:
            lines.append(f"  FLORA's request-id: {error.request_id}")
        if error.idempotency_key and (
            error.status is None or error.status >= HTTPStatus.INTERNAL_SERVER_ERROR
        ):
            lines.append(
                "  A run may have been started. This key repeats the command without a second one:"
            )
            lines.append(f"    --idempotency-key {error.idempotency_key}")
        data = {
            "error": error.code,
            "message": str(error),
            "fields": fields,
            "request_id": error.request_id,
            "idempotency_key": error.idempotency_key,
        }
        print_error(data, "\n".join(lines), as_json=as_json)
        raise typer.Exit(FAILED) from error
    except ReceiverError as error:
        kind = type(error).__name__.removesuffix("Error").lower()
        advice = ""
        if isinstance(error, StoreUnavailableError):
            advice = "\nCheck [database] url (RECEIVER_DATABASE__URL), its file and its directory."
        data = {"error": kind, "message": str(error)}
        print_error(data, f"Error: {error}{advice}", as_json=as_json)
        raise typer.Exit(FAILED) from error


def format_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table in plain text, with columns as wide as their longest cell."""
    table = (head, *rows)
    widths = [max(len(row[column]) for row in table) for column in range(len(head))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in table
    )


def format_size(size: int) -> str:
    """Return a number of bytes in B, KiB, MiB or GiB."""
    if size < _KIB:
        return f"{size} B"
    amount, unit = size / _KIB, "KiB"
    for larger in ("MiB", "GiB"):
        if amount >= _KIB:
            amount, unit = amount / _KIB, larger
    return f"{amount:.1f} {unit}"
