"""One run's outputs on their way to a place: each is reserved, streamed, looked at, recorded. For `handlers.storage`.

Each step may be the last before a crash, and beginning again then changes nothing that is safe already. A place that
this run reserved in an earlier attempt is its own; what lies at any other is met as `overwrite` says.
"""

import asyncio
import hashlib
import json
from collections.abc import AsyncIterator, Mapping, Sequence
from enum import StrEnum
from types import MappingProxyType
from typing import Any

from handlers.file_names import file_extension, to_file_name
from handlers.storage.keys import KeyTemplate, LabelTemplate, RunKeys
from handlers.storage.manifest import Kept, manifest
from handlers.storage.places import Place, PlaceError, Stored, digest
from handlers.storage.thumbnails import (
    CONTENT_TYPE,
    MAX_BYTES,
    SUFFIX,
    NoThumbnailError,
    can_be_shown,
    thumbnail,
)
from receiver.handler import (
    MANIFEST,
    THUMBNAIL,
    Artifact,
    Context,
    Download,
    DownloadFailedError,
    DownloadRefusedError,
    LocationTakenError,
    Output,
    Reject,
    Retry,
    SettledRun,
)

OWN_LABELS = frozenset({"run", "output", "technique", "sha256"})
MANIFEST_BYTES = 16 * 1024 * 1024


class Overwrite(StrEnum):
    """What to do where a file lies already that is not this run's own."""

    NEVER = "never"
    SAME = "same"
    ALWAYS = "always"


class NotOursError(Exception):
    """Another file lies at an output's place; the message says where."""


class TooLargeError(Exception):
    """An output is larger than `max_size`."""


