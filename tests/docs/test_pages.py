"""The documents themselves: their length and words, and that what they name and link exists."""

import pkgutil
import re
from importlib.metadata import entry_points
from typing import Any

import pytest

from receiver.model import LostReason, RunState, Verdict
from receiver.plugins.loader import GROUP
from tests.docs.markdown import to_anchor
from tests.docs.pages import links, page_names, read_page, section, without_code, without_generated
from tests.docs.source_parts import ROOT

README = read_page("README.md")
ALL = {name: read_page(name) for name in page_names()}


def targets() -> set[str]:
    return set(re.findall(r"^([a-z]+):.*## ", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) <= 200


@pytest.mark.parametrize("page", ALL)
def test_prose_is_100_columns_wide(page: str) -> None:
    """Tables and code may be wider, and so may a line that is one link."""
    prose = [
        line
        for line in without_generated(without_code(ALL[page])).splitlines()
        if not line.startswith(("|", "!["))
    ]
    assert [line for line in prose if len(line) > 100] == []


@pytest.mark.parametrize("page", [name for name in ALL if not name.startswith("tests/bench/")])
def test_the_glossary_is_kept(page: str) -> None:
    """Words that stand for something else in these documents, or for nothing that can be looked up."""
    prose = re.sub(r"`[^`]*`", "", without_generated(without_code(ALL[page])))
    avoided = (
        r"tell|tells|told|asks|asked|answer|answers|answered|whoever|nobody|everyone|cure|desk|herald|door"
    )
    assert re.findall(rf"\b(?:{avoided})\b", prose, re.IGNORECASE) == []


@pytest.mark.parametrize("word", [*RunState, *Verdict, "accepted", "duplicate", "ignored", "canary"])
def test_every_word_of_the_ledger_is_explained(word: str) -> None:
    page = ALL["receiver/docs/callbacks.md"]
    assert f"`{word}`" in page or f'"{word}"' in page


def test_reasons_for_lost_runs_are_as_many_as_said() -> None:
    """The sentence on `lost` names three; a fourth needs a word there."""
    assert len(LostReason) == 3


@pytest.mark.parametrize("point", entry_points(group=GROUP), ids=lambda point: point.name)
def test_every_handler_is_documented(point: Any) -> None:
    """It has a section and a row in handlers/README.md, and is named in the README."""
    assert f"\n## {point.name}\n" in ALL["handlers/README.md"]
    assert f"| `{point.name}` | " in ALL["handlers/README.md"]
    assert f"`{point.name}`" in section("README.md", "Where the files go")


@pytest.mark.parametrize("page", ALL)
def test_targets_that_are_named_exist(page: str) -> None:
    assert set(re.findall(r"\bmake ([a-z]+)`", ALL[page])) <= targets()


@pytest.mark.parametrize("page", ALL)
def test_links_lead_somewhere(page: str) -> None:
    """A page or a file that is there; in a page, a heading that is there."""
    for target in links(ALL[page]):
        if target.startswith("https://"):
            continue
        file, _, anchor = target.partition("#")
        path = (ROOT / page).parent / file if file else ROOT / page
        assert path.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.+)$", without_code(path.read_text("utf-8")), re.MULTILINE)
            assert anchor in map(to_anchor, headings), target


@pytest.mark.parametrize("page", ALL)
def test_paths_that_are_named_exist(page: str) -> None:
    """Code that begins with a folder of this repository is a path in it."""
    tops = r"receiver|handlers|tests|deploy|\.ci"
    named = re.findall(rf"`((?:{tops})/[\w./*-]*|(?:{tops})/)`", without_code(ALL[page]))
    assert [each for each in named if not list(ROOT.glob(each.rstrip("/")))] == []


@pytest.mark.parametrize("page", ALL)
def test_names_stand_in_the_files_that_they_are_said_to_be_in(page: str) -> None:
    """As in `receiver/config/loader.py` (`load_settings`)."""
    for path, names in re.findall(r"`([\w/.]+\.py)` \(((?:`\w+`(?:, )?)+)", without_code(ALL[page])):
        text = (ROOT / path).read_text("utf-8")
        assert [name for name in re.findall(r"\w+", names) if not re.search(rf"\b{name}\b", text)] == [], (
            path
        )


@pytest.mark.parametrize("page", ALL)
def test_modules_that_are_named_exist(page: str) -> None:
    for name in re.findall(
        r"`((?:receiver|handlers)(?:\.[a-z_]+)+)", without_generated(without_code(ALL[page]))
    ):
        if not name.endswith((".toml", ".db")):
            pkgutil.resolve_name(name)


@pytest.mark.parametrize("page", ALL)
def test_nothing_of_this_machine_is_in_it(page: str) -> None:
    """Nor are there addresses but those for examples, FLORA's, and those that are compared."""
    assert not re.search(r"/(root|home|work|Users)/", ALL[page])
    hosts = set(re.findall(r"https?://([^/\s:`)\"'…,]+)", ALL[page]))
    compared = {"hookdeck.com", "getconvoy.io", "github.com", "img.shields.io"}
    flora = {"app.flora.ai", "developer.flora.ai"}
    assert hosts <= {"127.0.0.1", "hooks.example.com", "images.example.com"} | flora | compared
