"""The rows of a CSV or JSON Lines file, read one at a time, so that memory does not grow with it.

A row that cannot be read becomes a `RowProblem`; a file that is not a table raises TableError.
"""

import csv
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from io import TextIOWrapper
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from receiver.cli.batch.separators import detect_separator, parse_separator_line
from receiver.errors import TableError
from receiver.model import parse_strict_json, storable_text

_LONGEST_LINE = 1024 * 1024
"""Characters; a file with a longer line is not a table, and reading it would fill the memory."""
_SUFFIXES = {".csv": "csv", ".tsv": "csv", ".jsonl": "jsonl", ".ndjson": "jsonl"}
_BOM = "\ufeff"
_PEEK = 4096
_MAX_SAMPLE = 256 * 1024
"""Characters by which the separator is detected."""
_FOREIGN = {
    b"PK\x03\x04": "is a spreadsheet or another zip file: export it as CSV, UTF-8",
    b"\xff\xfe": "is UTF-16: save it as UTF-8",
    b"\xfe\xff": "is UTF-16: save it as UTF-8",
}


@dataclass(frozen=True, slots=True)
class Row:
    """One row; `number` as in a spreadsheet (the header is 1), or the line in JSON Lines."""

    number: int
    values: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class RowProblem:
    """An error in a row; in the file or the options as a whole if `row` is None."""

    row: int | None
    column: str | None
    message: str

    def __str__(self) -> str:
        where = [f"row {self.row}"] if self.row is not None else []
        where += [f"column {self.column!r}"] if self.column is not None else []
        return f"{', '.join(where)}: {self.message}" if where else self.message


class Source:
    """The bytes of a table, which can be read several times, by one reader at a time."""

    def __init__(self, name: str, path: Path | None = None, spool: BinaryIO | None = None) -> None:
        self.name = name
        self.has_name = path is not None
        """Whether a batch can be named after it."""
        self._path = path
        self._spool = spool

    @contextmanager
    def open(self) -> Iterator[BinaryIO]:
        if self._path is not None:
            try:
                file = self._path.open("rb")
            except OSError as error:
                raise TableError(f"{self.name} cannot be read: {error.strerror}") from error
            with file:
                yield file
        elif self._spool is not None:
            self._spool.seek(0)
            yield self._spool


@contextmanager
def open_source(path: Path, stdin: BinaryIO) -> Iterator[Source]:
    """Yield the table at `path`, or from `stdin` for `-`.

    A source that can be read only once, such as a pipe, is copied to a temporary file first.
    """
    if path.is_file():
        yield Source(path.name, path)
        return
    if str(path) != "-" and not path.exists():
        raise TableError(f"there is no file {path}")
    if path.is_dir():
        raise TableError(f"{path} is a directory")
    name = "standard input" if str(path) == "-" else path.name
    with ExitStack() as stack:
        try:
            spool = stack.enter_context(tempfile.TemporaryFile(prefix="flora-receiver-batch-"))
            shutil.copyfileobj(stdin if str(path) == "-" else stack.enter_context(path.open("rb")), spool)
            spool.flush()
        except OSError as error:
            raise TableError(
                f"{name} cannot be copied to a temporary file: {error.strerror or error}"
            ) from error
        yield Source(name, spool=spool)


