"""What the documents show works: each example, each command line, each link."""

import asyncio
import importlib
import re
import shlex
import sys
from dataclasses import replace
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest

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
from tests.docs.generate import commands, options
from tests.support.handler_kit import RUN, MemoryContext

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text("utf-8")
HANDLERS = (ROOT / "handlers/README.md").read_text("utf-8")
LINES = README.splitlines()
PATIENCE_SECONDS = 30


def blocks(language: str) -> list[str]:
    """Every code block of a language in both READMEs, without the indentation it has inside a list."""
    found = re.findall(rf"^( *)```{language}\n(.*?)^\1```$", README + HANDLERS, re.MULTILINE | re.DOTALL)
    return ["".join(line.removeprefix(indent) for line in block.splitlines(keepends=True)) for indent, block in found]


COMMANDS = {path: {name for each in options(command) for name in each.opts} for path, command in commands()}


@pytest.mark.parametrize("word", [*RunState, *Verdict, *("accepted", "duplicate", "ignored")])
def test_every_word_of_the_ledger_is_explained(word: str) -> None:
    assert f"`{word}`" in README or f'"{word}"' in README


def test_reasons_for_lost_runs_are_as_many_as_told() -> None:
    """The sentence on `lost` names three; a fourth needs a word there."""
    assert len(LostReason) == 3


@pytest.mark.parametrize("point", entry_points(group=GROUP), ids=lambda point: point.name)
def test_every_handler_is_documented(point: Any) -> None:
    """It has a section of its own and a row in both tables."""
    assert f"\n## {point.name}\n" in HANDLERS
    assert f"| `{point.name}` | " in HANDLERS
    assert f"| `{point.name}` | " in README


@pytest.mark.parametrize("block", [block for block in blocks("toml") if "[project." not in block])
def test_settings_that_are_shown_load(block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("cert.pem", "key.pem"):
        Path(name).touch()
    Path("receiver.toml").write_text(block, "utf-8")
    named = re.findall(r"env:(\w+)", block)
    environ = {"FLORA_API_KEY": "sk_test_x", "FLORA_WEBHOOK_SECRET": "whsec_x", **{name: name for name in named}}
    load_settings(None, environ)


def test_every_command_line_that_is_shown_exists() -> None:
    """What stands in shell blocks and in the text: known commands, known options, known cases."""
    shown = re.findall(r"`(?:\.venv/bin/)?(flora-receiver [^`|]*)`", README)
    assert len(shown) > len(COMMANDS)
    for line in shown:
        words = shlex.split(line)
        path = next(path for path in COMMANDS if words[: len(path.split())] == path.split())
        given = [word for word in words if word.startswith("--")]
        assert set(given) <= COMMANDS[path] | {"--help"}
        if "--case" in given:
            assert words[words.index("--case") + 1] in CASES


def test_shell_examples_parse() -> None:
    for block in blocks("sh"):
        assert shlex.split(block, comments=True)
    assert {line.split()[2] for line in LINES if line.startswith("$ make ")} <= targets()


def targets() -> set[str]:
    return set(re.findall(r"^([a-z]+):.*## ", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))


def test_targets_that_are_named_exist() -> None:
    assert set(re.findall(r"`make ([a-z]+)", README)) <= targets() | {"help"}


def test_nothing_of_this_machine_is_in_it() -> None:
    """Nor are there addresses beyond documentation's own, FLORA's and loopback."""
    assert not re.search(r"/(root|home|work|Users)/", README)
    hosts = set(re.findall(r"https?://([^/\s:`)\"']+)", README))
    assert hosts <= {"127.0.0.1", "app.flora.ai", "hooks.example.com", "images.example.com"}


async def test_the_handler_that_is_shown_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Saved, named in the settings and run: its file is there when a run has gone from emulator to receiver to it."""
    source = next(block for block in blocks("python") if "class Checksums" in block)
    toml = next(block for block in blocks("toml") if "checksums:Checksums" in block)
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
    """As the text around it says: found by its name, called in a thread, with a context that it can block on."""
    source = next(block for block in blocks("python") if "def announce" in block)
    shown: dict[str, Any] = {}
    exec(source, shown)  # noqa: S102 -- our own README
    output = Output(position=0, output_id="words", type="text", value="Grüße")
    context = MemoryContext(run_id="run_1", downloader=Downloader())
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


def test_the_two_handlers_without_any_are_as_told() -> None:
    """README: without `[[handlers]]` there are `storage` into `outputs`, and `log`."""
    settings = Settings()
    assert [each.registration.name for each in load_handlers(settings)] == ["storage", "log"]
    assert settings.handlers[0].options == {"url": "outputs"}
