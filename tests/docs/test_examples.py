"""The examples in the documents: settings load, command lines exist, handlers work."""

import asyncio
import importlib
import re
import shlex
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from receiver.cli.trigger.cases import CASES
from receiver.config import Settings, load_settings
from receiver.config.callback_url import CALLBACK_PATH
from receiver.emulator import Emulator, EmulatorSettings
from receiver.handler import Done
from receiver.model import Output
from receiver.net.download import Downloader
from receiver.plugins.functions import FunctionHandler
from receiver.plugins.loader import load_handlers
from receiver.service.service import Service
from receiver.web.server import Server, bind
from tests.docs.command_parts import commands, options
from tests.docs.pages import (
    all_blocks,
    code_blocks,
    find_block,
    page_names,
    read_page,
    without_code,
    without_generated,
)
from tests.support.defaults import download_limits
from tests.support.handler_kit import RUN, MemoryContext
from tests.support.patience import PATIENCE_SECONDS

COMMANDS = {path: {name for each in options(command) for name in each.opts} for path, command in commands()}


EXAMPLE_VALUES = {"HTTPS_PROXY": "http://proxy.example.com:3128"}
"""What variables hold that are no secrets; a secret is the name of its variable."""


def shown(language: str, but: str | None = None) -> list[Any]:
    """Return the code blocks of a language in all pages, without those that contain a text."""
    found = all_blocks(language)
    return [pytest.param(block, id=page) for page, block in found if but is None or but not in block]


@pytest.mark.parametrize("block", shown("toml", but="[project."))
def test_settings_that_are_shown_load(block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each block by itself is a file of settings; its secrets are in the environment."""
    monkeypatch.chdir(tmp_path)
    for name in ("cert.pem", "key.pem"):
        Path(name).touch()
    Path("receiver.toml").write_text(block, "utf-8")
    named = re.findall(r"env:(\w+)", block)
    environ = {
        "FLORA_API_KEY": "sk_test_x",
        "FLORA_WEBHOOK_SECRET": "whsec_x",
        **{name: EXAMPLE_VALUES.get(name, name) for name in named},
    }
    load_settings(None, environ)


def command_lines() -> list[Any]:
    """Return every command line: of shell blocks and sessions, and in the text."""
    found = [(name, line) for name in page_names() for line in _lines(read_page(name))]
    return [pytest.param(line, id=name) for name, line in found if "flora-receiver " in line]


def _lines(text: str) -> Iterator[str]:
    for block in code_blocks(text, "sh"):
        yield from block.replace("\\\n", " ").splitlines()
    for session in code_blocks(text, "console"):
        yield from (line.removeprefix("$ ") for line in session.splitlines() if line.startswith("$ "))
    prose = without_code(without_generated(text, "modules"))  # there `flora-receiver runs …` is a group
    yield from re.findall(r"`((?:\.venv/bin/)?flora-receiver [^`]*)`", prose)


@pytest.mark.parametrize("line", command_lines())
def test_a_command_line_that_is_shown_exists(line: str) -> None:
    """A known command, known options, a known case."""
    text = line[line.index("flora-receiver ") :].split("|", maxsplit=1)[0]
    words = shlex.split(text, comments=True)
    if words[1] in {"COMMAND", "0.1.0"} or (
        words[:2] == ["flora-receiver", "handlers"] and len(words) == 2
    ):
        return
    path = next(path for path in COMMANDS if words[: len(path.split())] == path.split())
    given = {word for word in words if word.startswith("--")}
    assert given <= COMMANDS[path] | {"--help"}
    if "--case" in given:
        assert words[words.index("--case") + 1] in CASES


@pytest.mark.parametrize("block", shown("sh"))
def test_shell_examples_parse(block: str) -> None:
    assert shlex.split(block, comments=True)


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
