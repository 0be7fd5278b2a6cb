"""Writes the outputs of one run to a place: reserve, stream, verify, record.

After a crash at any step, the next attempt changes nothing that is stored already. Locations that
the run reserved in an earlier attempt are its own. What happens to a file at any other, `overwrite`
says.
"""

import asyncio
import hashlib
import json
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from handlers.file_names import file_extension, to_file_name
from handlers.storage.claims import Claims, Overwrite
from handlers.storage.keys import KeyTemplate, LabelTemplate, RunKeys
from handlers.storage.manifest import StoredOutput, find_stated_type, to_manifest
from handlers.storage.places import Digest, Place, PlaceError, compute_digest
from handlers.storage.thumbnails import (
    CONTENT_TYPE,
    MAX_BYTES,
    SUFFIX,
    NoThumbnailError,
    has_thumbnail,
    make_thumbnail,
)
from receiver.handler import (
    MANIFEST,
    THUMBNAIL,
    Context,
    Download,
    DownloadFailedError,
    DownloadRefusedError,
    LocationTakenError,
    Output,
    Reject,
    Retry,
    SettledRun,
    growing_pause,
)

OWN_LABELS = frozenset({"run", "output", "technique", "sha256"})
_MAX_MANIFEST_BYTES = 16 * 1024 * 1024


class NotOursError(Exception):
    """Another file exists at the location of an output. The message says which."""


class TooLargeError(Exception):
    """An output is larger than `max_size`."""


