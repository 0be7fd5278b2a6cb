"""The parts of the documents that restate the code are current; `make docs` writes them."""

import inspect
import re
from importlib.metadata import entry_points

import pytest

from receiver.cli.trigger.cases import CASES
from receiver.emulator.faults import KINDS
from receiver.plugins.loader import GROUP
from receiver.web.public import STATUS
from tests.docs.contract_parts import is_error, public_members
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
    shown = {
        found
        for page in page_names()
        for found in re.findall(r"<!-- generated: ([^>]+?) -->", read_page(page))
    }
    needed = PARTS.keys() - {"options", "members", "functions", "errors", "fixtures"}
    needed |= {f"options {point.name}" for point in entry_points(group=GROUP) if point.name != "log"}
    assert needed <= shown


@pytest.mark.parametrize("module", ["receiver.handler", "receiver.testing"])
def test_every_public_name_is_in_the_guide(module: str) -> None:
    """Each class has a table of its members in handlers/WRITING.md; functions and errors have one together."""
    page = read_page("handlers/WRITING.md")
    parts = re.findall(r"<!-- generated: ([^>]+?) -->", page)
    tabulated = {path for part in parts if part.startswith("members ") for path in part.split()[1:]}
    members = public_members(module)
    classes = {
        f"{module}.{name}" for name, each in members.items() if inspect.isclass(each) and not is_error(each)
    }
    assert classes
    assert classes <= tabulated
    assert f"functions {module}" in parts
    assert "fixtures receiver.testing.fixtures" in parts
    assert "errors receiver.handler" in parts
    assert [name for name in members if not re.search(rf"`(async with )?{name}\b", page)] == []


def test_an_altered_table_is_noticed() -> None:
    text = read_page(next(page for page in page_names() if "generated: metrics" in read_page(page)))
    assert fill(text.replace("| counter |", "| gauge |")) == text
