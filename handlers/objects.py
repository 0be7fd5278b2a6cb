"""An object store as a place for outputs: S3, Google, Azure or memory, through obstore."""

import hashlib
from collections.abc import AsyncIterable, AsyncIterator
from urllib.parse import quote, unquote

import obstore
from obstore.exceptions import BaseError
from obstore.store import ObjectStore as Store
from obstore.store import from_url

from handlers.places import PlaceError, Stored

PART_BYTES = 8 * 1024 * 1024
PARTS_AT_ONCE = 2  # with the part size, what one upload holds in memory
_PROBE = ".receiver-check"


class ObjectStore:
    """Objects under `url`. An upload appears as a whole or not at all; a cancelled one may leave an open multipart."""

    def __init__(self, url: str, store: Store | None = None) -> None:
        """ValueError where obstore cannot read the URL; credentials come from each cloud's usual environment."""
        self._url = url.rstrip("/")
        try:
            self._store = store or from_url(url)
        except (BaseError, ValueError) as exc:
            raise ValueError(f"not a place that can be written to: {_first_line(exc)}") from exc

    def locate(self, key: str) -> str:
        return f"{self._url}/{quote(key)}"

    def key_of(self, location: str) -> str | None:
        prefix = f"{self._url}/"
        return unquote(location.removeprefix(prefix)) if location.startswith(prefix) else None

    async def size(self, key: str) -> int | None:
        try:
            return (await obstore.head_async(self._store, key))["size"]
        except FileNotFoundError:
            return None
        except (BaseError, OSError) as exc:
            raise self._explained("read", exc) from exc

    async def put(
        self,
        key: str,
        chunks: AsyncIterable[bytes],
        *,
        content_type: str | None,
        expected: int | None,  # noqa: ARG002 - nothing to reserve
    ) -> Stored:
        digest = hashlib.sha256()
        size = 0

        async def hashed() -> AsyncIterator[bytes]:
            nonlocal size
            async for chunk in chunks:
                digest.update(chunk)
                size += len(chunk)
                yield chunk

        try:
            await obstore.put_async(
                self._store,
                key,
                hashed(),
                attributes={"Content-Type": content_type} if content_type else None,
                chunk_size=PART_BYTES,
                max_concurrency=PARTS_AT_ONCE,
            )
        except (BaseError, OSError) as exc:
            raise self._explained("write to", exc) from exc
        return Stored(size, digest.hexdigest())

    async def check(self) -> None:
        try:
            await obstore.put_async(self._store, _PROBE, b"probe")
            await obstore.delete_async(self._store, _PROBE)
        except (BaseError, OSError) as exc:
            raise self._explained("write to", exc) from exc

    async def close(self) -> None:
        pass

    def _explained(self, verb: str, exc: Exception) -> PlaceError:
        return PlaceError(f"cannot {verb} {self._url}: {_first_line(exc)}")


def _first_line(exc: Exception) -> str:
    return str(exc).partition("\n")[0]  # obstore adds pages of debug output
