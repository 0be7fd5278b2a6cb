"""Templates: columns and nothing else."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from receiver.cli.batch.templates import Template, to_text


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
def test_a_template_is_filled(text: str, filled: str) -> None:
    """Dots, colons and brackets belong to a column's name: no look-up, no formatting."""
    values = {
        "headline": "Hallo", "Market Code": "de", "a.b": "1", "x:y": "2", "i[0]": "3", "c!r": "4",
        "n": 7, "none": None, "flag": True, "list": ["é"],
    }  # fmt: skip
    assert Template(text).fill(values) == filled


def test_attributes_and_format_specs_are_only_missing_columns() -> None:
    template = Template("{headline.__class__}{headline:>1000000000}")
    assert template.find_missing({"headline": "x"}) == ("headline.__class__", "headline:>1000000000")


@pytest.mark.parametrize("text", ["{", "}", "{a", "a}", "{}", "{ }", "{a{b}}", "{{a}"])
def test_a_malformed_template_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"\{|\}"):
        Template(text)


@given(st.text())
def test_braces_can_always_be_escaped(text: str) -> None:
    assert Template(text.replace("{", "{{").replace("}", "}}")).fill({}) == text


@given(st.text(st.characters(exclude_characters="{}"), min_size=1).filter(str.strip), st.text())
def test_any_column_and_any_value_are_filled(column: str, value: str) -> None:
    """A value is never parsed as a template."""
    assert Template(f"<{{{column}}}>").fill({column.strip(): value}) == f"<{value}>"


def test_fields_become_text() -> None:
    assert [to_text(value) for value in ("x", None, 1, 1.5, {"a": "ü"})] == [
        "x",
        "",
        "1",
        "1.5",
        '{"a": "ü"}',
    ]
