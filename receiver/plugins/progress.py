"""The transfers of one attempt: how large its outputs are, and which lane it belongs to.

Made by the dispatcher, which counts the running attempts of each lane.
"""

from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import replace

from receiver.decide import lane_of
from receiver.model import Artifact, Event, Lane, Output
from receiver.net.download import Download


class TransferProgress:
    """The size of each output as far as it is known, and the positions that are stored."""

    def __init__(self, event: Event, outputs: Sequence[Output], artifacts: Sequence[Artifact] = ()) -> None:
        self._event = event
        self._outputs = tuple(outputs)
        self._sizes: dict[int, int] = {}
        self._stored = {artifact.position for artifact in artifacts if artifact.stored_at is not None}

    @property
    def lane(self) -> Lane:
        """The lane of the attempt, by what is known of its outputs so far."""
        return lane_of(self._event, self._outputs, sizes=self._sizes, stored=self._stored)

    def mark_stored(self, position: int) -> None:
        """Record that the output at `position` is stored, and no longer counts."""
        self._stored.add(position)

    @asynccontextmanager
    async def track(
        self, output: Output, opening: AbstractAsyncContextManager[Download]
    ) -> AsyncIterator[Download]:
        """Open a download and record its size: as announced, or as received if that is more."""
        async with opening as download:
            if download.content_length is not None:
                self._sizes[output.position] = download.content_length
            yield replace(download, chunks=self._measure(output, download.chunks))

    async def _measure(self, output: Output, chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        received = 0
        async for chunk in chunks:
            received += len(chunk)
            known = self._sizes.get(output.position, output.likely_bytes)
            self._sizes[output.position] = max(received, known)
            yield chunk
        self._sizes[output.position] = received
