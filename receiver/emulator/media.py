"""Valid media files of any size, made from a seed, for the media server and `receiver.testing`.

A file is held as a head, a unit that repeats, and a tail: some kilobytes, whatever its size. Any
range of it is read from these.
"""

import gzip
import hashlib
import math
import struct
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files

import brotli

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

__all__ = ["CHUNK", "Media", "encode_media", "file_type", "make_media", "make_text"]

CHUNK = 262_144
_UNIT = 65_536
_FREE_HEADER = 16

_FILE_TYPES = {
    "imageUrl": (".png", "image/png"),
    "videoUrl": (".mp4", "video/mp4"),
    "audioUrl": (".wav", "audio/wav"),
    "documentUrl": (".pdf", "application/pdf"),
}


_ENCODERS: Mapping[str, Callable[[bytes], bytes]] = {
    "gzip": gzip.compress,
    "deflate": zlib.compress,
    "br": brotli.compress,
    "zstd": zstd.compress,
}


def file_type(output_type: str) -> tuple[str, str]:
    """Return the extension and the content type of an output's file."""
    return _FILE_TYPES[output_type]


@dataclass(frozen=True, slots=True)
class Media:
    """One file: `head`, then `filling` bytes of the repeated `unit`, then `tail`."""

    head: bytes
    unit: bytes
    filling: int
    tail: bytes

    @property
    def size(self) -> int:
        return len(self.head) + self.filling + len(self.tail)

    def read(self, start: int, stop: int) -> Iterator[bytes]:
        """Yield the bytes from `start` up to `stop` in chunks of at most `CHUNK`."""
        stop = min(stop, self.size)
        while start < stop:
            piece = self._piece(start, min(stop, start + CHUNK))
            yield piece
            start += len(piece)

    def _piece(self, start: int, stop: int) -> bytes:
        """Return at least one byte from `start` on, none from `stop` on."""
        if start < len(self.head):
            return self.head[start:stop]
        start, stop = start - len(self.head), stop - len(self.head)
        if start < self.filling:
            stop = min(stop, self.filling)
            offset = start % len(self.unit)
            copies = math.ceil((offset + stop - start) / len(self.unit))
            return (self.unit * copies)[offset : offset + stop - start]
        return self.tail[start - self.filling : stop - self.filling]


def encode_media(media: Media, coding: str) -> Media:
    """Return a file in a content coding: gzip, deflate, br or zstd. Any other leaves it as it is."""
    encode = _ENCODERS.get(coding.lower())
    return media if encode is None else Media(encode(b"".join(media.read(0, media.size))), b"", 0, b"")


@lru_cache(maxsize=64)
def make_media(output_type: str, seed: str, size: int) -> Media:
    """Return a file of exactly `size` bytes, or of its natural size where that is larger.

    `seed` decides its colours, tone or text.
    """
    colour = hashlib.sha256(seed.encode()).digest()
    match output_type:
        case "imageUrl":
            return _png(colour, size)
        case "videoUrl":
            return _mp4(colour, size)
        case "audioUrl":
            return _wav(colour, size)
        case _:
            return _pdf(seed, size)


def make_text(seed: str, prompt: str) -> str:
    """Return the text of a text output."""
    return f"An emulated answer to: {prompt}\n({seed})"


def _noise(seed: bytes, length: int) -> bytes:
    return hashlib.shake_128(seed).digest(length)


def _png(colour: bytes, size: int) -> Media:
    """Return a gradient of 64 × 64 pixels, extended by ancillary chunks, which decoders skip."""
    side = 64
    rows = b"".join(
        b"\0" + b"".join(bytes((colour[0] ^ (x * 4), colour[1] ^ (y * 4), colour[2])) for x in range(side))
        for y in range(side)
    )
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    head = b"\x89PNG\r\n\x1a\n" + _png_chunk(b"IHDR", header) + _png_chunk(b"IDAT", zlib.compress(rows))
    end = _png_chunk(b"IEND", b"")
    unit = _png_chunk(b"flRa", _noise(colour, _UNIT - 12))
    missing = size - len(head) - len(end)
    if missing < len(_png_chunk(b"flRa", b"")):
        return Media(head, unit, 0, end)
    units = (missing - 12) // _UNIT
    return Media(head, unit, units * _UNIT, _png_chunk(b"flRa", bytes(missing - units * _UNIT - 12)) + end)


def _png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _mp4(colour: bytes, size: int) -> Media:
    """Return a second of 16 × 16 pixels, extended by a `free` box of noise, which players skip."""
    movie = files("receiver.emulator").joinpath("video.mp4").read_bytes()
    filling = max(len(colour), size - len(movie) - _FREE_HEADER)
    header = struct.pack(">I4sQ", 1, b"free", _FREE_HEADER + filling)  # 1: the size follows in 64 bits
    return Media(movie + header, _noise(colour, _UNIT), filling, b"")


def _wav(colour: bytes, size: int) -> Media:
    """Return a second of a tone, 8 kHz mono, extended by repetition.

    Beyond 4 GiB the header has the largest size, which means "until the end".
    """
    rate, frequency = 8000, 220 + 20 * (colour[0] % 16)
    tone = b"".join(
        struct.pack("<h", round(12000 * math.sin(math.tau * frequency * n / rate))) for n in range(rate)
    )
    length = max(size - 44, len(tone)) if size else len(tone)
    limit = 0xFFFFFFFF
    head = struct.pack("<4sI4s", b"RIFF", min(length + 36, limit), b"WAVE")
    head += struct.pack("<4sIHHIIHH", b"fmt ", 16, 1, 1, rate, rate * 2, 2, 16)
    head += struct.pack("<4sI", b"data", min(length, limit))
    return Media(head, tone, length, b"")


def _pdf(seed: str, size: int) -> Media:
    """Return a page with a line of text, extended by a stream that nothing refers to."""
    shown = f"BT /F1 24 Tf 40 100 Td ({seed}) Tj ET".encode()
    objects = [
        b"<< /Type /Catalog /Pages 2 0 R >>",
        b"<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
        (
            b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 600 200] /Contents 4 0 R"
            b" /Resources << /Font << /F1 << /Type /Font /Subtype /Type1 /BaseFont /Helvetica >> >> >> >>"
        ),
        b"<< /Length %d >>\nstream\n%s\nendstream" % (len(shown), shown),
    ]
    head, offsets = b"%PDF-1.4\n", []
    for number, content in enumerate(objects, 1):
        offsets.append(len(head))
        head += b"%d 0 obj\n%s\nendobj\n" % (number, content)
    offsets.append(len(head))

    def assemble(filling: int) -> tuple[bytes, bytes]:
        opened = head + b"5 0 obj\n<< /Length %015d >>\nstream\n" % filling
        closed = b"\nendstream\nendobj\n"
        table = b"".join(b"%010d 00000 n \n" % offset for offset in offsets)
        start = len(opened) + filling + len(closed)
        trailer = b"trailer\n<< /Size 6 /Root 1 0 R >>\nstartxref\n%015d\n%%%%EOF\n" % start
        return opened, closed + b"xref\n0 6\n0000000000 65535 f \n" + table + trailer

    # Numbers that depend on the size have fifteen digits, so head and tail keep their length.
    opened, closed = assemble(0)
    filling = max(0, size - len(opened) - len(closed))
    opened, closed = assemble(filling)
    return Media(opened, _noise(seed.encode(), _UNIT), filling, closed)
