"""Templates: what they accept, what they say about the rest, and how they are filled."""

from dataclasses import replace

import pytest

from handlers.template import RUN_FIELDS, FieldKind, Template, run_text
from tests.support.handler_kit import RUN

FIELDS = {**RUN_FIELDS, "number": FieldKind.NUMBER}


def test_a_template_is_its_literal_text_and_its_placeholders() -> None:
    """Doubled braces are literal; a value is escaped by the caller's function, a time is not."""
    template = Template("{{{run_id}}} {completed_at:%Y} {metadata[n]}{metadata[none]}", FIELDS)
    run = replace(RUN, metadata={"n": [1]})
    assert template.fill(lambda field: run_text(run, field, "<{}>".format)) == "{<run_1>} 2026 <[1]><>"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{nothing}", r"unknown field \{nothing\}; there are completed_at, .*metadata\[…\], number"),
        ("{metadata}", r"unknown field \{metadata\}"),
        ("{run_id[0]}", r"unknown field \{run_id\[0\]\}"),
        ("{print $1}", "a literal brace is written twice"),
        ("{run_id", "a literal brace is written twice"),
        ("{run_id!r}", "takes no format and no conversion"),
        ("{metadata[a]:>9}", "takes no format and no conversion"),
        ("{completed_at:{run_id}}", "takes a time format only"),
        ("{number:>9}", "takes a width only"),
    ],
)
def test_a_wrong_template_says_what_is_wrong(text: str, message: str) -> None:
    """The message names the field and what may be written instead."""
    with pytest.raises(ValueError, match=message):
        Template(text, FIELDS)
