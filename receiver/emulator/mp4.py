"""A small MP4 made by hand: H.264 whose macroblocks are stored as they are (I_PCM), so no encoder is needed. Pure."""

import struct
from collections.abc import Iterable

__all__ = ["movie"]

_MACROBLOCKS = 4  # a side; a macroblock is 16 × 16 pixels
_SIDE = 16 * _MACROBLOCKS
_FRAMES = 8
_TIMESCALE = 8  # ticks a second, one tick a frame
_IDENTITY = struct.pack(">9I", 0x10000, 0, 0, 0, 0x10000, 0, 0, 0, 0x40000000)


class _Bits:
    """Bits as the H.264 standard writes them, most significant first."""

    def __init__(self) -> None:
        self._bits: list[str] = []

    def fixed(self, value: int, width: int) -> "_Bits":
        self._bits.append(f"{value:0{width}b}")
        return self

    def golomb(self, *values: int) -> "_Bits":
        """Append unsigned Exp-Golomb codes, ue(v)."""
        for value in values:
            code = f"{value + 1:b}"
            self._bits.append("0" * (len(code) - 1) + code)
        return self

    def align(self) -> "_Bits":
        self._bits.append("0" * (-sum(map(len, self._bits)) % 8))
        return self

    def raw(self, data: bytes) -> "_Bits":
        self._bits.append("".join(f"{byte:08b}" for byte in data))
        return self

    def unit(self, kind: int) -> bytes:
        """Return the NAL unit: its one-byte head, the bits closed by a stop bit, start codes escaped."""
        self.fixed(1, 1).align()
        text = "".join(self._bits)
        payload = int(text, 2).to_bytes(len(text) // 8, "big")
        return bytes((kind,)) + _escaped(payload)


def _escaped(payload: bytes) -> bytes:
    """Put a 3 between two zeros and anything up to 3: a decoder would take it for a start code."""
    out, zeros = bytearray(), 0
    for byte in payload:
        if zeros == 2 and byte <= 3:
            out.append(3)
            zeros = 0
        out.append(byte)
        zeros = zeros + 1 if byte == 0 else 0
    return bytes(out)


def movie(colour: bytes) -> bytes:
    """Return one second of 64 × 64 pixels whose shade moves; `colour` is at least three bytes."""
    frames = [_frame(number, colour) for number in range(_FRAMES)]
    head = _box(b"ftyp", b"isom", struct.pack(">I", 512), b"isomiso2avc1mp41")
    # The index stands before the data, as players on the web want it; its length does not depend on the offset.
    index = _index(frames, 0)
    index = _index(frames, len(head) + len(index) + 8)
    return head + index + _box(b"mdat", *frames)


def _parameter_sets() -> tuple[bytes, bytes]:
    """SPS (baseline, level 1.1, frames of our size, no reordering) and PPS."""
    sps = _Bits().raw(bytes((66, 0xC0, 11)))
    sps.golomb(0, 0, 2, 1).fixed(0, 1).golomb(_MACROBLOCKS - 1, _MACROBLOCKS - 1)
    sps.fixed(1, 1).fixed(1, 1).fixed(0, 1).fixed(0, 1)
    pps = _Bits().golomb(0, 0).fixed(0, 2).golomb(0, 0, 0).fixed(0, 3).golomb(0, 0, 0).fixed(0, 3)
    return sps.unit(0x67), pps.unit(0x68)


def _frame(number: int, colour: bytes) -> bytes:
    """One IDR picture, with its length before it."""
    bits = _Bits()
    # slice header: first macroblock, I slice, PPS 0, frame number, IDR id, its marking flags, no QP change
    bits.golomb(0, 7, 0).fixed(0, 4).golomb(number % 2).fixed(0, 2).golomb(0)
    for row in range(_MACROBLOCKS):
        for column in range(_MACROBLOCKS):
            # Video range, never 0: stored samples must not be.
            luma = 40 + (row * 24 + column * 24 + number * 8 + colour[0] % 64) % 180
            bits.golomb(25).align()  # mb_type I_PCM
            bits.raw(bytes((luma,)) * 256 + bytes((64 + colour[1] // 2,)) * 64 + bytes((64 + colour[2] // 2,)) * 64)
    unit = bits.unit(0x65)
    return struct.pack(">I", len(unit)) + unit


def _box(kind: bytes, *parts: bytes) -> bytes:
    body = b"".join(parts)
    return struct.pack(">I4s", len(body) + 8, kind) + body


def _full(kind: bytes, flags: int, *parts: bytes) -> bytes:
    return _box(kind, struct.pack(">I", flags), *parts)


def _numbers(*values: int) -> bytes:
    return struct.pack(f">{len(values)}I", *values)


def _index(frames: Iterable[bytes], offset: int) -> bytes:
    sizes = [len(frame) for frame in frames]
    sps, pps = _parameter_sets()
    avcc = _box(
        b"avcC",
        bytes((1, sps[1], sps[2], sps[3], 0xFF, 0xE1)) + struct.pack(">H", len(sps)) + sps,
        b"\x01" + struct.pack(">H", len(pps)) + pps,
    )
    entry = _box(
        b"avc1",
        bytes(6) + struct.pack(">H", 1) + bytes(16) + struct.pack(">HH", _SIDE, _SIDE),
        _numbers(0x480000, 0x480000, 0) + struct.pack(">H", 1) + bytes(32) + struct.pack(">Hh", 24, -1),
        avcc,
    )
    samples = _box(
        b"stbl",
        _full(b"stsd", 0, _numbers(1), entry),
        _full(b"stts", 0, _numbers(1, len(sizes), 1)),
        _full(b"stsc", 0, _numbers(1, 1, len(sizes), 1)),
        _full(b"stsz", 0, _numbers(0, len(sizes), *sizes)),
        _full(b"stco", 0, _numbers(1, offset)),
    )
    information = _box(
        b"minf",
        _full(b"vmhd", 1, bytes(8)),
        _box(b"dinf", _full(b"dref", 0, _numbers(1), _full(b"url ", 1))),
        samples,
    )
    media = _box(
        b"mdia",
        _full(b"mdhd", 0, _numbers(0, 0, _TIMESCALE, len(sizes)), struct.pack(">HH", 0x55C4, 0)),
        _full(b"hdlr", 0, bytes(4), b"vide", bytes(12), b"emulator\0"),
        information,
    )
    track = _full(
        b"tkhd",
        3,
        _numbers(0, 0, 1, 0, len(sizes)) + bytes(16) + _IDENTITY + _numbers(_SIDE << 16, _SIDE << 16),
    )
    header = _full(
        b"mvhd",
        0,
        _numbers(0, 0, _TIMESCALE, len(sizes), 0x10000) + struct.pack(">H", 0x100) + bytes(10),
        _IDENTITY + bytes(24) + _numbers(2),
    )
    return _box(b"moov", header, _box(b"trak", track, media))
