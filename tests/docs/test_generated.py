"""The parts of the documents that restate the code are current; `make docs` writes them."""

import re
from importlib.metadata import entry_points

import pytest

from receiver.cli.trigger.cases import CASES
from receiver.emulator.faults import KINDS
from receiver.plugins.loader import GROUP
from receiver.web.public import STATUS
from tests.docs.generate import PARTS, fill
from tests.docs.meanings import CASE_MEANINGS, FAULT_MEANINGS, REFUSAL_MEANINGS
from tests.docs.pages import page_names, read_page


@pytest.mark.parametrize("page", page_names())
def test_page_is_current(page: str) -> None:
    text = read_page(page)
    assert fill(text) == text, f"{page} is stale: run `make docs`"


def test_every_meaning_belongs_to_the_code() -> None:
    """A new refusal, case or fault needs a text in tests/docs/meanings.py; none is left over."""
    assert REFUSAL_MEANINGS.keys() == STATUS.keys()
    assert CASE_MEANINGS.keys() == CASES.keys()
    assert FAULT_MEANINGS.keys() == KINDS.keys()


def test_every_table_stands_somewhere() -> None:
    """Each kind of table stands in a document, and so do the options of each shipped handler."""
    shown = {found for page in page_names() for found in re.findall(r"<!-- generated: ([^>]+?) -->", read_page(page))}
    needed = PARTS.keys() - {"options", "members"}
    needed |= {f"options {point.name}" for point in entry_points(group=GROUP) if point.name != "log"}
    assert needed <= shown


def test_an_altered_table_is_noticed() -> None:
    text = read_page(next(page for page in page_names() if "generated: metrics" in read_page(page)))
    assert fill(text.replace("| counter |", "| gauge |")) == text
