"""Decodes the content codings of a download, in threads. Called by `download.py`."""

import asyncio
from collections.abc import AsyncIterator, Sequence

import structlog

from receiver.errors import CodingError, DownloadFailedError, DownloadRefusedError
from receiver.net.codings import PIECE_BYTES, BodyDecoder, Codings

log = structlog.get_logger("receiver.net")


def decode_chunks(
    chunks: AsyncIterator[bytes], codings: Codings, *, max_bytes: int, host: str
) -> AsyncIterator[bytes]:
    """Return a body without its codings, in chunks like its own.

    A body without any is returned as it is. Iterating raises DownloadRefusedError where the decoded
    body is larger than `max_bytes` or a bomb, DownloadFailedError where it is not valid.
    """
    _log_ignored(host, codings.ignored)
    return _decode(chunks, codings, max_bytes, host) if codings.decodable else chunks


async def _decode(
    chunks: AsyncIterator[bytes], codings: Codings, max_bytes: int, host: str
) -> AsyncIterator[bytes]:
    parts, size, is_empty = list[bytes](), 0, True
    try:
        async for piece in _pieces(chunks, BodyDecoder(codings.decodable, max_bytes=max_bytes), host):
            parts.append(piece)
            size += len(piece)
            if size >= PIECE_BYTES:
                is_empty = False
                yield b"".join(parts)
                parts, size = [], 0
    except CodingError as error:
        kind = DownloadRefusedError if error.is_too_large else DownloadFailedError
        raise kind(f"{host}: {error}") from None
    if parts:
        yield b"".join(parts)
    elif is_empty:
        raise DownloadFailedError(f"{host} answered with an empty body")


async def _pieces(chunks: AsyncIterator[bytes], decoder: BodyDecoder, host: str) -> AsyncIterator[bytes]:
    async for chunk in chunks:
        pieces = decoder.decode(chunk)
        while (piece := await asyncio.to_thread(next, pieces, None)) is not None:
            yield piece
    pieces = decoder.finish()
    while (piece := await asyncio.to_thread(next, pieces, None)) is not None:
        yield piece
    _log_ignored(host, decoder.ignored)


def _log_ignored(host: str, codings: Sequence[str]) -> None:
    """Log what a `Content-Encoding` says and the bytes are not: a mistake of the uploader's."""
    if codings:
        log.info("download.encoding_ignored", host=host, content_encoding=", ".join(codings))
