"""Keeps a file of SHA-256 sums for every completed run, in the form that `sha256sum --check` reads.

Idempotent by its place: a run has one file, written as a whole or not at all, so whoever repeats
writes the same bytes.
"""

import asyncio
import contextlib
import hashlib
import os
import tempfile
from pathlib import Path
from typing import ClassVar

from pydantic import BaseModel, ConfigDict

from receiver.handler import (
    Answer,
    Context,
    Done,
    DownloadFailedError,
    DownloadRefusedError,
    Output,
    Reject,
    Retry,
    SettledRun,
    When,
)

__all__ = ["Checksums", "ChecksumsConfig"]


class ChecksumsConfig(BaseModel):
    """Unknown keys are errors; every field has a line that `flora-receiver handlers show checksums` prints."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    directory: Path
    """Where the files go; made if it is missing."""


class Checksums:
    """Downloads each output once, and remembers only its sum."""

    Config: ClassVar[type[BaseModel]] = ChecksumsConfig
    when: ClassVar[When] = When(status=("completed",))

    def __init__(self, config: ChecksumsConfig) -> None:
        """Store what is configured; nothing is opened yet."""
        self._directory = config.directory

    async def handle(self, run: SettledRun, context: Context) -> Answer:
        """Write the run's file. A cut download is tried again later, one that is refused never."""
        try:
            lines = [f"{await _sum(output, context)}  {output.output_id}\n" for output in run.outputs]
        except DownloadRefusedError as error:
            return Reject(str(error))
        except DownloadFailedError as error:
            return Retry(str(error), reread=error.expired)
        await asyncio.to_thread(self._write, run.run_id, "".join(lines))
        context.log.info("checksums.written", outputs=len(lines))
        return Done({"outputs": len(lines)})

    async def check(self) -> None:
        """Try the directory: `flora-receiver check` and the start of the service ask."""
        await asyncio.to_thread(self._write, ".check", "")
        await asyncio.to_thread((self._directory / ".check.sha256").unlink)

    def _write(self, name: str, text: str) -> None:
        self._directory.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=self._directory)
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            Path(temporary).replace(self._directory / f"{name}.sha256")
        except BaseException:
            with contextlib.suppress(OSError):
                Path(temporary).unlink()
            raise


async def _sum(output: Output, context: Context) -> str:
    digest = hashlib.sha256()
    async with context.open(output) as download:  # guarded: public HTTPS, size and time limits
        async for chunk in download:
            digest.update(chunk)
    return digest.hexdigest()
