"""Weighs what one attempt fetches, so that its lane follows what is learned on the way. Made by the dispatcher."""

from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import replace

from receiver.decide import lane_of
from receiver.model import Artifact, Event, Lane, Output
from receiver.net.download import Download


class TransferProgress:
    """Knows of each output how large it is, as far as it has been opened, and whether its bytes are safe."""

    def __init__(self, event: Event, outputs: Sequence[Output], artifacts: Sequence[Artifact] = ()) -> None:
        self._event = event
        self._outputs = tuple(outputs)
        self._sizes: dict[int, int] = {}
        self._stored = {artifact.position for artifact in artifacts if artifact.stored_at is not None}

    @property
    def lane(self) -> Lane:
        """Where this work belongs as things stand."""
        return lane_of(self._event, self._outputs, sizes=self._sizes, stored=self._stored)

    def stored(self, position: int) -> None:
        self._stored.add(position)

    @asynccontextmanager
    async def track(self, output: Output, opening: AbstractAsyncContextManager[Download]) -> AsyncIterator[Download]:
        """Open an output, and learn its size: what the server says, and what comes if that is more."""
        async with opening as download:
            if download.content_length is not None:
                self._sizes[output.position] = download.content_length
            yield replace(download, chunks=self._counted(output, download.chunks))

    async def _counted(self, output: Output, chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        received = 0
        async for chunk in chunks:
            received += len(chunk)
            self._sizes[output.position] = max(received, self._sizes.get(output.position, output.likely_bytes))
            yield chunk
        self._sizes[output.position] = received
