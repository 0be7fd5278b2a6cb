"""Templates know columns and nothing else."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from receiver.cli.batch.templates import Template, as_text


@pytest.mark.parametrize(
    ("text", "filled"),
    [
        ("{headline}", "Hallo"),
        ("{ headline }!", "Hallo!"),
        ("{Market Code}/{headline}", "de/Hallo"),
        ("{{{headline}}}", "{Hallo}"),
        ("plain", "plain"),
        ("{a.b}{x:y}{i[0]}{c!r}", "1234"),
        ("{n} {none}{flag} {list}", '7 true ["é"]'),
        ("", ""),
    ],
)
def test_filling(text: str, filled: str) -> None:
    """Dots, colons, brackets and marks belong to a column's name: nothing reaches into a value, nothing is formatted."""
    values = {
        "headline": "Hallo", "Market Code": "de", "a.b": "1", "x:y": "2", "i[0]": "3", "c!r": "4",
        "n": 7, "none": None, "flag": True, "list": ["é"],
    }  # fmt: skip
    assert Template(text).fill(values) == filled


def test_attributes_and_specs_are_only_missing_columns() -> None:
    template = Template("{headline.__class__}{headline:>1000000000}")
    assert template.missing({"headline": "x"}) == ("headline.__class__", "headline:>1000000000")


@pytest.mark.parametrize("text", ["{", "}", "{a", "a}", "{}", "{ }", "{a{b}}", "{{a}"])
def test_what_is_no_template(text: str) -> None:
    with pytest.raises(ValueError, match=r"\{|\}"):
        Template(text)


@given(st.text())
def test_braces_can_always_be_escaped(text: str) -> None:
    assert Template(text.replace("{", "{{").replace("}", "}}")).fill({}) == text


@given(st.text(st.characters(exclude_characters="{}"), min_size=1).filter(str.strip), st.text())
def test_any_column_and_any_value(column: str, value: str) -> None:
    """What a value holds is never read as a template again."""
    assert Template(f"<{{{column}}}>").fill({column.strip(): value}) == f"<{value}>"


def test_as_text() -> None:
    assert [as_text(value) for value in ("x", None, 1, 1.5, {"a": "ü"})] == ["x", "", "1", "1.5", '{"a": "ü"}']
