"""The handler that stores outputs: each under its key, then a manifest beside them. Found by its entry point `storage`.

For every output: reserve its place, stream it there while hashing, record it. Each step may be the last before a crash,
and running again from the start then changes nothing that is safe already.
"""

import asyncio
import hashlib
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Annotated, ClassVar
from urllib.parse import unquote, urlsplit

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from handlers.disk import LocalDisk
from handlers.manifest import Kept, manifest
from handlers.naming import KeyTemplate, RunKeys, extension
from handlers.places import Place, PlaceError
from receiver.handler import (
    MANIFEST,
    Answer,
    Artifact,
    Context,
    Done,
    DownloadFailedError,
    DownloadRefusedError,
    Event,
    LocationTakenError,
    Output,
    Reject,
    Retry,
    SettledRun,
    When,
)

DEFAULT_KEY = "{completed_at:%Y-%m-%d}/{run_id}/{output_id}{ext}"


def _usable_key(text: str) -> str:
    KeyTemplate(text)
    return text


def _usable_url(url: str) -> str:
    if "://" not in url or url.startswith("file:"):
        _directory(url)
    return url


class StorageConfig(BaseModel):
    """Where outputs go, and under which names."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    url: Annotated[str, Field(min_length=1), AfterValidator(_usable_url)] = "outputs"
    """A directory, `file:///…`, or what obstore reads: `s3://bucket/prefix`, `gs://…`, `az://…`."""
    key: Annotated[str, AfterValidator(_usable_key)] = DEFAULT_KEY
    manifest: bool = True
    """Whether to write `run.json` beside the outputs of a run."""
    concurrency: Annotated[int, Field(ge=1, le=32)] = 4
    """How many outputs of one run are fetched at a time."""


class Storage:
    """Stores the outputs of completed runs; told again when the cost is known, it brings the manifest up to date."""

    Config: ClassVar[type[BaseModel]] = StorageConfig
    on: ClassVar[tuple[Event, ...]] = (Event.SETTLED, Event.COST_FINAL)
    when: ClassVar[When] = When(status=("completed",))

    def __init__(self, config: StorageConfig, *, place: Place | None = None) -> None:
        self._config = config
        self._template = KeyTemplate(config.key)
        self._place = place or open_place(config.url)

    async def handle(self, run: SettledRun, context: Context) -> Answer:
        known = {artifact.position: artifact for artifact in context.artifacts}
        taken = {position: self._place.key_of(artifact.location) for position, artifact in known.items()}
        keys = RunKeys(self._template, run, {position: key for position, key in taken.items() if key is not None})
        gate = asyncio.Semaphore(self._config.concurrency)

        async def guarded(output: Output) -> Kept | Retry | Reject:
            async with gate:
                return await self._attempt(output, known.get(output.position), keys, context)

        async with asyncio.TaskGroup() as group:  # when it is cancelled, it waits until every download has cleaned up
            tasks = [group.create_task(guarded(output)) for output in run.outputs]
        outcomes = [task.result() for task in tasks]
        kept = [outcome for outcome in outcomes if isinstance(outcome, Kept)]
        if len(kept) < len(outcomes):
            return _worst(outcomes)
        if self._config.manifest:
            try:
                await self._describe(run, kept, known.get(MANIFEST), keys, context)
            except PlaceError as exc:
                return Retry(f"manifest: {exc}")
            except LocationTakenError as exc:
                return Reject(f"manifest: {self._taken(exc)}")
        return Done({"files": len(kept), "bytes": sum(each.size for each in kept)})

    async def check(self) -> None:
        await self._place.check()

    async def close(self) -> None:
        await self._place.close()

    async def _attempt(
        self, output: Output, known: Artifact | None, keys: RunKeys, context: Context
    ) -> Kept | Retry | Reject:
        """Store one output; whatever goes wrong is an answer about this output alone."""
        which = f"output {output.position} ({output.output_id})"
        try:
            return await self._still_there(output, known) or await self._fetch(output, keys, context)
        except DownloadRefusedError as exc:
            return Reject(f"{which}: {exc}")
        except LocationTakenError as exc:
            return Reject(f"{which}: {self._taken(exc)}")
        except (DownloadFailedError, PlaceError) as exc:
            return Retry(f"{which}: {exc}")
        except Exception as exc:  # noqa: BLE001 - the other outputs must still be fetched
            return Retry(f"{which}: {type(exc).__name__}: {exc}")

    async def _still_there(self, output: Output, known: Artifact | None) -> Kept | None:
        if known is None or known.stored_at is None or known.size is None:
            return None
        key = self._place.key_of(known.location)
        if key is None or await self._place.size(key) != known.size:
            return None
        return Kept(
            position=output.position,
            output_id=output.output_id,
            type=output.type,
            key=key,
            location=known.location,
            size=known.size,
            sha256=known.sha256,
            content_type=known.content_type,
        )

    async def _fetch(self, output: Output, keys: RunKeys, context: Context) -> Kept:
        async with context.open(output) as download:
            content_type = download.content_type
            key = keys.output(output, extension(content_type, output))
            location = self._place.locate(key)
            await context.reserve(output.position, output.output_id, location)
            stored = await self._place.put(key, download, content_type=content_type, expected=download.content_length)
        await context.store_artifact(output.position, size=stored.size, sha256=stored.sha256, content_type=content_type)
        return Kept(
            position=output.position,
            output_id=output.output_id,
            type=output.type,
            key=key,
            location=location,
            size=stored.size,
            sha256=stored.sha256,
            content_type=content_type,
        )

    async def _describe(
        self, run: SettledRun, kept: Sequence[Kept], known: Artifact | None, keys: RunKeys, context: Context
    ) -> None:
        body = manifest(run, kept)
        key = keys.manifest(MANIFEST, kept[0].key if kept else None)
        location = self._place.locate(key)
        if (
            known is not None
            and known.stored_at is not None
            and (known.location, known.sha256) == (location, hashlib.sha256(body).hexdigest())
            and await self._place.size(key) == len(body)
        ):
            return
        await context.reserve(MANIFEST, "run.json", location)
        stored = await self._place.put(key, _once(body), content_type="application/json", expected=len(body))
        await context.store_artifact(MANIFEST, size=stored.size, sha256=stored.sha256, content_type="application/json")

    def _taken(self, exc: LocationTakenError) -> str:
        return f"{exc}; make the key template {self._template.text!r} tell runs apart, by {{run_id}} for example"


def open_place(url: str) -> Place:
    """Choose the kind of place by its URL; ValueError where there is none."""
    if "://" not in url or url.startswith("file:"):
        return LocalDisk(_directory(url))
    from handlers.objects import ObjectStore  # noqa: PLC0415 - only who uses a cloud waits for its library

    return ObjectStore(url)


def _directory(url: str) -> Path:
    if "://" not in url and not url.startswith("file:"):
        return Path(url).expanduser()
    parts = urlsplit(url)
    if parts.netloc not in {"", "localhost"} or not parts.path.startswith("/") or parts.query or parts.fragment:
        raise ValueError(f"{url!r} must be file:///absolute/path")
    return Path(unquote(parts.path))


async def _once(body: bytes) -> AsyncIterator[bytes]:
    yield body


def _worst(outcomes: Sequence[Kept | Retry | Reject]) -> Answer:
    """Answer for the whole run: while an output may still be stored it is tried again, whatever became of the others."""
    rejected = [outcome.reason for outcome in outcomes if isinstance(outcome, Reject)]
    postponed = [outcome.reason for outcome in outcomes if isinstance(outcome, Retry)]
    reason = "; ".join([*rejected, *postponed])
    return Retry(reason) if postponed else Reject(reason)
