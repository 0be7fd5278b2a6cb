"""The documents as the tests read them: each page, its code blocks, its sections, its links."""

import re
import subprocess
from collections.abc import Mapping
from functools import cache
from pathlib import Path

from tests.cli.conftest import environment
from tests.docs.generate import documents
from tests.docs.source_parts import ROOT
from tests.support.patience import PATIENCE_SECONDS

BLOCK = re.compile(
    r"^(?P<indent> *)```(?P<language>\w*)\n(?P<code>.*?)^(?P=indent)```$", re.MULTILINE | re.DOTALL
)


@cache
def read_page(name: str) -> str:
    """Return a page by its path from the root."""
    return (ROOT / name).read_text("utf-8")


def page_names() -> list[str]:
    return [str(page.relative_to(ROOT)) for page in documents()]


def code_blocks(text: str, language: str) -> list[str]:
    """Return the code blocks of a language, without the indentation that they have inside a list."""
    return [
        "".join(line.removeprefix(found["indent"]) for line in found["code"].splitlines(keepends=True))
        for found in BLOCK.finditer(text)
        if found["language"] == language
    ]


def all_blocks(language: str) -> list[tuple[str, str]]:
    """Return every code block of a language as (page, code)."""
    return [(name, block) for name in page_names() for block in code_blocks(read_page(name), language)]


def find_block(language: str, containing: str) -> str:
    """Return the one code block of a language that contains a text."""
    (block,) = (block for _, block in all_blocks(language) if containing in block)
    return block


def section(page: str, title: str) -> str:
    """Return what stands below a heading, up to the next one of its level or above."""
    text = BLOCK.sub(lambda found: found[0].replace("\n#", "\n\0#"), f"\n{read_page(page)}")
    found = re.search(rf"\n(?P<level>#+) {re.escape(title)}\n(?P<text>.*)", text, re.DOTALL)
    assert found is not None, f"{page} has no section {title}"
    return re.split(rf"\n#{{1,{len(found['level'])}}} ", found["text"])[0].replace("\0", "")


def without_code(text: str) -> str:
    """Return a page's prose and tables."""
    return BLOCK.sub("", text)


def without_generated(text: str, part: str = "") -> str:
    """Return a page without its generated parts, or without those of one name."""
    return re.sub(rf"<!-- generated: {part}.*?<!-- end -->", "", text, flags=re.DOTALL)


def links(text: str) -> list[str]:
    """Return the targets of a page's links and pictures."""
    return re.findall(r"\]\(([^)\s]+)\)", without_code(text))


def run_shell(script: str, cwd: Path, env: Mapping[str, str]) -> str:
    """Run a script in a folder, hold that it succeeds, and return what it printed."""
    done = subprocess.run(
        ["sh", "-euc", script],
        cwd=cwd,
        env=environment(**env),
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE_SECONDS,
    )
    assert done.returncode == 0, f"{script}\n{done.stdout}{done.stderr}"
    return done.stdout
