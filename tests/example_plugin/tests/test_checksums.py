"""The example handler: alone, repeated, on bad downloads, and in a running receiver."""

import hashlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from flora_checksums import Checksums, ChecksumsConfig

from receiver.handler import Done, Handler, Reject, Retry
from receiver.testing import page


def checksums(directory: Path) -> Checksums:
    """Build the handler as flora-receiver does."""
    return Checksums(ChecksumsConfig(directory=directory))


def files(directory: Path) -> list[Path]:
    """Return the files in the directory."""
    return sorted(directory.iterdir())


async def test_every_output_has_its_line(tmp_path: Path, flora_run: Any, flora_context: Any) -> None:
    """One output of each type that FLORA has, text included."""
    run, handler = flora_run(), checksums(tmp_path)
    assert isinstance(handler, Handler)
    assert await handler.handle(run, flora_context(run)) == Done({"outputs": 5})
    lines = (tmp_path / "run_1.sha256").read_text().splitlines()
    assert lines[-1] == f"{hashlib.sha256(b'a lighthouse').hexdigest()}  output_5"


async def test_repeating_it_changes_nothing(tmp_path: Path, flora_run: Any, flora_context: Any) -> None:
    """Delivery is at least once: a second attempt, as after a crash, ends in the same one file."""
    run, handler = flora_run("imageUrl", "text"), checksums(tmp_path)
    await handler.handle(run, flora_context(run))
    before = (tmp_path / "run_1.sha256").read_bytes()
    await handler.handle(run, flora_context(run, attempt=2))
    assert [each.read_bytes() for each in files(tmp_path)] == [before]


async def test_a_download_that_may_work_later_is_tried_later(
    tmp_path: Path, flora_run: Callable[..., Any], flora_context: Any, flora_media: Any
) -> None:
    """An expired URL is read again; a refused download is not retried."""
    run, handler = flora_run("imageUrl"), checksums(tmp_path)
    flora_media.pages["/output_1.png"] = page(b"gone", status="410 Gone")
    answer = await handler.handle(run, flora_context(run))
    assert isinstance(answer, Retry)
    assert answer.reread
    outside = replace(run.outputs[0], value="ftp://media.example/output_1.png")
    assert isinstance(await handler.handle(replace(run, outputs=(outside,)), flora_context(run)), Reject)
    assert files(tmp_path) == []


async def test_in_a_running_receiver(tmp_path: Path, flora_stand: Any) -> None:
    """Found by its entry point, called for a callback of the emulated FLORA, done once."""
    directory = tmp_path / "sums"
    async with flora_stand([{"use": "checksums", "directory": str(directory)}]) as stand:
        run = await stand.run("emu-two-images")
        assert run.succeeded, run
        assert [dispatch.state for dispatch in run.dispatches] == ["done"]
        assert len((directory / f"{run.run_id}.sha256").read_text().splitlines()) == 2
        assert (await stand.callback(run.run_id)).json() == {"status": "accepted"}