class Keeper:
    """Keeps the outputs of one run in one attempt."""

    def __init__(
        self,
        place: Place,
        template: KeyTemplate,
        run: SettledRun,
        context: Context,
        *,
        overwrite: Overwrite,
        max_size: int | None,
        tell_prompts: bool = False,
        labels: Mapping[str, LabelTemplate] = MappingProxyType({}),
    ) -> None:
        self._place = place
        self._template = template
        self._run = run
        self._context = context
        self._overwrite = overwrite
        self._max_size = max_size
        self._tell_prompts = tell_prompts
        self._own_labels = labels
        self._known = {artifact.position: artifact for artifact in context.artifacts}
        taken = {position: place.key_of(artifact.location) for position, artifact in self._known.items()}
        self._keys = RunKeys(template, run, {position: key for position, key in taken.items() if key is not None})

    async def keep(self, output: Output) -> Kept | Retry | Reject:
        """Store one output unless it is safe; whatever goes wrong is an answer about this output alone."""
        which = f"output {output.position} ({to_file_name(output.output_id)})"
        try:
            return await self._still_there(output) or await self._fetch(output)
        except (DownloadRefusedError, TooLargeError) as exc:
            return Reject(f"{which}: {exc}")
        except (LocationTakenError, NotOursError) as exc:
            return Reject(f"{which}: {self._taken(exc)}")
        except DownloadFailedError as exc:
            return Retry(f"{which}: {exc}", reread=exc.expired)
        except PlaceError as exc:
            return Retry(f"{which}: {exc}")
        except Exception as exc:
            return Retry(f"{which}: {type(exc).__name__}: {exc}")

    async def describe(self, kept: Sequence[Kept]) -> Retry | Reject | None:
        """Write the manifest; None when that went well."""
        try:
            await self._describe(kept)
        except PlaceError as exc:
            return Retry(f"manifest: {exc}")
        except (LocationTakenError, NotOursError) as exc:
            return Reject(f"manifest: {self._taken(exc)}")
        return None

    async def show(self, kept: Kept) -> None:
        """Make and store a thumbnail of an image. It is an extra: what goes wrong is logged and nothing more."""
        if not can_be_shown(kept.content_type):
            return
        try:
            await self._show(kept)
        except (NoThumbnailError, PlaceError, LocationTakenError, NotOursError) as exc:
            self._context.log.warning("storage.no_thumbnail", position=kept.position, reason=str(exc))
        except Exception as exc:
            self._context.log.warning("storage.no_thumbnail", position=kept.position, reason=type(exc).__name__)

    async def _still_there(self, output: Output) -> Kept | None:
        known = self._known.get(output.position)
        if known is None or known.output_id != output.output_id or not await self._is_safe(known):
            return None
        key = self._place.key_of(known.location)
        if key is None or known.size is None or known.sha256 is None:
            return None
        return _kept(output, key, known.location, Stored(known.size, known.sha256), known.content_type)

    async def _is_safe(self, known: Artifact) -> bool:
        key = self._place.key_of(known.location)
        if known.stored_at is None or known.size is None or key is None:
            return False
        return await self._place.size(key) == known.size

    async def _fetch(self, output: Output) -> Kept:
        async with self._context.open(output) as download:
            self._within(download.content_length or 0)
            content_type = download.content_type
            ext = file_extension(content_type, output)
            key = self._keys.output(output, ext)
            location = self._place.locate(key)
            stored = await self._met(output, key, location, download)
            if stored is None:
                await self._context.reserve(output.position, output.output_id, location)
                stored = await self._place.put(
                    key,
                    self._limited(download),
                    content_type=content_type,
                    expected=download.content_length,
                    metadata=self._labels(output, ext),
                )
        await self._record(output.position, stored, content_type)
        return _kept(output, key, location, stored, content_type)

    async def _met(self, output: Output, key: str, location: str, download: Download) -> Stored | None:
        """Look at what lies at the key: None if it may be written, or the file itself if it is the output already."""
        found = await self._foreign(output.position, key, location)
        if found is None:
            return None
        if self._overwrite is Overwrite.SAME and download.content_length in {None, found}:
            there = await digest(self._place.read(key))
            if await digest(self._limited(download)) == there:
                await self._context.reserve(output.position, output.output_id, location)
                return there
        raise NotOursError(f"{location} holds another file already")

    async def _foreign(self, position: int, key: str, location: str) -> int | None:
        """Return the size of a file that must not simply be replaced; None where there is none."""
        known = self._known.get(position)
        if self._overwrite is Overwrite.ALWAYS or (known is not None and known.location == location):
            return None
        return await self._place.size(key)

    def _within(self, size: int) -> None:
        if self._max_size is not None and size > self._max_size:
            raise TooLargeError(f"larger than max_size, {self._max_size} bytes")

    async def _limited(self, download: Download) -> AsyncIterator[bytes]:
        size = 0
        async for chunk in download:
            size += len(chunk)
            self._within(size)
            yield chunk

    def _labels(self, output: Output, ext: str) -> Mapping[str, str]:
        own = {name: template.render(self._run, output, ext) for name, template in self._own_labels.items()}
        return {**own, "run": self._run.run_id, "output": output.output_id, "technique": self._run.technique_id or ""}

    async def _record(self, position: int, stored: Stored, content_type: str | None) -> None:
        await self._context.store_artifact(position, size=stored.size, sha256=stored.sha256, content_type=content_type)

    async def _describe(self, kept: Sequence[Kept]) -> None:
        body = manifest(self._run, kept, await self._context.request() if self._tell_prompts else None)
        key = self._keys.manifest(MANIFEST, kept[0].key if kept else None)
        location = self._place.locate(key)
        known = self._known.get(MANIFEST)
        same = known is not None and (known.location, known.sha256) == (location, hashlib.sha256(body).hexdigest())
        if known is not None and same and await self._is_safe(known):
            return
        found = await self._foreign(MANIFEST, key, location)
        if found is not None and (self._overwrite is Overwrite.NEVER or not await self._is_of_this_run(key, found)):
            raise NotOursError(f"{location} holds another file already")
        await self._put(MANIFEST, "run.json", key, body, "application/json")

    async def _is_of_this_run(self, key: str, size: int) -> bool:
        """Whether a manifest that an earlier ledger wrote lies there: it tells of the same run, and may be renewed."""
        if size > MANIFEST_BYTES:
            return False
        try:
            told = json.loads(b"".join([chunk async for chunk in self._place.read(key)]))
        except ValueError:
            return False
        return isinstance(told, dict) and told.get("run_id") == self._run.run_id

    async def _show(self, kept: Kept) -> None:
        position = THUMBNAIL - kept.position
        key = f"{kept.key}{SUFFIX}"
        location = self._place.locate(key)
        known = self._known.get(position)
        if known is not None and known.location == location and await self._is_safe(known):
            return
        if kept.size > MAX_BYTES:
            raise NoThumbnailError(f"{kept.size} bytes are too many")
        body = b"".join([chunk async for chunk in self._place.read(kept.key)])
        made = await asyncio.to_thread(thumbnail, body, kept.content_type)
        found = await self._foreign(position, key, location)
        if found is not None and (self._overwrite is Overwrite.NEVER or not await self._is(key, made)):
            raise NotOursError(f"{location} holds another file already")
        await self._put(position, kept.output_id, key, made, CONTENT_TYPE)

    async def _is(self, key: str, body: bytes) -> bool:
        return await digest(self._place.read(key)) == Stored(len(body), hashlib.sha256(body).hexdigest())

    async def _put(self, position: int, name: str, key: str, body: bytes, content_type: str) -> None:
        """Store bytes of our own."""
        await self._context.reserve(position, name, self._place.locate(key))
        stored = await self._place.put(
            key, _once(body), content_type=content_type, expected=len(body), metadata={"run": self._run.run_id}
        )
        await self._record(position, stored, content_type)

    def _taken(self, exc: Exception) -> str:
        return f"{exc}; make the key template {self._template.text!r} tell runs apart, by {{run_id}} for example"


def _kept(output: Output, key: str, location: str, stored: Stored, content_type: str | None) -> Kept:
    told: dict[str, Any] = {"size": stored.size, "sha256": stored.sha256, "content_type": content_type}
    return Kept(
        position=output.position, output_id=output.output_id, type=output.type, key=key, location=location, **told
    )


async def _once(body: bytes) -> AsyncIterator[bytes]:
    yield body
