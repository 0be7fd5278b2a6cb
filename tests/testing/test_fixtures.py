"""The kit for authors of handlers, and the example package: installed, discovered and tested."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import pytest

from receiver.handler import Context, LocationTakenError, SettledRun
from receiver.testing import MemoryContext, Stand, a_settled_run, signed_callback

pytest_plugins = ["receiver.testing.fixtures"]
PLUGIN = Path(__file__).parents[1] / "example_plugin"


@pytest.fixture(scope="module")
def installed_example(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An environment in which the example package is installed beside flora-receiver."""
    target = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "pip", "install", "-q", "--disable-pip-version-check", "--no-deps"]
    subprocess.run(
        [*command, "--no-build-isolation", "--target", target, PLUGIN], check=True, capture_output=True
    )
    return {**os.environ, "PYTHONPATH": str(target), "PYTHONDONTWRITEBYTECODE": "1"}


def test_the_example_is_found_by_its_entry_point(installed_example: dict[str, str], tmp_path: Path) -> None:
    """Its name is all that the settings need, and its options are shown like those of any handler."""

    def say(*arguments: str) -> str:
        command = [sys.executable, "-m", "receiver", *arguments]
        done = subprocess.run(
            command, cwd=tmp_path, env=installed_example, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "checksums" in say("handlers", "list")
    assert "Directory of the files; created if missing" in say("handlers", "show", "checksums")


def test_the_examples_own_tests_pass(installed_example: dict[str, str], tmp_path: Path) -> None:
    """As its README says, with the kit's fixtures and a running receiver."""
    arguments = [
        "-q",
        "-p",
        "no:cacheprovider",
        "-c",
        PLUGIN / "pyproject.toml",
        "--rootdir",
        PLUGIN,
        PLUGIN / "tests",
    ]
    command = [sys.executable, "-m", "pytest", *map(str, arguments), "--basetemp", str(tmp_path / "base")]
    done = subprocess.run(command, env=installed_example, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "4 passed" in done.stdout


def test_what_the_manual_says_about_tests_is_enough(tmp_path: Path) -> None:
    """The blocks of the page, saved as files, pass without a warning."""
    function = next(block for block in _blocks("handlers/WRITING.md", "python") if "def announce" in block)
    fixtures, test = (
        block
        for block in _blocks("handlers/WRITING.md", "python")
        if "flora_stand" in block or "pytest" in block
    )
    (ini,) = _blocks("handlers/WRITING.md", "ini")
    files = {"sums.py": function, "conftest.py": fixtures, "test_sums.py": test, "pytest.ini": ini}
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "--basetemp",
        str(tmp_path / "base"),
    ]
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 passed" in done.stdout
    assert "warning" not in (done.stdout + done.stderr).lower()


def _blocks(file: str, language: str) -> list[str]:
    """Return a manual's code blocks in a language."""
    text = (PLUGIN.parents[1] / file).read_text("utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


async def test_contexts_share_their_places(
    flora_run: Callable[..., SettledRun], flora_context: Callable[..., MemoryContext]
) -> None:
    """As in the ledger, a location that one run has reserved is taken for another."""
    first: Context = flora_context(flora_run("text"))
    await first.reserve(0, "output_1", "/a")
    await first.store_artifact(0, size=1, sha256="0" * 64, content_type=None)
    assert [artifact.location for artifact in await first.stored()] == ["/a"]
    with pytest.raises(LocationTakenError):
        await flora_context(a_settled_run(run_id="run_2")).reserve(0, "output_1", "/a")


async def test_a_run_has_one_output_of_each_type(
    flora_run: Callable[..., SettledRun], flora_context: Callable[..., MemoryContext], tmp_path: Path
) -> None:
    """They are real files, which can be fetched; a failed run has none."""
    run = flora_run()
    assert [output.type for output in run.outputs] == [
        "imageUrl",
        "videoUrl",
        "audioUrl",
        "documentUrl",
        "text",
    ]
    context = flora_context(run)
    heads = []
    for output in run.outputs:
        saved = await context.save(output, tmp_path / output.output_id)
        heads.append(saved.path.read_bytes()[:12])
    assert heads[0].startswith(b"\x89PNG")
    assert heads[1][4:8] == b"ftyp"
    assert heads[2].startswith(b"RIFF")
    assert heads[3].startswith(b"%PDF")
    assert flora_run(status="failed").outputs == ()


async def test_a_function_is_tried_in_a_running_receiver(
    flora_stand: Callable[..., AbstractAsyncContextManager[Stand]],
) -> None:
    """The stand accepts every setting; callbacks can be sent by hand, with rotated secrets too."""
    async with flora_stand([{"use": f"{__name__}:remember", "name": "remember"}]) as stand:
        run = await stand.run("emu-text", metadata={"market": "DE"})
        assert run.succeeded
        assert _SEEN[run.run_id] == {"market": "DE"}
        body, headers = signed_callback("run_1", "whsec_other", secrets_too=[stand.secret])
        assert headers["Flora-Signature"].count("v1=") == 2
        assert b'"run_1"' in body
        refused = await stand.callback("run_1", age_seconds=3600)
        assert refused.json()["error"]["code"] == "timestamp_out_of_tolerance"
        assert (await stand.look(run.run_id)).finished


async def test_the_service_counts_what_its_handlers_fetch(
    flora_stand: Callable[..., AbstractAsyncContextManager[Stand]], tmp_path: Path
) -> None:
    """The metric of downloaded bytes is the size of what was stored."""
    async with flora_stand([{"use": "storage", "url": str(tmp_path / "outputs")}]) as stand:
        assert (await stand.run("emu-two-images")).succeeded
        (metric,) = stand.service.metrics.download_bytes.collect()
    stored = sum(path.stat().st_size for path in (tmp_path / "outputs").rglob("*.png"))
    assert metric.samples[0].value == stored > 0


_SEEN: dict[str, Any] = {}


async def remember(run: SettledRun, _: Context) -> None:
    """A handler in one line."""
    _SEEN[run.run_id] = dict(run.metadata)
