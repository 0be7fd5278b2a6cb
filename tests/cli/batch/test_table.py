"""Reading tables: what spreadsheets and programs really write, and what cannot be read told row by row."""

import io
import json
import os
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from receiver.cli.batch.table import Row, RowProblem, Table, source_of
from receiver.errors import TableError


def read(path: Path) -> list[Row | RowProblem]:
    with source_of(path, io.BytesIO()) as source:
        return list(Table(source).rows())


def table(tmp_path: Path, content: bytes | str, name: str = "rows.csv") -> Path:
    path = tmp_path / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


@pytest.mark.parametrize(
    "content",
    [
        "code,headline\nde,Hallo\n",
        "\ufeffcode,headline\r\nde,Hallo\r\n",
        "code;headline\nde;Hallo",
        "code\theadline\nde\tHallo\n",
        ' code ,headline\n\n,\n"de","Hallo"\n',
        "code,headline,\nde,Hallo,\n",
    ],
)
def test_csv_as_programs_write_it(tmp_path: Path, content: str) -> None:
    """A byte order mark, other separators, blank rows and trailing separators change nothing."""
    [row] = read(table(tmp_path, content))
    assert isinstance(row, Row)
    assert row.values == {"code": "de", "headline": "Hallo"}


def test_rows_are_numbered_as_in_a_spreadsheet(tmp_path: Path) -> None:
    """The header is row 1, blank rows count, a field with newlines in it is still one row."""
    rows = read(table(tmp_path, 'code,text\na,"one\ntwo\r\nthree, four ""five"""\n\nb,six\n'))
    assert [(row.number, row.values["text"]) for row in rows if isinstance(row, Row)] == [
        (2, 'one\ntwo\r\nthree, four "five"'),
        (4, "six"),
    ]


def test_a_bad_row_does_not_hide_the_others(tmp_path: Path) -> None:
    """Each unreadable row is a problem in its place."""
    content = b'code,text\nok,1\nlong,1,2\nlatin,\xe9\nquote,"x"y\nnul,\x00\nend,2\n'
    rows = read(table(tmp_path, content))
    assert [row.number if isinstance(row, Row) else str(row) for row in rows] == [
        2,
        "row 3: has 3 fields, the header has 2: quote fields with separators in them",
        "row 4, column 'text': is not UTF-8 text",
        "row 5: cannot be read: ',' expected after '\"'",
        "row 6, column 'text': is not UTF-8 text",
        7,
    ]


def test_an_open_quote_is_a_problem_of_its_row(tmp_path: Path) -> None:
    """It swallows the rest of the file, and that is said."""
    rows = read(table(tmp_path, 'code\nok\n"never closed\nx\n'))
    assert isinstance(rows[-1], RowProblem)
    assert rows[-1].row == 3


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "is empty"),
        (b"\n", "is empty"),
        (b"a,a\n1,2\n", "two columns 'a'"),
        ("a,b".encode("utf-16"), "UTF-16"),
        (b"PK\x03\x04 and so on", "export it as CSV"),
        (b"a\xff,b\n", "not UTF-8 in its header"),
        (b"a,b\n" + b"x" * 1_100_000, "a line is longer"),
    ],
)
def test_what_is_no_table_at_all(tmp_path: Path, content: bytes, why: str) -> None:
    with pytest.raises(TableError, match=why):
        read(table(tmp_path, content))


def test_json_lines(tmp_path: Path) -> None:
    """Values keep their types for the metadata; bad lines are named by their number."""
    content = '{"code": "de", "n": 1, "more": {"a": [true, null]}}\n\n'
    content += '[1]\n{"x": NaN}\nnot\n{"a": "\\u0000"}\n{"a": "\\ud800"}\n'
    first, *bad = read(table(tmp_path, content, "rows.jsonl"))
    assert isinstance(first, Row)
    assert first.values == {"code": "de", "n": 1, "more": {"a": [True, None]}}
    assert [row.row for row in bad if isinstance(row, RowProblem)] == [3, 4, 5, 6, 7]


def test_the_kind_is_seen_by_the_content(tmp_path: Path) -> None:
    [row] = read(table(tmp_path, '\ufeff{"a": 1}\n', "rows.txt"))
    assert isinstance(row, Row)
    assert row.values == {"a": 1}
    [row] = read(table(tmp_path, "a\n1\n", "rows"))
    assert isinstance(row, Row)
    with pytest.raises(TableError, match="JSON array"):
        read(table(tmp_path, '[{"a": 1}]', "rows.json"))


def test_a_source_that_can_be_read_once_is_read_often(tmp_path: Path) -> None:
    """Standard input and pipes are copied aside first; they have no name that a batch could take."""
    with source_of(Path("-"), io.BytesIO(b"a\n1\n")) as source:
        once = Table(source)
        assert [list(once.rows()), list(once.rows())] == [[Row(2, {"a": "1"})]] * 2
        assert not source.named
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_bytes, args=(b"a\n1\n",))
    writer.start()
    with source_of(pipe, io.BytesIO()) as source:
        again = Table(source)
        assert [list(again.rows()), list(again.rows())] == [[Row(2, {"a": "1"})]] * 2
    writer.join()


@pytest.mark.parametrize(("path", "why"), [("nowhere.csv", "there is no file"), (".", "is a directory")])
def test_a_file_that_is_not_there(tmp_path: Path, path: str, why: str) -> None:
    with pytest.raises(TableError, match=why), source_of(tmp_path / path, io.BytesIO()):
        pass


def test_a_file_that_goes_away(tmp_path: Path) -> None:
    """It was there when the batch began."""
    path = table(tmp_path, "a\n1\n")
    with source_of(path, io.BytesIO()) as source:
        once = Table(source)
        path.unlink()
        with pytest.raises(TableError, match="cannot be read: No such file"):
            list(once.rows())


@given(st.binary(max_size=400))
def test_whatever_the_bytes_are(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    """Any bytes are rows, problems, or a TableError; never anything else."""
    path = table(tmp_path_factory.mktemp("any"), content, "rows")
    try:
        rows = read(path)
    except TableError:
        return
    for row in rows:
        if isinstance(row, Row):
            json.dumps(row.values, ensure_ascii=False).encode()
