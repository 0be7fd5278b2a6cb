"""Keeps a file of SHA-256 sums for every completed run, in the form that `sha256sum --check` reads.

Idempotent: a run has one file, which appears as a whole or not at all, and a repeated attempt writes
the same bytes.
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
    """Unknown keys are errors. `flora-receiver handlers show checksums` prints each description."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    directory: Path
    """Directory of the files; created if missing."""


class Checksums:
    """Downloads each output once, and keeps only its checksum."""

    Config: ClassVar[type[BaseModel]] = ChecksumsConfig
    when: ClassVar[When] = When(status=("completed",))

    def __init__(self, config: ChecksumsConfig) -> None:
        """Keep the configuration; nothing is opened yet."""
        self._directory = config.directory

    async def handle(self, run: SettledRun, context: Context) -> Answer:
        """Write the run's file. A failed download is retried, a refused one is not."""
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
        """Try the directory; called by `flora-receiver check` and at the start of the service."""
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
