"""The rows of a CSV or JSON Lines file, read one at a time, so that memory does not grow with it.

A row that cannot be read becomes a `RowProblem`; a file that is not a table raises TableError.
"""

import csv
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from io import TextIOWrapper
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from receiver.errors import TableError
from receiver.model import parse_strict_json, storable_text

_LONGEST_LINE = 1024 * 1024
"""Characters; a file with a longer line is not a table, and reading it would fill the memory."""
_SUFFIXES = {".csv": "csv", ".tsv": "csv", ".jsonl": "jsonl", ".ndjson": "jsonl"}
_BOM = "\ufeff"
_PEEK = 4096
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
    with tempfile.TemporaryFile(prefix="flora-receiver-batch-") as spool:
        if str(path) == "-":
            shutil.copyfileobj(stdin, spool)
        else:
            with path.open("rb") as file:
                shutil.copyfileobj(file, spool)
        yield Source("standard input" if str(path) == "-" else path.name, spool=spool)


class Table:
    """The rows of a source; `columns` is None for JSON Lines, where each row has its own."""

    def __init__(self, source: Source) -> None:
        """Detect the format. Raises TableError if the source cannot be a table."""
        self._source = source
        with source.open() as file:
            head = file.read(_PEEK)
        for mark, reason in _FOREIGN.items():
            if head.startswith(mark):
                raise TableError(f"{source.name} {reason}")
        suffix = Path(source.name).suffix.lower()
        self._format = _SUFFIXES.get(suffix) or _detect_format(source.name, head)
        self._delimiter = ","
        self.columns: tuple[str, ...] | None = None
        if self._format == "csv":
            self._delimiter = _detect_delimiter(head)
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

    def _reader(self, file: TextIO) -> Iterator[list[str]]:
        return iter(csv.reader(_read_lines(file), delimiter=self._delimiter, strict=True))

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


def _detect_delimiter(head: bytes) -> str:
    """Return the delimiter of the header: spreadsheets in many countries write `;`."""
    header = head.partition(b"\n")[0].decode("utf-8", "replace")
    return max(",;\t", key=header.count)


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
