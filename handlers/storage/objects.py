"""An object store as a place for outputs: S3, Google or Azure, through obstore.

What fits into one part is held in memory and put by one request, its SHA-256 in its metadata. Anything larger streams
in parts. Either way the object appears as a whole or not at all, and is looked at afterwards: its size, and its ETag
where that is a checksum.
"""

import asyncio
import hashlib
import re
import secrets
from collections.abc import AsyncIterable, AsyncIterator, Mapping, Sequence
from contextlib import suppress
from typing import Any
from urllib.parse import quote, unquote

import obstore
from obstore.exceptions import BaseError, PermissionDeniedError
from obstore.store import ObjectStore as Store

from handlers.storage.clouds import explained
from handlers.storage.places import NO_METADATA, PlaceError, PlaceUnreachableError, Stored, digest

PART_BYTES = 8 * 1024 * 1024
PARTS_AT_ONCE = 2  # with the part size, what one upload holds in memory
READ_BYTES = 1024 * 1024
CHECK_SECONDS = 8.0  # whoever asks waits no longer than 10
ABORT_SECONDS = 3.0
SETTLE_SECONDS = 0.1
_PROBE = ".receiver-check-"
_PLAIN = " /:;,.+=@()"
_VALUE_CHARACTERS = 256  # S3 takes 2 KB in all: our own labels and four of the user's
_MD5 = re.compile(r"[0-9a-f]{32}(-\d+)?")


class ObjectStore:
    """Objects under `url`."""

    def __init__(self, url: str, store: Store, *, cache_control: str | None = None) -> None:
        self._url = url.rstrip("/")
        self._store = store
        self._cache_control = cache_control
        self._etag_may_be_md5 = True

    def locate(self, key: str) -> str:
        return f"{self._url}/{quote(key)}"

    def key_of(self, location: str) -> str | None:
        prefix = f"{self._url}/"
        return unquote(location.removeprefix(prefix)) if location.startswith(prefix) else None

    async def size(self, key: str) -> int | None:
        found = await self._head(key)
        return None if found is None else int(found["size"])

    async def read(self, key: str) -> AsyncIterator[bytes]:
        try:
            answer = await obstore.get_async(self._store, key)
            async for chunk in answer.stream(min_chunk_size=READ_BYTES):
                yield bytes(chunk)
        except FileNotFoundError:
            return
        except (BaseError, OSError) as exc:
            raise self._explained("read from", exc) from None

    async def put(
        self,
        key: str,
        chunks: AsyncIterable[bytes],
        *,
        content_type: str | None,
        expected: int | None,
        metadata: Mapping[str, str] = NO_METADATA,
    ) -> Stored:
        source = aiter(chunks)
        head = await _first_part(source)
        if sum(map(len, head)) <= PART_BYTES:
            stored = await self._put_small(key, b"".join(head), content_type, metadata)
        else:
            stored = await self._put_parts(key, _Source(head, source), self._attributes(content_type, metadata))
        found = await self.size(key)
        if found != stored.size:
            raise PlaceError(f"{self._url} holds {found} bytes of an object of {stored.size}")
        return stored

    async def check(self) -> None:
        """Write, read and delete an object."""
        try:
            async with asyncio.timeout(CHECK_SECONDS):
                await self._probe()
        except TimeoutError:
            raise PlaceUnreachableError(f"{self._url} did not answer within {CHECK_SECONDS:g} s") from None
        finally:
            await self.close()

    async def close(self) -> None:
        """Let obstore's threads let go of their last answer: a process that ends before that is aborted (SIGABRT)."""
        await asyncio.sleep(SETTLE_SECONDS)

    async def _probe(self) -> None:
        key = f"{_PROBE}{secrets.token_hex(4)}"
        doing = "write to"
        try:
            await obstore.put_async(self._store, key, b"probe")
            doing = "write to, but not read from,"
            await obstore.get_async(self._store, key)
            doing = "write to, but not delete from,"
            await obstore.delete_async(self._store, key)
            doing = "write to, but not tell what is missing from,"
            with suppress(FileNotFoundError):
                await obstore.head_async(self._store, key)
        except PermissionDeniedError as exc:
            raise self._explained(doing, exc) from None
        except (BaseError, OSError) as exc:
            raise self._explained(doing.partition(",")[0], exc) from None

    async def _put_small(self, key: str, body: bytes, content_type: str | None, metadata: Mapping[str, str]) -> Stored:
        stored = Stored(len(body), hashlib.sha256(body).hexdigest())
        attributes = self._attributes(content_type, {**metadata, "sha256": stored.sha256})
        try:
            answer = await obstore.put_async(self._store, key, body, attributes=attributes, use_multipart=False)
        except (BaseError, OSError) as exc:
            raise self._explained("write to", exc) from None
        await self._verify(key, hashlib.md5(body, usedforsecurity=False).hexdigest(), stored, answer.get("e_tag"))
        return stored

    async def _verify(self, key: str, md5: str, stored: Stored, etag: str | None) -> None:
        """Compare an ETag that looks like an MD5 with ours. Where a store's is something else, read once and remember."""
        told = (etag or "").strip('"').lower()
        if not self._etag_may_be_md5 or not _MD5.fullmatch(told) or told == md5:
            return
        if await digest(self.read(key)) != stored:
            raise PlaceError(f"{self._url} holds other bytes than were sent")
        self._etag_may_be_md5 = False  # encrypted by its store, most likely

    async def _put_parts(self, key: str, source: "_Source", attributes: Any) -> Stored:
        upload = asyncio.ensure_future(
            obstore.put_async(
                self._store,
                key,
                source,
                attributes=attributes,
                chunk_size=PART_BYTES,
                max_concurrency=PARTS_AT_ONCE,
            )
        )
        try:
            answer = await asyncio.shield(upload)
        except asyncio.CancelledError:
            # Dropped, an upload would leave its parts in the bucket, unseen and billed; an error makes obstore abort it.
            source.stop()
            await asyncio.wait({upload}, timeout=ABORT_SECONDS)
            upload.cancel()
            with suppress(BaseException):
                upload.exception()
            raise
        except (BaseError, OSError) as exc:
            if source.failure is not None:
                raise source.failure from None
            raise self._explained("write to", exc) from None
        await self._verify(key, source.md5, source.stored, answer.get("e_tag"))
        return source.stored

    def _attributes(self, content_type: str | None, metadata: Mapping[str, str]) -> Any:
        """Return what an object is labelled with: names of plain letters, values of plain ASCII, as all clouds take them."""
        labels = {"Content-Type": content_type, "Cache-Control": self._cache_control}
        own = {name: _label(value) for name, value in metadata.items()}
        return {name: value for name, value in {**labels, **own}.items() if value}

    async def _head(self, key: str) -> Mapping[str, Any] | None:
        try:
            return dict(await obstore.head_async(self._store, key))
        except FileNotFoundError:
            return None
        except (BaseError, OSError) as exc:
            raise self._explained("read from", exc) from None

    def _explained(self, doing: str, exc: Exception) -> PlaceError:
        start = f"can {doing}" if "but" in doing else f"cannot {doing}"
        return explained(f"{start} {self._url}", exc, self._store)


