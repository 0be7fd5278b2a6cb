"""Where outputs can be put: what `handlers.storage` asks of a local disk and of an object store alike."""

import hashlib
from collections.abc import AsyncIterable, AsyncIterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Protocol

NO_METADATA: Mapping[str, str] = MappingProxyType({})


class PlaceError(Exception):
    """The place cannot be used now (full, not writable, credentials refused). The message is for operators."""


class PlaceUnreachableError(PlaceError):
    """Nobody answers there now, or only with an error of its own; that may pass."""


@dataclass(frozen=True, slots=True)
class Stored:
    """What was put: `size` in bytes, `sha256` in hex."""

    size: int
    sha256: str


class Place(Protocol):
    """A tree of objects under one URL. Keys are relative paths; every method may raise PlaceError."""

    def locate(self, key: str) -> str:
        """The URI of a key."""

    def key_of(self, location: str) -> str | None:
        """The key of a URI; None where it lies elsewhere."""

    async def size(self, key: str) -> int | None:
        """The size of what is there, in bytes; None where there is nothing."""

    def read(self, key: str) -> AsyncIterator[bytes]:
        """What is there, in pieces that fit into memory; nothing at all where there is nothing."""

    async def put(
        self,
        key: str,
        chunks: AsyncIterable[bytes],
        *,
        content_type: str | None,
        expected: int | None,
        metadata: Mapping[str, str] = NO_METADATA,
    ) -> Stored:
        """Write all chunks (`expected` bytes, where known), or nothing: no reader ever sees a part. Safe on return."""

    async def check(self) -> None:
        """Raise PlaceError if nothing could be put here now."""

    async def close(self) -> None: ...


async def digest(chunks: AsyncIterable[bytes]) -> Stored:
    """Measure and hash what comes, keeping none of it."""
    size, sha256 = 0, hashlib.sha256()
    async for chunk in chunks:
        size += len(chunk)
        sha256.update(chunk)
    return Stored(size, sha256.hexdigest())
