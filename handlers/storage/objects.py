"""A bucket as a place for outputs: S3, Google Cloud Storage or Azure, through obstore.

What fits into one part is held in memory and written by one request, with its SHA-256 in the
metadata. Anything larger is streamed in parts. Either way the object appears as a whole or not at
all, and is verified: its size, and its ETag where that is a checksum.
"""

import asyncio
import hashlib
import re
from collections.abc import AsyncIterable, AsyncIterator, Mapping, Sequence
from contextlib import suppress
from typing import Any
from urllib.parse import quote, unquote, urlsplit

import obstore
from obstore.exceptions import BaseError, PermissionDeniedError
from obstore.store import ObjectStore as Store

from handlers.storage.clouds import to_place_error
from handlers.storage.places import (
    NO_METADATA,
    Digest,
    PlaceDegradedError,
    PlaceError,
    PlaceUnreachableError,
    compute_digest,
)

PART_BYTES = 8 * 1024 * 1024
_CONCURRENT_PARTS = 2  # times PART_BYTES is the memory that one upload takes
_READ_BYTES = 1024 * 1024
CHECK_SECONDS = 8.0  # less than the ten that the service allows
_ABORT_SECONDS = 3.0
_SETTLE_SECONDS = 0.1
_PROBE_KEY = ".receiver-check"  # one name: if it cannot be deleted, one object is left, not many
_PROBE_TRIES = 5  # other processes check at the same time, and delete it too
_UNQUOTED = " /:;,.+=@()"
_MAX_LABEL = 256  # characters; S3 accepts 2 KB in all, for our own labels and four of the user's
_MD5 = re.compile(r"[0-9a-f]{32}(-\d+)?")