class OutputWriter:
    """Writes the outputs of one run in one attempt."""

    def __init__(
        self,
        place: Place,
        template: KeyTemplate,
        run: SettledRun,
        context: Context,
        *,
        overwrite: Overwrite,
        max_size: int | None,
        include_prompts: bool = False,
        labels: Mapping[str, LabelTemplate] = MappingProxyType({}),
    ) -> None:
        self._place = place
        self._template = template
        self._run = run
        self._context = context
        self._overwrite = overwrite
        self._max_size = max_size
        self._include_prompts = include_prompts
        self._own_labels = labels
        self._claims = Claims(place, context, overwrite)
        self._keys = RunKeys(template, run, self._claims.keys())
        self._fetched: set[int] = set()

    async def write_output(self, output: Output) -> StoredOutput | Retry | Reject:
        """Store one output unless it is stored already. Failures concern this output only."""
        label = f"output {output.position} ({to_file_name(output.output_id)})"
        try:
            return await self._find_stored(output) or await self._fetch(output)
        except (DownloadRefusedError, TooLargeError) as error:
            return Reject(f"{label}: {error}")
        except (LocationTakenError, NotOursError) as error:
            return self._to_answer(label, error)
        except DownloadFailedError as error:
            pause = growing_pause(error.retry_after_seconds, self._context.attempt)
            return Retry(f"{label}: {error}", after_seconds=pause, reread=error.expired)
        except PlaceError as error:
            return Retry(f"{label}: {error}")
        except Exception as error:
            return Retry(f"{label}: {type(error).__name__}: {error}")

    async def write_manifest(self, outputs: Sequence[StoredOutput]) -> Retry | Reject | None:
        """Write the manifest. Returns None on success."""
        try:
            await self._write_manifest(outputs)
        except PlaceError as error:
            return Retry(f"manifest: {error}")
        except (LocationTakenError, NotOursError) as error:
            return self._to_answer("manifest", error)
        return None

    async def write_thumbnail(self, output: StoredOutput) -> None:
        """Make and store the thumbnail of an image. A failure is only logged."""
        if not has_thumbnail(output.content_type):
            return
        try:
            await self._write_thumbnail(output)
        except (NoThumbnailError, PlaceError, LocationTakenError, NotOursError) as error:
            self._context.log.warning("storage.no_thumbnail", position=output.position, reason=str(error))
        except Exception as error:
            self._context.log.warning(
                "storage.no_thumbnail", position=output.position, reason=type(error).__name__
            )

    async def _find_stored(self, output: Output) -> StoredOutput | None:
        known = self._claims.artifacts.get(output.position)
        if known is None or known.output_id != output.output_id:
            return None
        key = await self._claims.find_stored(output.position)
        if key is None or known.size is None or known.sha256 is None:
            return None
        location, digest = self._place.locate(key), Digest(known.size, known.sha256)
        if known.location != location:
            await self._claims.reserve(output.position, output.output_id, key)
            await self._record(output.position, digest, known.content_type)
        return _to_stored_output(output, key, location, digest, known.content_type)

    async def _fetch(self, output: Output) -> StoredOutput:
        async with self._context.open(output) as download:
            self._check_max_size(download.content_length or 0)
            content_type = download.content_type
            ext = file_extension(content_type, output)
            key = self._keys.output(output, ext)
            location = self._place.locate(key)
            digest = await self._check_existing(output, key, location, download)
            if digest is None:
                await self._claims.reserve(output.position, output.output_id, key)
                digest = await self._place.write(
                    key,
                    self._limit_size(download),
                    content_type=content_type,
                    expected=download.content_length,
                    metadata=self._labels(output, ext),
                )
        await self._record(output.position, digest, content_type)
        self._fetched.add(output.position)
        stored = _to_stored_output(output, key, location, digest, content_type)
        return replace(stored, stated_content_type=download.stated_content_type)

    async def _check_existing(
        self, output: Output, key: str, location: str, download: Download
    ) -> Digest | None:
        """Check a file that exists at the key.

        Returns None if the output is to be written, or the digest of the file if it is the output.
        """
        size = await self._claims.foreign_size(output.position, key)
        if size is None:
            return None
        if self._overwrite is Overwrite.SAME and download.content_length in {None, size}:
            existing = await compute_digest(self._place.read(key))
            if await compute_digest(self._limit_size(download)) == existing:
                await self._claims.reserve(output.position, output.output_id, key)
                return existing
        raise NotOursError(f"another file exists at {location}")

    def _check_max_size(self, size: int) -> None:
        if self._max_size is not None and size > self._max_size:
            raise TooLargeError(f"larger than max_size, {self._max_size} bytes")

    async def _limit_size(self, download: Download) -> AsyncIterator[bytes]:
        size = 0
        async for chunk in download:
            size += len(chunk)
            self._check_max_size(size)
            yield chunk

    def _labels(self, output: Output, ext: str) -> Mapping[str, str]:
        own = {name: template.render(self._run, output, ext) for name, template in self._own_labels.items()}
        return {
            **own,
            "run": self._run.run_id,
            "output": output.output_id,
            "technique": self._run.technique_id or "",
        }

    async def _record(self, position: int, digest: Digest, content_type: str | None) -> None:
        await self._context.store_artifact(
            position, size=digest.size, sha256=digest.sha256, content_type=content_type
        )

    async def _write_manifest(self, outputs: Sequence[StoredOutput]) -> None:
        key = self._keys.manifest(MANIFEST, outputs[0].key if outputs else None)
        location = self._place.locate(key)
        earlier = None
        if any(each.position not in self._fetched for each in outputs):
            earlier = await self._read_manifest(key)
        body = to_manifest(
            self._run,
            [self._with_stated_type(each, earlier) for each in outputs],
            await self._context.request() if self._include_prompts else None,
        )
        known = self._claims.artifacts.get(MANIFEST)
        is_current = known is not None and (known.location, known.sha256) == (
            location,
            hashlib.sha256(body).hexdigest(),
        )
        if is_current and await self._claims.find_stored(MANIFEST) == key:
            return
        if await self._claims.foreign_size(MANIFEST, key) is not None:
            is_own = earlier is not None or await self._read_manifest(key) is not None
            if self._overwrite is Overwrite.NEVER or not is_own:
                raise NotOursError(f"another file exists at {location}")
        await self._write_own(MANIFEST, "run.json", key, body, "application/json")

    async def _read_manifest(self, key: str) -> Mapping[str, Any] | None:
        """Return the manifest of this run as it was written before, or None if there is none."""
        size = await self._place.size(key)
        if size is None or size > _MAX_MANIFEST_BYTES:
            return None
        try:
            content = json.loads(b"".join([chunk async for chunk in self._place.read(key)]))
        except ValueError:
            return None
        is_own = isinstance(content, dict) and content.get("run_id") == self._run.run_id
        return content if is_own else None

    def _with_stated_type(self, output: StoredOutput, earlier: Mapping[str, Any] | None) -> StoredOutput:
        """Return an output with the server's content type: only the manifest keeps it."""
        if output.position in self._fetched or earlier is None:
            return output
        return replace(output, stated_content_type=find_stated_type(earlier, output))

    async def _write_thumbnail(self, output: StoredOutput) -> None:
        position = THUMBNAIL - output.position
        key = f"{output.key}{SUFFIX}"
        location = self._place.locate(key)
        known = self._claims.artifacts.get(position)
        is_current = known is not None and known.location == location
        if is_current and await self._claims.find_stored(position) == key:
            return
        if output.size > MAX_BYTES:
            raise NoThumbnailError(f"{output.size} bytes are too many")
        image = b"".join([chunk async for chunk in self._place.read(output.key)])
        body = await asyncio.to_thread(make_thumbnail, image, output.content_type)
        size = await self._claims.foreign_size(position, key)
        if size is not None and (
            self._overwrite is Overwrite.NEVER or not await self._has_content(key, body)
        ):
            raise NotOursError(f"another file exists at {location}")
        await self._write_own(position, output.output_id, key, body, CONTENT_TYPE)

    async def _has_content(self, key: str, body: bytes) -> bool:
        return await compute_digest(self._place.read(key)) == Digest(
            len(body), hashlib.sha256(body).hexdigest()
        )

    async def _write_own(self, position: int, name: str, key: str, body: bytes, content_type: str) -> None:
        """Write a file that the handler itself made."""
        await self._claims.reserve(position, name, key)
        digest = await self._place.write(
            key,
            _once(body),
            content_type=content_type,
            expected=len(body),
            metadata={"run": self._run.run_id},
        )
        await self._record(position, digest, content_type)

    def _to_answer(self, label: str, error: LocationTakenError | NotOursError) -> Retry | Reject:
        """Return the answer to a location that is another output's, or may be."""
        if isinstance(error, LocationTakenError) and error.pending:
            return Retry(f"{label}: {error}, which has stored nothing there yet")
        key = self._template.text
        return Reject(
            f"{label}: {error}; make the key template {key!r} unique, for example with {{run_id}}"
        )


def _to_stored_output(
    output: Output, key: str, location: str, digest: Digest, content_type: str | None
) -> StoredOutput:
    return StoredOutput(
        position=output.position,
        output_id=output.output_id,
        type=output.type,
        key=key,
        location=location,
        size=digest.size,
        sha256=digest.sha256,
        content_type=content_type,
    )


async def _once(body: bytes) -> AsyncIterator[bytes]:
    yield body
