"""What the documents show and name exists: settings, command lines, links, paths, examples."""

import asyncio
import importlib
import pkgutil
import re
import shlex
import sys
from collections.abc import Iterator
from dataclasses import replace
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest

from receiver.cli.doctor.findings import FINDING_KINDS
from receiver.cli.trigger.cases import CASES
from receiver.config import Settings, load_settings
from receiver.emulator import Emulator, EmulatorSettings
from receiver.handler import Done
from receiver.model import LostReason, Output, RunState, Verdict
from receiver.net.download import Downloader
from receiver.plugins.functions import FunctionHandler
from receiver.plugins.loader import GROUP, load_handlers
from receiver.service.service import Service
from receiver.web.public import CALLBACK_PATH
from receiver.web.server import Server, bind
from tests.docs.generate import ROOT, commands, options, to_anchor
from tests.docs.pages import all_blocks, code_blocks, find_block, links, page_names, read_page, section, without_code
from tests.support.defaults import download_limits
from tests.support.handler_kit import RUN, MemoryContext

README = read_page("README.md")
ALL = {name: read_page(name) for name in page_names()}
COMMANDS = {path: {name for each in options(command) for name in each.opts} for path, command in commands()}
PATIENCE_SECONDS = 30


def targets() -> set[str]:
    return set(re.findall(r"^([a-z]+):.*## ", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) <= 200


POLISHED = [name for name in ALL if not name.startswith(("handlers/", "deploy/", "tests/bench/"))]


@pytest.mark.parametrize("page", POLISHED)
def test_prose_is_100_columns_wide(page: str) -> None:
    """Tables and code may be wider, and so may a line that is one link."""
    prose = [line for line in without_code(ALL[page]).splitlines() if not line.startswith(("|", "!["))]
    assert [line for line in prose if len(line) > 100] == []


@pytest.mark.parametrize("page", POLISHED)
def test_the_glossary_is_kept(page: str) -> None:
    """Words that stand for something else in these documents, or for nothing that can be looked up."""
    prose = re.sub(r"<!-- generated.*?<!-- end -->|`[^`]*`", "", without_code(ALL[page]), flags=re.DOTALL)
    avoided = r"tell|tells|told|asks|asked|answer|answers|answered|whoever|nobody|everyone|cure|desk|herald|door"
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


@pytest.mark.parametrize(("page", "block"), [found for found in all_blocks("toml") if "[project." not in found[1]])
def test_settings_that_are_shown_load(page: str, block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each block by itself is a file of settings; its secrets are in the environment."""
    monkeypatch.chdir(tmp_path)
    for name in ("cert.pem", "key.pem"):
        Path(name).touch()
    Path("receiver.toml").write_text(block, "utf-8")
    named = re.findall(r"env:(\w+)", block)
    environ = {"FLORA_API_KEY": "sk_test_x", "FLORA_WEBHOOK_SECRET": "whsec_x", **{name: name for name in named}}
    load_settings(None, environ)


def command_lines() -> list[tuple[str, str]]:
    """Return every command line as (page, line): of shell blocks and sessions, and in the text."""
    return [(name, line) for name, text in ALL.items() for line in _lines(text) if "flora-receiver " in line]


def _lines(text: str) -> Iterator[str]:
    for block in code_blocks(text, "sh"):
        yield from block.replace("\\\n", " ").splitlines()
    for session in code_blocks(text, "console"):
        yield from (line.removeprefix("$ ") for line in session.splitlines() if line.startswith("$ "))
    yield from re.findall(r"`((?:\.venv/bin/)?flora-receiver [^`]*)`", without_code(text))


@pytest.mark.parametrize(("page", "line"), command_lines())
def test_a_command_line_that_is_shown_exists(page: str, line: str) -> None:
    """A known command, known options, a known case."""
    text = line[line.index("flora-receiver ") :].split("|", maxsplit=1)[0]
    words = shlex.split(text, comments=True)
    if words[1] in {"COMMAND", "0.1.0"} or (words[:2] == ["flora-receiver", "handlers"] and len(words) == 2):
        return
    path = next(path for path in COMMANDS if words[: len(path.split())] == path.split())
    given = {word for word in words if word.startswith("--")}
    assert given <= COMMANDS[path] | {"--help"}
    if "--case" in given:
        assert words[words.index("--case") + 1] in CASES


@pytest.mark.parametrize(("page", "block"), all_blocks("sh"))
def test_shell_examples_parse(page: str, block: str) -> None:
    assert shlex.split(block, comments=True)


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
        assert [name for name in re.findall(r"\w+", names) if not re.search(rf"\b{name}\b", text)] == [], path


@pytest.mark.parametrize("page", ALL)
def test_modules_that_are_named_exist(page: str) -> None:
    for name in re.findall(r"`((?:receiver|handlers)(?:\.[a-z_]+)+)", without_code(ALL[page])):
        if not name.endswith((".toml", ".db")) and name not in FINDING_KINDS:
            pkgutil.resolve_name(name)


@pytest.mark.parametrize("page", ALL)
def test_nothing_of_this_machine_is_in_it(page: str) -> None:
    """Nor are there addresses but those for examples, FLORA's, and those that are compared."""
    assert not re.search(r"/(root|home|work|Users)/", ALL[page])
    hosts = set(re.findall(r"https?://([^/\s:`)\"'…,]+)", ALL[page]))
    compared = {"hookdeck.com", "getconvoy.io", "github.com", "img.shields.io"}
    flora = {"app.flora.ai", "developer.flora.ai"}
    assert hosts <= {"127.0.0.1", "hooks.example.com", "images.example.com"} | flora | compared


async def test_the_handler_that_is_shown_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Saved, named in the settings and called for a run of the emulator, it writes its file."""
    source = find_block("python", "class Checksums")
    toml = find_block("toml", 'use = "checksums:Checksums"')
    (tmp_path / "checksums.py").write_text(source, "utf-8")
    (tmp_path / "receiver.toml").write_text(toml, "utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    handler = importlib.import_module("checksums").Checksums
    handled: asyncio.Queue[Any] = asyncio.Queue()
    original = handler.handle

    async def observed(self: Any, run: Any, context: Any) -> Any:
        answer = await original(self, run, context)
        handled.put_nowait(answer)
        return answer

    monkeypatch.setattr(handler, "handle", observed)
    emulator = Emulator(EmulatorSettings(run_seconds=0, allow_private_callbacks=True))
    stand = Server(emulator.app, bind("127.0.0.1", 0))
    await stand.start()
    origin = f"http://127.0.0.1:{stand.port}"
    try:
        settings = load_settings(None, environ_for(emulator, origin))
        async with Service(settings).running() as service:
            url = f"http://127.0.0.1:{service.address[1]}{CALLBACK_PATH}"
            run_id = emulator.start_run("emu-everything", callback_url=url)
            answer = await asyncio.wait_for(handled.get(), PATIENCE_SECONDS)
            assert answer.result == {"file": f"sums/{run_id}.sha256"}
            lines = (tmp_path / f"sums/{run_id}.sha256").read_text().splitlines()
            assert [line.split()[1] for line in lines] == [f"output_{number}" for number in range(1, 6)]
            assert all(re.match("[0-9a-f]{64} ", line) for line in lines)
    finally:
        await emulator.aclose()
        await stand.stop()
        sys.modules.pop("checksums")


async def test_the_function_that_is_shown_works() -> None:
    """It is called in a thread, with a context that it can block on."""
    source = find_block("python", "def announce")
    shown: dict[str, Any] = {}
    exec(source, shown)  # noqa: S102  # our own page
    output = Output(position=0, output_id="words", type="text", value="Grüße")
    context = MemoryContext(run_id="run_1", downloader=Downloader(limits=download_limits()))
    answer = await FunctionHandler(shown["announce"]).handle(replace(RUN, outputs=(output,)), context)
    await context.downloader.aclose()
    assert answer == Done({"outputs": 1})
    assert context.log.lines == [("info", "sums.announced", {"names": ["words: 7 bytes"]})]


def environ_for(emulator: Emulator, origin: str) -> dict[str, str]:
    return {
        "FLORA_BASE_URL": emulator.base_url(origin),
        "FLORA_API_KEY": emulator.settings.api_key,
        "FLORA_WEBHOOK_SECRET": ",".join(emulator.settings.webhook_secrets),
        "RECEIVER_PUBLIC__HOST": "127.0.0.1",
        "RECEIVER_PUBLIC__PORT": "0",
        "RECEIVER_OPERATIONS__PORT": "0",
        "RECEIVER_DOWNLOADS__ALLOW_PRIVATE_HOSTS": origin.removeprefix("http://"),
    }


def test_the_default_handlers_are_as_said() -> None:
    """Settings: without `[[handlers]]` there are `storage` into `outputs`, and `log`."""
    settings = Settings()
    assert [each.registration.name for each in load_handlers(settings)] == ["storage", "log"]
    assert settings.handlers[0].options == {"url": "outputs"}