class Table:
    """The rows of a source; `columns` is None for JSON Lines, where each row has its own."""

    def __init__(self, source: Source, *, separator: str | None = None) -> None:
        """Detect the format; `separator` overrides what the file tells.

        Raises TableError if the source cannot be a table.
        """
        self._source = source
        with source.open() as file:
            head = file.read(_PEEK)
        for mark, reason in _FOREIGN.items():
            if head.startswith(mark):
                raise TableError(f"{source.name} {reason}")
        suffix = Path(source.name).suffix.lower()
        self._format = _SUFFIXES.get(suffix) or _detect_format(source.name, head)
        self.separator = separator or ","
        """Of a CSV file; a comma for JSON Lines."""
        self.columns: tuple[str, ...] | None = None
        if self._format == "csv":
            if separator is None:
                self.separator = self._find_separator()
            self.columns = self._read_header()

    def rows(self) -> Iterator[Row | RowProblem]:
        """Yield the rows from the start, without empty ones. Raises TableError."""
        with self._open_text() as file:
            yield from self._read_csv(file) if self._format == "csv" else _read_json_lines(file)

    @contextmanager
    def _open_text(self) -> Iterator[TextIO]:
        with self._source.open() as file:
            # Bytes that are not UTF-8 become lone surrogates, so that their row can be reported.
            text = TextIOWrapper(file, encoding="utf-8", errors="surrogateescape", newline="")
            try:
                yield text
            finally:
                text.detach()

    def _read_header(self) -> tuple[str, ...]:
        source = self._source.name
        with self._open_text() as file:
            try:
                names = [name.strip() for name in next(self._reader(file), [])]
            except csv.Error as error:
                raise TableError(f"{source}: the header cannot be read: {error}") from error
        if not any(names):
            raise TableError(f"{source} is empty: its first row must name the columns")
        if twice := sorted({name for name in names if name and names.count(name) > 1}):
            raise TableError(f"{source} has two columns {', '.join(map(repr, twice))}: rename one")
        if broken := [name for name in names if not _is_storable(name)]:
            raise TableError(f"{source} is not UTF-8 in its header: {broken[0]!r}")
        return tuple(names)

    def _find_separator(self) -> str:
        """Return the separator that the file declares, else the one that its first rows tell."""
        lines: list[str] = []
        length = 0
        with self._open_text() as file:
            for line in _read_lines(file):
                if not lines and (declared := parse_separator_line(line)) is not None:
                    return declared
                length += len(line)
                if length > _MAX_SAMPLE and lines:
                    break
                lines.append(line)
        return detect_separator(lines)

    def _reader(self, file: TextIO) -> Iterator[list[str]]:
        lines = _read_lines(file)
        first = next(lines, "")
        if parse_separator_line(first) is None:  # a line that a spreadsheet does not show
            lines = chain([first], lines)
        return iter(csv.reader(lines, delimiter=self.separator, strict=True))

    def _read_csv(self, file: TextIO) -> Iterator[Row | RowProblem]:
        columns = self.columns or ()
        reader = self._reader(file)
        number = 0
        while True:
            number += 1
            try:
                fields = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                yield RowProblem(number, None, f"cannot be read: {error}")
                continue
            if number > 1 and any(field.strip() for field in fields):
                yield _to_row(number, columns, fields)


def _to_row(number: int, columns: tuple[str, ...], fields: list[str]) -> Row | RowProblem:
    if len(fields) > len(columns) and any(field.strip() for field in fields[len(columns) :]):
        counts = f"has {len(fields)} fields, the header has {len(columns)}"
        return RowProblem(number, None, f"{counts}: quote fields that contain separators")
    values = {name: field for name, field in zip(columns, fields, strict=False) if name}
    for name, field in values.items():
        if not _is_storable(field):
            return RowProblem(number, name, "is not UTF-8 text")
    return Row(number, values)


def _read_json_lines(file: TextIO) -> Iterator[Row | RowProblem]:
    for number, line in enumerate(_read_lines(file), 1):
        if not line.strip():
            continue
        if not _is_storable(line):
            yield RowProblem(number, None, "is not UTF-8 text")
            continue
        try:
            values = parse_strict_json(line)
        except (ValueError, RecursionError) as error:
            yield RowProblem(number, None, f"is not JSON: {error}")
            continue
        if not isinstance(values, dict):
            yield RowProblem(number, None, "is not a JSON object: each line must be one")
        elif not all(_is_storable(text) for text in _walk_texts(values)):
            yield RowProblem(number, None, "has text that cannot be stored: NUL or a lone surrogate")
        else:
            yield Row(number, values)


def _read_lines(file: TextIO) -> Iterator[str]:
    first = True
    while line := file.readline(_LONGEST_LINE):
        if len(line) >= _LONGEST_LINE:
            raise TableError(f"a line is longer than {_LONGEST_LINE} characters: this is not a table")
        yield line.removeprefix(_BOM) if first else line
        first = False


def _detect_format(name: str, head: bytes) -> str:
    start = head.removeprefix(_BOM.encode()).lstrip()
    if start.startswith(b"["):
        advice = "make it JSON Lines, one object per line (jq -c '.[]')"
        raise TableError(f"{name} is a JSON array: {advice}")
    return "jsonl" if start.startswith(b"{") else "csv"


def _walk_texts(value: Any) -> Iterator[str]:
    """Yield every text inside a JSON value, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for each in value:
            yield from _walk_texts(each)
    elif isinstance(value, dict):
        for key, each in value.items():
            yield key
            yield from _walk_texts(each)


def _is_storable(text: str) -> bool:
    return storable_text(text) == text