class ObjectStore:
    """Objects below `url`."""

    def __init__(self, url: str, store: Store, *, cache_control: str | None = None) -> None:
        self._url = url.rstrip("/")
        self._root = _raw_root(self._url, store)
        self._store = store
        self._cache_control = cache_control
        self._etag_may_be_md5 = True

    def locate(self, key: str) -> str:
        """Return the URI as other tools write it: the bucket and the object's name, not encoded."""
        return f"{self._url}/{quote(key)}" if self._root is None else f"{self._root}/{key}"

    def key_of(self, location: str) -> str | None:
        if self._root is None:
            return self._encoded_key_of(location)
        prefix = f"{self._root}/"
        return location.removeprefix(prefix) if location.startswith(prefix) else None

    def earlier_location(self, key: str) -> str | None:
        """Return the URI with its key encoded, which other tools take for another object."""
        location = f"{self._url}/{quote(key)}"
        return None if location == self.locate(key) else location

    def earlier_key_of(self, location: str) -> str | None:
        key = self._encoded_key_of(location)
        return key if key is not None and self.earlier_location(key) == location else None

    def _encoded_key_of(self, location: str) -> str | None:
        prefix = f"{self._url}/"
        return unquote(location.removeprefix(prefix)) if location.startswith(prefix) else None

    async def size(self, key: str) -> int | None:
        found = await self._head(key)
        return None if found is None else int(found["size"])

    async def read(self, key: str) -> AsyncIterator[bytes]:
        try:
            response = await obstore.get_async(self._store, key)
            async for chunk in response.stream(min_chunk_size=_READ_BYTES):
                yield bytes(chunk)
        except FileNotFoundError:
            return
        except (BaseError, OSError) as error:
            raise self._to_error("read from", error) from None

    async def write(
        self,
        key: str,
        chunks: AsyncIterable[bytes],
        *,
        content_type: str | None,
        expected: int | None,
        metadata: Mapping[str, str] = NO_METADATA,
    ) -> Digest:
        source = aiter(chunks)
        head = await _read_first_part(source)
        if sum(map(len, head)) <= PART_BYTES:
            digest = await self._write_whole(key, b"".join(head), content_type, metadata)
        else:
            digest = await self._write_parts(
                key, _Source(head, source), self._attributes(content_type, metadata)
            )
        size = await self.size(key)
        if size != digest.size:
            raise PlaceError(f"{self._url} holds {size} bytes of an object of {digest.size}")
        return digest

    async def check(self) -> None:
        """Write, read and delete an object."""
        try:
            async with asyncio.timeout(CHECK_SECONDS):
                await self._probe()
        except TimeoutError:
            raise PlaceUnreachableError(f"{self._url} did not respond within {CHECK_SECONDS:g} s") from None
        finally:
            await self.close()

    async def close(self) -> None:
        """Wait until obstore's threads release the last response; exiting earlier is a SIGABRT."""
        await asyncio.sleep(_SETTLE_SECONDS)

    async def _probe(self) -> None:
        attempted = "write to"
        try:
            for tries in range(1, _PROBE_TRIES + 1):
                attempted = "write to"
                await obstore.put_async(self._store, _PROBE_KEY, b"probe")
                attempted = "write to, but not read from,"
                try:
                    await obstore.get_async(self._store, _PROBE_KEY)
                    break
                except FileNotFoundError:
                    if tries == _PROBE_TRIES:
                        raise
            attempted = "write to, but not look up missing objects in,"
            with suppress(FileNotFoundError):
                await obstore.head_async(self._store, f"{_PROBE_KEY}-missing")
        except PermissionDeniedError as error:
            raise self._to_error(attempted, error) from None
        except (BaseError, OSError) as error:
            raise self._to_error(attempted.partition(",")[0], error) from None
        await self._delete_probe()

    async def _delete_probe(self) -> None:
        """Delete the object of the check. Nothing else is ever deleted, so a failure is no error."""
        try:
            await obstore.delete_async(self._store, _PROBE_KEY)
        except FileNotFoundError:
            return
        except (BaseError, OSError) as error:
            reason = self._to_error("write to, but not delete from,", error)
            raise PlaceDegradedError(
                f"{reason}; {self.locate(_PROBE_KEY)} is left there, and outputs can be stored"
            ) from None

    async def _write_whole(
        self, key: str, body: bytes, content_type: str | None, metadata: Mapping[str, str]
    ) -> Digest:
        digest = Digest(len(body), hashlib.sha256(body).hexdigest())
        attributes = self._attributes(content_type, {**metadata, "sha256": digest.sha256})
        try:
            result = await obstore.put_async(
                self._store, key, body, attributes=attributes, use_multipart=False
            )
        except (BaseError, OSError) as error:
            raise self._to_error("write to", error) from None
        await self._verify(
            key, hashlib.md5(body, usedforsecurity=False).hexdigest(), digest, result.get("e_tag")
        )
        return digest

    async def _verify(self, key: str, md5: str, digest: Digest, etag: str | None) -> None:
        """Compare an ETag that looks like an MD5. If it differs, read the object, once for all."""
        reported = (etag or "").strip('"').lower()
        if not self._etag_may_be_md5 or not _MD5.fullmatch(reported) or reported == md5:
            return
        if await compute_digest(self.read(key)) != digest:
            raise PlaceError(f"{self._url} holds other bytes than were sent")
        self._etag_may_be_md5 = False  # most likely the store encrypts

    async def _write_parts(self, key: str, source: "_Source", attributes: Any) -> Digest:
        upload = asyncio.ensure_future(
            obstore.put_async(
                self._store,
                key,
                source,
                attributes=attributes,
                chunk_size=PART_BYTES,
                max_concurrency=_CONCURRENT_PARTS,
            )
        )
        try:
            result = await asyncio.shield(upload)
        except asyncio.CancelledError:
            # A dropped upload would leave its parts in the bucket, invisible and billed. After an
            # error, obstore aborts it.
            source.stop()
            await asyncio.wait({upload}, timeout=_ABORT_SECONDS)
            upload.cancel()
            with suppress(BaseException):
                upload.exception()
            raise
        except (BaseError, OSError) as error:
            if source.failure is not None:
                raise source.failure from None
            raise self._to_error("write to", error) from None
        await self._verify(key, source.md5, source.digest, result.get("e_tag"))
        return source.digest

    def _attributes(self, content_type: str | None, metadata: Mapping[str, str]) -> Any:
        """Return the attributes of an object. Values are plain ASCII, which all clouds accept."""
        labels = {"Content-Type": content_type, "Cache-Control": self._cache_control}
        own = {name: _to_label(value) for name, value in metadata.items()}
        return {name: value for name, value in {**labels, **own}.items() if value}

    async def _head(self, key: str) -> Mapping[str, Any] | None:
        try:
            return dict(await obstore.head_async(self._store, key))
        except FileNotFoundError:
            return None
        except (BaseError, OSError) as error:
            raise self._to_error("read from", error) from None

    def _to_error(self, attempted: str, error: Exception) -> PlaceError:
        failure = f"can {attempted}" if "but" in attempted else f"cannot {attempted}"
        return to_place_error(f"{failure} {self._url}", error, self._store)


