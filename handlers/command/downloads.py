"""Downloads of a run's outputs into one directory, for whoever works on files. For `handlers.command`."""

import asyncio
from collections.abc import Sequence
from pathlib import Path

from handlers.file_names import file_extension, to_file_name
from receiver.handler import (
    Context,
    DownloadFailedError,
    DownloadRefusedError,
    Output,
    Reject,
    Retry,
    Saved,
)

AT_ONCE = 4


async def fetch_all(outputs: Sequence[Output], directory: Path, context: Context) -> list[Saved] | Retry | Reject:
    """Save every output, a few at a time. What will never work is told only once nothing else may work later."""
    gate = asyncio.Semaphore(AT_ONCE)

    async def one(output: Output) -> Saved | Retry | Reject:
        which = f"output {output.position} ({to_file_name(output.output_id)})"
        async with gate:
            try:
                saved = await context.save(output, directory / f"{output.position}.part")
            except DownloadRefusedError as error:
                return Reject(f"{which}: {error}")
            except DownloadFailedError as error:
                return Retry(f"{which}: {error}", reread=error.expired)
            except OSError as error:
                return Retry(f"{which}: {error.strerror or error}")
        name = f"{output.position}-{to_file_name(output.output_id)}{file_extension(saved.content_type, output)}"
        return Saved(saved.path.rename(directory / name), saved.size, saved.sha256, saved.content_type)

    async with asyncio.TaskGroup() as group:  # when it is cancelled, it waits until every download has cleaned up
        tasks = [group.create_task(one(output)) for output in outputs]
    found = [task.result() for task in tasks]
    if postponed := [each for each in found if isinstance(each, Retry)]:
        return Retry("; ".join(each.reason for each in postponed), reread=any(each.reread for each in postponed))
    if rejected := [each for each in found if isinstance(each, Reject)]:
        return Reject("; ".join(each.reason for each in rejected))
    return [each for each in found if isinstance(each, Saved)]
