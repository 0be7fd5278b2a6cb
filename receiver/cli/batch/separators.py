"""The separator of a CSV file: what an option or a line `sep=;` says, else what its first rows tell.

Pure. Spreadsheets in many countries write `;`, because `,` is their decimal point.
"""

import csv
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice

from receiver.errors import TableError

SEPARATORS = (",", ";", "\t", "|")
"""Those that are recognized; of two that fit alike, the first is meant."""
_MAX_ROWS = 50
"""Rows that are read for each separator."""
_NAMES = {"tab": "\t", "\\t": "\t", "comma": ",", "semicolon": ";", "pipe": "|"}


def parse_separator(text: str) -> str:
    """Return the separator that an option names: a character, or `tab`. Raises TableError."""
    separator = _NAMES.get(text.lower(), text)
    if len(separator) != 1 or separator in '"\r\n\0' or not separator.isascii() or separator.isalnum():
        raise TableError(f"--separator {text!r} is no separator: give one character, such as ';', or tab")
    return separator


def parse_separator_line(line: str) -> str | None:
    """Return the separator that Excel's line `sep=;` declares; None if the line is another one."""
    text = line.rstrip("\r\n")
    text = text[1:-1] if text.startswith('"') and text.endswith('"') else text
    return text[4] if len(text) == 5 and text[:4].lower() == "sep=" else None


def detect_separator(lines: Sequence[str]) -> str:
    """Return the separator by which the first rows have as many fields as the header.

    `lines` are the first lines of the file, none of them cut off. A separator inside quotes counts
    as text, and of two that fit alike the one that is not followed by spaces is meant: `Hello, all`
    is text. A file that no separator divides has one column, and its separator is a comma.
    """
    fits = [fit for fit in (_judge(lines, separator) for separator in SEPARATORS) if fit is not None]
    if not fits:
        return SEPARATORS[0]
    return max(fits, key=lambda fit: (fit.matching, -fit.loose, fit.columns)).separator


@dataclass(frozen=True, slots=True)
class _Fit:
    """How well a separator divides the rows.

    `matching` is the share of rows with the header's number of fields, `loose` the share of
    separators that a space follows.
    """

    separator: str
    matching: float
    loose: float
    columns: int


def _judge(lines: Iterable[str], separator: str) -> _Fit | None:
    """Return the fit of a separator, or None if it does not divide the header."""
    reader = csv.reader(iter(lines), delimiter=separator, strict=True)
    rows = [fields for fields in islice(_read(reader), _MAX_ROWS) if fields is None or _has_text(fields)]
    if not rows or rows[0] is None or len(rows[0]) < 2:
        return None
    columns = len(rows[0])
    matching = sum(fields is not None and _has_width(fields, columns) for fields in rows)
    later = [field for fields in rows if fields is not None for field in fields[1:]]
    return _Fit(
        separator, matching / len(rows), sum(field.startswith(" ") for field in later) / len(later), columns
    )


def _read(reader: Iterable[list[str]]) -> Iterable[list[str] | None]:
    """Yield the rows of a reader, None for one that cannot be read."""
    rows = iter(reader)
    while True:
        try:
            yield next(rows)
        except StopIteration:
            return
        except csv.Error:
            yield None


def _has_text(fields: Sequence[str]) -> bool:
    return any(field.strip() for field in fields)


def _has_width(fields: Sequence[str], columns: int) -> bool:
    """Return whether a row has a field for each column, and more only if they are empty."""
    return len(fields) >= columns and not _has_text(fields[columns:])
