"""Downloads of all outputs of a run into one directory. For the handler `command`."""

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
    growing_pause,
)

_MAX_CONCURRENT = 4


async def fetch_all(
    outputs: Sequence[Output], directory: Path, context: Context
) -> list[Saved] | Retry | Reject:
    """Save every output, a few at a time. Reject only if no failed download may work later."""
    slots = asyncio.Semaphore(_MAX_CONCURRENT)

    async def save(output: Output) -> Saved | Retry | Reject:
        label = f"output {output.position} ({to_file_name(output.output_id)})"
        async with slots:
            try:
                saved = await context.save(output, directory / f"{output.position}.part")
            except DownloadRefusedError as error:
                return Reject(f"{label}: {error}")
            except DownloadFailedError as error:
                pause = growing_pause(error.retry_after_seconds, context.attempt)
                return Retry(f"{label}: {error}", after_seconds=pause, reread=error.expired)
            except OSError as error:
                return Retry(f"{label}: {error.strerror or error}")
        extension = file_extension(saved.content_type, output)
        name = f"{output.position}-{to_file_name(output.output_id)}{extension}"
        return Saved(saved.path.rename(directory / name), saved.size, saved.sha256, saved.content_type)

    async with asyncio.TaskGroup() as group:  # if cancelled, it waits until every download has cleaned up
        tasks = [group.create_task(save(output)) for output in outputs]
    results = [task.result() for task in tasks]
    if retries := [each for each in results if isinstance(each, Retry)]:
        pauses = [each.after_seconds for each in retries if each.after_seconds is not None]
        return Retry(
            "; ".join(each.reason for each in retries),
            max(pauses, default=None),
            reread=any(each.reread for each in retries),
        )
    if rejected := [each for each in results if isinstance(each, Reject)]:
        return Reject("; ".join(each.reason for each in rejected))
    return [each for each in results if isinstance(each, Saved)]
