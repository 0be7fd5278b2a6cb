"""Reading tables: CSV and JSON Lines as rows, one at a time, so that a file of any length needs no memory.

A row that cannot be read is a `RowProblem` in its place; a file that makes no sense raises TableError.
"""

import csv
import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from io import TextIOWrapper
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from receiver.errors import TableError
from receiver.model import storable_text

_LONGEST_LINE = 1024 * 1024
"""Characters; a longer one is not a table, and reading on would fill the memory."""
_SUFFIXES = {".csv": "csv", ".tsv": "csv", ".jsonl": "jsonl", ".ndjson": "jsonl"}
_BOM = "\ufeff"
_PEEK = 4096
_FOREIGN = {
    b"PK\x03\x04": "is a spreadsheet (or another zip file): export it as CSV, UTF-8",
    b"\xff\xfe": "is UTF-16: save it as UTF-8",
    b"\xfe\xff": "is UTF-16: save it as UTF-8",
}


@dataclass(frozen=True, slots=True)
class Row:
    """One row. `number` is the row in a spreadsheet (the header is 1), or the line of a JSON Lines file."""

    number: int
    values: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class RowProblem:
    """One thing wrong with a row; `row` None: with the file or the options as a whole."""

    row: int | None
    column: str | None
    message: str

    def __str__(self) -> str:
        where = [f"row {self.row}"] if self.row is not None else []
        where += [f"column {self.column!r}"] if self.column is not None else []
        return f"{', '.join(where)}: {self.message}" if where else self.message


class Source:
    """A table's bytes, to be read several times, one reader at a time."""

    def __init__(self, name: str, path: Path | None = None, spool: BinaryIO | None = None) -> None:
        self.name = name
        self.named = path is not None
        """Whether its name says what it holds."""
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
def source_of(path: Path, stdin: BinaryIO) -> Iterator[Source]:
    """Give the table at `path`; `-`, and anything else that can be read only once, is copied to a temporary file first."""
    if path.is_file():
        yield Source(path.name, path)
        return
    if str(path) != "-" and not path.exists():
        raise TableError(f"there is no file {path}")
    if path.is_dir():
        raise TableError(f"{path} is a directory")
    with tempfile.TemporaryFile(prefix="flora-receiver-batch-") as spool:
        if str(path) == "-":
            shutil.copyfileobj(stdin, spool)
        else:
            with path.open("rb") as once:
                shutil.copyfileobj(once, spool)
        yield Source("standard input" if str(path) == "-" else path.name, spool=spool)


class Table:
    """The rows of a source. `columns` are a CSV file's; None where each row has its own (JSON Lines)."""

    def __init__(self, source: Source) -> None:
        """Look at the beginning; TableError where it cannot be a table."""
        self._source = source
        with source.open() as file:
            head = file.read(_PEEK)
        for mark, reason in _FOREIGN.items():
            if head.startswith(mark):
                raise TableError(f"{source.name} {reason}")
        self._kind = _SUFFIXES.get(Path(source.name).suffix.lower()) or _kind_of(head.removeprefix(_BOM.encode()))
        self._dialect = ","
        self.columns: tuple[str, ...] | None = None
        if self._kind == "csv":
            self._dialect = _delimiter(head)
            self.columns = self._header()

    def rows(self) -> Iterator[Row | RowProblem]:
        """Read from the start; rows without any value are left out. Raises TableError where reading cannot go on."""
        with self._text() as file:
            yield from self._csv(file) if self._kind == "csv" else _json_lines(file)

    @contextmanager
    def _text(self) -> Iterator[TextIO]:
        with self._source.open() as file:
            # Bytes that are not UTF-8 become lone surrogates, so that the row with them can be named.
            text = TextIOWrapper(file, encoding="utf-8", errors="surrogateescape", newline="")
            try:
                yield text
            finally:
                text.detach()

    def _header(self) -> tuple[str, ...]:
        with self._text() as file:
            try:
                names = [name.strip() for name in next(self._reader(file), [])]
            except csv.Error as error:
                raise TableError(f"{self._source.name}: the header cannot be read: {error}") from error
        if not any(names):
            raise TableError(f"{self._source.name} is empty: its first row must name the columns")
        if twice := sorted({name for name in names if name and names.count(name) > 1}):
            raise TableError(f"{self._source.name} has two columns {', '.join(map(repr, twice))}: rename one")
        if broken := [name for name in names if not _is_storable(name)]:
            raise TableError(f"{self._source.name} is not UTF-8 in its header: {broken[0]!r}")
        return tuple(names)

    def _reader(self, file: TextIO) -> Iterator[list[str]]:
        return iter(csv.reader(_lines(file), delimiter=self._dialect, strict=True))

    def _csv(self, file: TextIO) -> Iterator[Row | RowProblem]:
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
                yield _row(number, columns, fields)


def _row(number: int, columns: tuple[str, ...], fields: list[str]) -> Row | RowProblem:
    if len(fields) > len(columns) and any(field.strip() for field in fields[len(columns) :]):
        return RowProblem(
            number,
            None,
            f"has {len(fields)} fields, the header has {len(columns)}: quote fields with separators in them",
        )
    values = {name: field for name, field in zip(columns, fields, strict=False) if name}
    for name, field in values.items():
        if not _is_storable(field):
            return RowProblem(number, name, "is not UTF-8 text")
    return Row(number, values)


def _json_lines(file: TextIO) -> Iterator[Row | RowProblem]:
    for number, line in enumerate(_lines(file), 1):
        if not line.strip():
            continue
        if not _is_storable(line):
            yield RowProblem(number, None, "is not UTF-8 text")
            continue
        try:
            values = json.loads(line, parse_constant=_no_constant)
        except (ValueError, RecursionError) as error:
            yield RowProblem(number, None, f"is not JSON: {error}")
            continue
        if not isinstance(values, dict):
            yield RowProblem(number, None, "is not a JSON object: each line must be one")
        elif not all(_is_storable(text) for text in _texts(values)):
            yield RowProblem(number, None, "holds text that cannot be stored: NUL, or a lone surrogate")
        else:
            yield Row(number, values)


def _lines(file: TextIO) -> Iterator[str]:
    first = True
    while line := file.readline(_LONGEST_LINE):
        if len(line) >= _LONGEST_LINE:
            raise TableError(f"a line is longer than {_LONGEST_LINE} characters: is this a table?")
        yield line.removeprefix(_BOM) if first else line
        first = False


def _kind_of(head: bytes) -> str:
    start = head.lstrip()
    if start.startswith(b"["):
        raise TableError("is a JSON array: make it JSON Lines, one object a line (jq -c '.[]')")
    return "jsonl" if start.startswith(b"{") else "csv"


def _delimiter(head: bytes) -> str:
    """Return what separates the header's names: spreadsheets of many countries write `;`."""
    header = head.partition(b"\n")[0].decode("utf-8", "replace")
    return max(",;\t", key=header.count)


def _texts(value: Any) -> Iterator[str]:
    """Give every text inside a JSON value, keys too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for each in value:
            yield from _texts(each)
    elif isinstance(value, dict):
        for key, each in value.items():
            yield key
            yield from _texts(each)


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _is_storable(text: str) -> bool:
    return storable_text(text) == text