class _Source:
    """The chunks of one upload: hashed on their way, and ended by an error once `stop` is called."""

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
        """The ETag that S3 gives what came in parts: an MD5 of the MD5 of each, and their number."""
        parts = [*self._parts, self._part.digest()] if self._size % PART_BYTES else self._parts
        return f"{hashlib.md5(b''.join(parts), usedforsecurity=False).hexdigest()}-{len(parts)}"

    @property
    def stored(self) -> Stored:
        return Stored(self._size, self._sha256.hexdigest())

    def stop(self) -> None:
        self._stopped.set()

    def __aiter__(self) -> "_Source":
        return self

    async def __anext__(self) -> bytes:
        coming = asyncio.ensure_future(anext(self._chunks, b""))
        stopping = asyncio.ensure_future(self._stopped.wait())
        try:
            await asyncio.wait({coming, stopping}, return_when=asyncio.FIRST_COMPLETED)
            if self._stopped.is_set():
                raise InterruptedError("the upload was cancelled")  # noqa: TRY301 - as any failure of the source
            chunk = coming.result()
        except BaseException as exc:
            self.failure = exc
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


def _label(text: str) -> str:
    """Return a text as plain ASCII, cut behind a whole character."""
    text = text[:_VALUE_CHARACTERS]
    while len(label := quote(text, safe=_PLAIN)) > _VALUE_CHARACTERS:
        text = text[:-1]
    return label.strip()


async def _first_part(source: AsyncIterator[bytes]) -> list[bytes]:
    """Take chunks until they are more than one part, or all."""
    taken: list[bytes] = []
    size = 0
    while size <= PART_BYTES:
        chunk = await anext(source, None)
        if chunk is None:
            break
        taken.append(chunk)
        size += len(chunk)
    return taken
