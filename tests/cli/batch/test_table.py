"""Tables as spreadsheets and programs write them; errors are reported row by row."""

import io
import json
import os
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from receiver.cli.batch.table import Row, RowProblem, Table, open_source
from receiver.errors import TableError


def read(path: Path) -> list[Row | RowProblem]:
    with open_source(path, io.BytesIO()) as source:
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
        "\ufeffsep=;\r\ncode;headline\r\nde;Hallo\r\n",
        "sep=|\ncode|headline\nde|Hallo\n",
        "code|headline\nde|Hallo\n",
    ],
)
def test_csv_is_read_as_programs_write_it(tmp_path: Path, content: str) -> None:
    """A byte order mark, other separators, blank rows and trailing separators change nothing."""
    [row] = read(table(tmp_path, content))
    assert isinstance(row, Row)
    assert row.values == {"code": "de", "headline": "Hallo"}


def test_a_separator_in_the_header_s_text_is_text(tmp_path: Path) -> None:
    """The rows are divided by another one."""
    [row] = read(table(tmp_path, "key;Headline, short\r\nde;Hallo\r\n"))
    assert row == Row(2, {"key": "de", "Headline, short": "Hallo"})


def test_the_separator_can_be_given(tmp_path: Path) -> None:
    """It overrides what the file says, also the line `sep=`, which is no row."""
    with open_source(table(tmp_path, "sep=;\na;b^c\n1;2^3\n"), io.BytesIO()) as source:
        given = Table(source, separator="^")
        assert (given.columns, list(given.rows())) == (("a;b", "c"), [Row(2, {"a;b": "1;2", "c": "3"})])


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
        "row 3: has 3 fields, the header has 2: quote fields that contain separators",
        "row 4, column 'text': is not UTF-8 text",
        "row 5: cannot be read: ',' expected after '\"'",
        "row 6, column 'text': is not UTF-8 text",
        7,
    ]


def test_an_open_quote_is_a_problem_of_its_row(tmp_path: Path) -> None:
    """It swallows the rest of the file, and is reported."""
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
def test_a_file_that_is_not_a_table_is_refused(tmp_path: Path, content: bytes, why: str) -> None:
    with pytest.raises(TableError, match=why):
        read(table(tmp_path, content))


def test_json_lines_are_read(tmp_path: Path) -> None:
    """Values keep their types for the metadata; bad lines are reported by number."""
    content = '{"code": "de", "n": 1, "more": {"a": [true, null]}}\n\n'
    content += '[1]\n{"x": NaN}\nnot\n{"a": "\\u0000"}\n{"a": "\\ud800"}\n'
    first, *bad = read(table(tmp_path, content, "rows.jsonl"))
    assert isinstance(first, Row)
    assert first.values == {"code": "de", "n": 1, "more": {"a": [True, None]}}
    assert [row.row for row in bad if isinstance(row, RowProblem)] == [3, 4, 5, 6, 7]


def test_the_format_is_detected_from_the_content(tmp_path: Path) -> None:
    [row] = read(table(tmp_path, '\ufeff{"a": 1}\n', "rows.txt"))
    assert isinstance(row, Row)
    assert row.values == {"a": 1}
    [row] = read(table(tmp_path, "a\n1\n", "rows"))
    assert isinstance(row, Row)
    with pytest.raises(TableError, match="JSON array"):
        read(table(tmp_path, '[{"a": 1}]', "rows.json"))


def test_a_pipe_can_be_read_twice(tmp_path: Path) -> None:
    """Standard input and pipes are copied to a file first; a batch cannot be named after them."""
    with open_source(Path("-"), io.BytesIO(b"a\n1\n")) as source:
        once = Table(source)
        assert [list(once.rows()), list(once.rows())] == [[Row(2, {"a": "1"})]] * 2
        assert not source.has_name
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_bytes, args=(b"a\n1\n",))
    writer.start()
    with open_source(pipe, io.BytesIO()) as source:
        again = Table(source)
        assert [list(again.rows()), list(again.rows())] == [[Row(2, {"a": "1"})]] * 2
    writer.join()


@pytest.mark.parametrize(("path", "why"), [("nowhere.csv", "there is no file"), (".", "is a directory")])
def test_a_missing_file_is_refused(tmp_path: Path, path: str, why: str) -> None:
    with pytest.raises(TableError, match=why), open_source(tmp_path / path, io.BytesIO()):
        pass


def test_a_file_that_disappears_is_reported(tmp_path: Path) -> None:
    """It existed when the batch began."""
    path = table(tmp_path, "a\n1\n")
    with open_source(path, io.BytesIO()) as source:
        once = Table(source)
        path.unlink()
        with pytest.raises(TableError, match="cannot be read: No such file"):
            list(once.rows())


@given(st.binary(max_size=400))
def test_any_bytes_are_rows_or_problems(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    """Any bytes become rows, problems or a TableError, and nothing else."""
    path = table(tmp_path_factory.mktemp("any"), content, "rows")
    try:
        rows = read(path)
    except TableError:
        return
    for row in rows:
        if isinstance(row, Row):
            json.dumps(row.values, ensure_ascii=False).encode()
