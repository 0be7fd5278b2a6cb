"""The interface of places for outputs, which local disks and object stores implement."""

import hashlib
from collections.abc import AsyncIterable, AsyncIterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Protocol

NO_METADATA: Mapping[str, str] = MappingProxyType({})


class PlaceError(Exception):
    """The place cannot be used now: full, not writable, credentials refused. For operators."""


class PlaceUnreachableError(PlaceError):
    """The place does not answer, or with an internal error. This may pass."""


class PlaceDegradedError(PlaceError):
    """The place can be used, with a flaw that operators should know of. Raised by `check` alone."""


@dataclass(frozen=True, slots=True)
class Digest:
    """The size of some content in bytes, and its SHA-256 in hex."""

    size: int
    sha256: str


class Place(Protocol):
    """A tree of files below one URL. Keys are relative paths. Every method may raise PlaceError."""

    def locate(self, key: str) -> str:
        """Return the URI of a key."""

    def key_of(self, location: str) -> str | None:
        """Return the key of a URI, or None if it is not in this place."""

    def earlier_location(self, key: str) -> str | None:
        """Return the URI that earlier versions gave to a key, or None if it is the same."""

    def earlier_key_of(self, location: str) -> str | None:
        """Return the key of such a URI, or None if it cannot be one."""

    async def size(self, key: str) -> int | None:
        """Return the size of a file in bytes, or None if it does not exist."""

    def read(self, key: str) -> AsyncIterator[bytes]:
        """Yield a file in chunks that fit into memory; nothing if it does not exist."""

    async def write(
        self,
        key: str,
        chunks: AsyncIterable[bytes],
        *,
        content_type: str | None,
        expected: int | None,
        metadata: Mapping[str, str] = NO_METADATA,
    ) -> Digest:
        """Write a file of `expected` bytes (None: not known), durable on return.

        It appears as a whole or not at all.
        """

    async def check(self) -> None:
        """Raise PlaceError if nothing can be written now."""

    async def close(self) -> None: ...


async def compute_digest(chunks: AsyncIterable[bytes]) -> Digest:
    """Return the digest of a stream, keeping none of it."""
    size, sha256 = 0, hashlib.sha256()
    async for chunk in chunks:
        size += len(chunk)
        sha256.update(chunk)
    return Digest(size, sha256.hexdigest())
