"""The separator of a table: declared, or told by several rows."""

import csv
import io

import pytest
from hypothesis import given
from hypothesis import strategies as st

from receiver.cli.batch.separators import (
    SEPARATORS,
    detect_separator,
    parse_separator,
    parse_separator_line,
)
from receiver.errors import TableError


@pytest.mark.parametrize(
    ("content", "separator"),
    [
        ("key;Headline, short\r\nde;Hallo\r\n", ";"),
        ("key;Headline, short\r\nde;Hallo, Welt\r\nfr;Salut, toi\r\n", ";"),
        ("key;price, net;price, gross\n1;2,50;2,98\n", ";"),
        ('key,"a;b;c;d"\nde,Hallo\n', ","),
        ('"key; of the\nrow; its name",headline\nde,"one;\ntwo;"\n', ","),
        ("key\ttext; long, wide\nde\ta\n", "\t"),
        ("key|text\nde|a, b\n", "|"),
        ("key,headline\nde,one; two\nfr,a\nit,x;y\n", ","),
        ("\n\nkey;a\nde;b\n", ";"),
        ("key;a;\nde;b;\n", ";"),
        ("key,headline\n", ","),
        ("headline\nHello, world\n", ","),
        ("", ","),
        ('key;"never closed, never\nde;x\n', ","),
        ('key;a\nde;b\nlong;1;2\nquote;"x"y\nfr;c\n', ";"),
    ],
)
def test_rows_tell_the_separator(content: str, separator: str) -> None:
    assert detect_separator(io.StringIO(content, newline="").readlines()) == separator


@given(
    st.sampled_from(SEPARATORS),
    st.integers(2, 5),
    st.data(),
)
def test_a_quoted_table_is_understood(separator: str, columns: int, data: st.DataObject) -> None:
    """As csv writes it, whatever is in its cells, if only the separator divides the rows evenly."""
    cells = st.text('ab,;\t|\n"', min_size=1, max_size=6)
    rows = data.draw(st.lists(st.lists(cells, min_size=columns, max_size=columns), min_size=3, max_size=6))
    file = io.StringIO(newline="")
    csv.writer(file, delimiter=separator, quoting=csv.QUOTE_ALL).writerows(rows)
    file.seek(0)
    assert detect_separator(file.readlines()) == separator


@pytest.mark.parametrize(
    ("line", "separator"),
    [
        ("sep=;\r\n", ";"),
        ("SEP=,", ","),
        ("sep=\t\n", "\t"),
        ('"sep=;"\n', ";"),
        ("sep=\n", None),
        ("sep;x\n", None),
    ],
)
def test_excels_line_declares_the_separator(line: str, separator: str | None) -> None:
    assert parse_separator_line(line) == separator


@pytest.mark.parametrize(
    ("text", "separator"), [(";", ";"), ("tab", "\t"), ("\\t", "\t"), ("\t", "\t"), ("^", "^")]
)
def test_an_option_names_the_separator(text: str, separator: str) -> None:
    assert parse_separator(text) == separator


@pytest.mark.parametrize("text", ["", ";;", '"', "\n", "a", "1"])
def test_what_separates_nothing_is_refused(text: str) -> None:
    with pytest.raises(TableError, match="is no separator"):
        parse_separator(text)