def _raw_root(url: str, store: Store) -> str | None:
    """Return a URL with its path as it stands in the names of objects; None for https, a real URL."""
    parts = urlsplit(url)
    if parts.scheme in {"http", "https"}:
        return None
    prefix = str(getattr(store, "prefix", unquote(parts.path)) or "").strip("/")
    return f"{parts.scheme}://{parts.netloc}/{prefix}".rstrip("/")


class _Source:
    """The chunks of one upload: hashed as they pass, ended by an error after `stop`."""

    def __init__(self, head: Sequence[bytes], rest: AsyncIterator[bytes]) -> None:
        self.failure: BaseException | None = None
        self._chunks = self._all(list(head), rest)
        self._stopped = asyncio.Event()
        self._size = 0
        self._sha256 = hashlib.sha256()
        self._part = hashlib.md5(usedforsecurity=False)
        self._parts: list[bytes] = []

    @property
    def md5(self) -> str:
        """The ETag of S3 for an upload in parts: the MD5 of the MD5 of each, and their number."""
        parts = [*self._parts, self._part.digest()] if self._size % PART_BYTES else self._parts
        return f"{hashlib.md5(b''.join(parts), usedforsecurity=False).hexdigest()}-{len(parts)}"

    @property
    def digest(self) -> Digest:
        return Digest(self._size, self._sha256.hexdigest())

    def stop(self) -> None:
        self._stopped.set()

    def __aiter__(self) -> "_Source":
        return self

    async def __anext__(self) -> bytes:
        coming = asyncio.ensure_future(anext(self._chunks, b""))
        stopping = asyncio.ensure_future(self._stopped.wait())
        try:
            await asyncio.wait({coming, stopping}, return_when=asyncio.FIRST_COMPLETED)
            chunk = self._check_not_stopped(coming)
        except BaseException as error:
            self.failure = error
            raise
        finally:
            stopping.cancel()
            if not coming.done():
                coming.cancel()
                await asyncio.wait({coming})
        if not chunk:
            raise StopAsyncIteration
        self._sha256.update(chunk)
        self._count(memoryview(chunk))
        return chunk

    def _check_not_stopped(self, coming: asyncio.Future[bytes]) -> bytes:
        if self._stopped.is_set():
            raise InterruptedError("the upload was cancelled")
        return coming.result()

    def _count(self, chunk: memoryview) -> None:
        while chunk:
            piece = chunk[: PART_BYTES - self._size % PART_BYTES]
            self._part.update(piece)
            self._size += len(piece)
            chunk = chunk[len(piece) :]
            if not self._size % PART_BYTES:
                self._parts.append(self._part.digest())
                self._part = hashlib.md5(usedforsecurity=False)

    async def _all(self, head: list[bytes], rest: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        while head:
            yield head.pop(0)
        async for chunk in rest:
            if chunk:
                yield chunk


def _to_label(text: str) -> str:
    """Return a text as plain ASCII, cut between characters."""
    text = text[:_MAX_LABEL]
    while len(label := quote(text, safe=_UNQUOTED)) > _MAX_LABEL:
        text = text[:-1]
    return label.strip()


async def _read_first_part(source: AsyncIterator[bytes]) -> list[bytes]:
    """Return chunks until they are larger than one part, or the source ends."""
    chunks: list[bytes] = []
    size = 0
    while size <= PART_BYTES:
        chunk = await anext(source, None)
        if chunk is None:
            break
        chunks.append(chunk)
        size += len(chunk)
    return chunks
