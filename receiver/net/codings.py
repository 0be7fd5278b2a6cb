"""Content codings: which of them a body has, and its bytes without them. Pure.

For downloads and the API client. They ask for none, but media servers send what an uploader once
wrote into `Content-Encoding`, true or not. So the label alone decides nothing:

- gzip, deflate, br and zstd are decoded where the first bytes are of that coding. Where they are
  not, the label is wrong, and the bytes are passed on as they are.
- Other codings that exist cannot be decoded here; `parse_codings` names them.
- Any other word (`base64`, `aws-chunked`, `utf-8`) is no coding of the bytes, and is passed over.

Output comes in bounded pieces, whatever a body pretends to hold. What grows beyond the limit, or out
of proportion, is refused: media are compressed already, and grow little.
"""

import sys
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import brotli

from receiver.errors import CodingError

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

__all__ = ["PIECE_BYTES", "BodyDecoder", "Codings", "parse_codings"]

PIECE_BYTES = 512 * 1024
MAX_CODINGS = 3  # around one another

_DECODABLE = {"gzip": "gzip", "x-gzip": "gzip", "deflate": "deflate", "br": "br", "zstd": "zstd"}
_NOT_DECODABLE = frozenset({"compress", "x-compress", "exi", "pack200-gzip", "aes128gcm", "dcb", "dcz"})
_BEGINNING_BYTES = 64 * 1024  # decide whether a label is true
_MAX_GROWTH = 200
_FREE_BYTES = 64 * 1024 * 1024  # may be reached however much a body grows
_ZSTD_WINDOW: Mapping[int, int] = {
    zstd.DecompressionParameter.window_log_max: 23
}  # 8 MiB: RFC 9659 allows no more
_GZIP_START = b"\x1f\x8b\x08"
_ZSTD_START = b"\x28\xb5\x2f\xfd"
_ERRORS = (zlib.error, zstd.ZstdError, brotli.error)


@dataclass(frozen=True, slots=True)
class Codings:
    """What a `Content-Encoding` says, in the order in which the codings were applied."""

    decodable: tuple[str, ...] = ()
    """The codings to decode, if the bytes have them."""
    unknown: tuple[str, ...] = ()
    """Codings that exist, and that cannot be decoded here."""
    ignored: tuple[str, ...] = ()
    """Words that are no coding of the bytes."""


def parse_codings(header: str) -> Codings:
    """Return what a `Content-Encoding` says."""
    names = [name for word in header.split(",") if (name := word.strip().lower()) not in {"", "identity"}]
    return Codings(
        tuple(_DECODABLE[name] for name in names if name in _DECODABLE),
        tuple(name for name in names if name in _NOT_DECODABLE),
        tuple(name[:40] for name in names if name not in _DECODABLE and name not in _NOT_DECODABLE),
    )


class BodyDecoder:
    """Takes a body in parts, and returns it without its codings.

    `codings` are those of `Codings.decodable`. Methods raise CodingError.
    """

    def __init__(self, codings: Sequence[str], *, max_bytes: int) -> None:
        if len(codings) > MAX_CODINGS:
            raise CodingError(f"the body has more than {MAX_CODINGS} codings")
        self._layers = [_Layer(coding, max_bytes) for coding in reversed(codings)]

    @property
    def ignored(self) -> Sequence[str]:
        """The codings so far that the bytes did not have."""
        return [layer.coding for layer in self._layers if layer.is_ignored]

    def decode(self, data: bytes) -> Iterator[bytes]:
        """Take further bytes; yield what they decode to, in pieces of about `PIECE_BYTES`."""
        return _through(self._layers, data)

    def finish(self) -> Iterator[bytes]:
        """End the body; yield the rest. A body that ends within a coding raises CodingError."""
        for index, layer in enumerate(self._layers):
            for piece in layer.finish():
                yield from _through(self._layers[index + 1 :], piece)


def _through(layers: Sequence["_Layer"], data: bytes) -> Iterator[bytes]:
    if not layers:
        yield data
        return
    for piece in layers[0].decode(data):
        yield from _through(layers[1:], piece)


class _Layer:
    """One coding of a body: judged by the first bytes, then decoded or passed over."""

    def __init__(self, coding: str, max_bytes: int) -> None:
        self.coding = coding
        self.is_ignored = False
        self._max_bytes = max_bytes
        self._beginning = bytearray()
        self._stream: _Stream | None = None
        self._taken = self._given = 0

    def decode(self, data: bytes) -> Iterator[bytes]:
        if self._stream is None and not self.is_ignored:
            self._beginning += data
            if len(self._beginning) < _BEGINNING_BYTES:
                return
            data = self._judge()
        yield from self._decode(data)

    def finish(self) -> Iterator[bytes]:
        if self._stream is None and not self.is_ignored:
            yield from self._decode(self._judge())
        if self._stream is not None and not self._stream.is_complete:
            raise CodingError(f"the body ends in the middle of its coding ({self.coding})")

    def _judge(self) -> bytes:
        """Decide whether the beginning has this coding, and return it."""
        beginning, self._beginning = bytes(self._beginning), bytearray()
        self._stream = _open(self.coding, beginning[:_BEGINNING_BYTES])
        self.is_ignored = self._stream is None
        return beginning

    def _decode(self, data: bytes) -> Iterator[bytes]:
        stream = self._stream
        if stream is None:
            if data:
                yield data
            return
        self._taken += len(data)
        while True:
            try:
                piece = stream.decode(data)
            except _ERRORS:
                raise CodingError(f"the body is not valid {self.coding}") from None
            self._check_growth(len(piece))
            if piece:
                yield piece
            if not stream.has_more:
                return
            data = b""

    def _check_growth(self, size: int) -> None:
        self._given += size
        if self._given > self._max_bytes:
            raise CodingError(
                f"decoded, it is larger than the limit of {self._max_bytes} bytes", is_too_large=True
            )
        if self._given > _FREE_BYTES and self._given > _MAX_GROWTH * self._taken:
            raise CodingError(
                f"decoded, it is more than {_MAX_GROWTH} times as large as what was sent", is_too_large=True
            )


class _Stream(Protocol):
    """A decoder of one coding."""

    @property
    def has_more(self) -> bool:
        """Whether there is more output before further input, to be had with `decode(b"")`."""

    @property
    def is_complete(self) -> bool:
        """Whether the body may end here."""

    def decode(self, data: bytes) -> bytes:
        """Return at most about `PIECE_BYTES`."""


def _open(coding: str, beginning: bytes) -> _Stream | None:
    """Return a decoder for a body with this beginning, or None where it does not have the coding."""
    if coding == "gzip":
        return _Frames(lambda: _Zlib(31), _begins_gzip) if _begins_gzip(beginning) else None
    if coding == "zstd":
        return _Frames(_Zstd, _begins_zstd) if _begins_zstd(beginning) else None
    # The other two begin with no mark. `deflate` is zlib's format, and to some servers the bare one.
    candidates: Sequence[Callable[[], _Frame]] = (
        [_Brotli] if coding == "br" else [lambda: _Zlib(15), lambda: _Zlib(-15)]
    )
    return next((make() for make in candidates if beginning and _fits(make(), beginning)), None)


def _begins_gzip(data: bytes) -> bool | None:
    """Return whether a member of a gzip file begins here; None where there are too few bytes."""
    return data.startswith(_GZIP_START) or (None if _GZIP_START.startswith(data) else False)


def _begins_zstd(data: bytes) -> bool | None:
    """Return whether a frame of Zstandard begins here, also one that is skipped."""
    if len(data) < len(_ZSTD_START):
        return None
    return data.startswith(_ZSTD_START) or (data[0] & 0xF0 == 0x50 and data[1:4] == b"\x2a\x4d\x18")


def _fits(frame: "_Frame", beginning: bytes) -> bool:
    try:
        frame.decode(beginning)
    except _ERRORS:
        return False
    return not frame.rest


class _Frame(_Stream, Protocol):
    """A decoder of one frame of a coding."""

    @property
    def rest(self) -> bytes:
        """What came after the end of the frame."""


class _Zlib:
    """One stream of zlib; `window_bits` choose among its three formats."""

    def __init__(self, window_bits: int) -> None:
        self._inflate = zlib.decompressobj(window_bits)
        self._is_full = False

    @property
    def has_more(self) -> bool:
        return self._is_full and not self._inflate.eof

    @property
    def is_complete(self) -> bool:
        return self._inflate.eof

    @property
    def rest(self) -> bytes:
        return self._inflate.unused_data

    def decode(self, data: bytes) -> bytes:
        if self._inflate.eof:
            return b""
        piece = self._inflate.decompress(self._inflate.unconsumed_tail + data, PIECE_BYTES)
        self._is_full = bool(self._inflate.unconsumed_tail) or len(piece) >= PIECE_BYTES
        return piece


class _Zstd:
    """One frame of Zstandard."""

    def __init__(self) -> None:
        self._frame = zstd.ZstdDecompressor(options=_ZSTD_WINDOW)

    @property
    def has_more(self) -> bool:
        return not self._frame.eof and not self._frame.needs_input

    @property
    def is_complete(self) -> bool:
        return self._frame.eof

    @property
    def rest(self) -> bytes:
        return self._frame.unused_data

    def decode(self, data: bytes) -> bytes:
        return b"" if self._frame.eof else self._frame.decompress(data, PIECE_BYTES)


class _Brotli:
    """A Brotli stream. What comes after its end is an error of its library."""

    rest = b""

    def __init__(self) -> None:
        self._stream = brotli.Decompressor()
        self._is_full = False

    @property
    def has_more(self) -> bool:
        return self._is_full and not self._stream.is_finished()

    @property
    def is_complete(self) -> bool:
        return bool(self._stream.is_finished())

    def decode(self, data: bytes) -> bytes:
        if not data and self._stream.is_finished():
            return b""
        piece: bytes = self._stream.process(data, output_buffer_limit=PIECE_BYTES)
        self._is_full = len(piece) >= PIECE_BYTES or not self._stream.can_accept_more_data()
        return piece


class _Frames:
    """Frames one after another, as gzip and Zstandard allow. What is no further frame is ignored."""

    def __init__(self, make: Callable[[], _Frame], begins: Callable[[bytes], bool | None]) -> None:
        self._make = make
        self._begins = begins
        self._frame = make()
        self._after = b""
        self._is_over = False

    @property
    def has_more(self) -> bool:
        return self._frame.has_more or (self._frame.is_complete and self._begins(self._after) is True)

    @property
    def is_complete(self) -> bool:
        return self._frame.is_complete

    def decode(self, data: bytes) -> bytes:
        if self._is_over:
            return b""
        if self._frame.is_complete:
            data = self._after + data
            begins = self._begins(data)
            if not begins:
                self._after, self._is_over = data if begins is None else b"", begins is False
                return b""
            self._frame, self._after = self._make(), b""
        piece = self._frame.decode(data)
        if self._frame.is_complete:
            self._after = self._frame.rest
        return piece
