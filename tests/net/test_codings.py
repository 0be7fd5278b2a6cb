"""Content codings: what is decoded, what is passed over, and what is refused."""

import gzip
import random
import sys
import zlib
from collections.abc import Callable, Mapping, Sequence
from io import BytesIO

import brotli
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from receiver.emulator.media import make_media
from receiver.errors import CodingError
from receiver.net.codings import PIECE_BYTES, BodyDecoder, Codings, parse_codings

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

MIB = 1024 * 1024


def deflate_raw(data: bytes) -> bytes:
    deflate = zlib.compressobj(wbits=-15)
    return deflate.compress(data) + deflate.flush()


ENCODERS: Mapping[str, tuple[str, Callable[[bytes], bytes]]] = {
    "gzip": ("gzip", gzip.compress),
    "zlib": ("deflate", zlib.compress),
    "deflate": ("deflate", deflate_raw),
    "br": ("br", lambda data: brotli.compress(data, quality=3)),
    "zstd": ("zstd", zstd.compress),
}


def picture(kind: str) -> bytes:
    image = Image.effect_noise((64, 64), 90).convert("RGB")
    target = BytesIO()
    image.save(target, kind)
    return target.getvalue()


def emulated(output_type: str) -> bytes:
    media = make_media(output_type, "run_1/0", 200_000)
    return b"".join(media.read(0, media.size))


MEDIA: Mapping[str, bytes] = {
    **{kind: picture(kind) for kind in ("PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP", "AVIF")},
    **{kind: emulated(kind) for kind in ("imageUrl", "videoUrl", "audioUrl", "documentUrl")},
    "mp3": b"ID3\x04\x00\x00\x00\x00\x00\x23TSSE" + random.Random(1).randbytes(5000),
    "mpeg": b"\xff\xfb\x90\x64" + random.Random(2).randbytes(5000),
    "ogg": b"OggS\x00\x02" + random.Random(3).randbytes(5000),
    "flac": b"fLaC\x00\x00\x00\x22" + random.Random(4).randbytes(5000),
    "webm": b"\x1a\x45\xdf\xa3\x01\x00\x00\x00" + random.Random(5).randbytes(5000),
    "wav": b"RIFF\x24\x10\x00\x00WAVEfmt \x10\x00\x00\x00" + random.Random(6).randbytes(5000),
    "svg": b"<svg xmlns='http://www.w3.org/2000/svg'><rect width='9'/></svg>",
    "json": b'{"a": [1, 2, 3]}',
}


def decode(
    body: bytes, codings: Sequence[str], *, step: int = 0, max_bytes: int = 1 << 40
) -> tuple[bytes, list[str]]:
    """Return the body without its codings, and the codings that it did not have."""
    decoder = BodyDecoder(codings, max_bytes=max_bytes)
    found = bytearray()
    for start in range(0, len(body), step or len(body) or 1):
        for piece in decoder.decode(body[start : start + step] if step else body):
            assert 0 < len(piece) <= 2 * PIECE_BYTES
            found += piece
    for piece in decoder.finish():
        found += piece
    return bytes(found), list(decoder.ignored)


@pytest.mark.parametrize("step", [0, 1000, 70_001])
@pytest.mark.parametrize("name", ENCODERS)
def test_every_known_coding_is_decoded(name: str, step: int) -> None:
    """The bytes are the original ones, whatever the parts in which they come."""
    coding, encode = ENCODERS[name]
    body = random.Random(7).randbytes(300_000) + bytes(2 * MIB) + b"end"
    assert decode(encode(body), [coding], step=step) == (body, [])


@pytest.mark.parametrize("name", ENCODERS)
@given(body=st.binary(max_size=300), step=st.integers(1, 40))
def test_short_bodies_are_decoded(name: str, body: bytes, step: int) -> None:
    """Also an empty one, and byte by byte."""
    coding, encode = ENCODERS[name]
    assert decode(encode(body), [coding], step=step) == (body, [])


@pytest.mark.parametrize("coding", ["gzip", "deflate", "br", "zstd"])
@pytest.mark.parametrize("name", MEDIA)
def test_media_with_a_false_label_are_passed_on(name: str, coding: str) -> None:
    """Stores keep what an uploader wrote into `Content-Encoding`; the bytes are intact."""
    assert decode(MEDIA[name], [coding]) == (MEDIA[name], [coding])


def test_codings_around_one_another() -> None:
    """The last one is undone first; one that is named twice and was applied once is no harm."""
    body = bytes(5 * MIB)
    assert decode(gzip.compress(brotli.compress(body)), ["br", "gzip"]) == (body, [])
    assert decode(gzip.compress(MEDIA["PNG"]), ["gzip", "gzip"]) == (MEDIA["PNG"], ["gzip"])
    with pytest.raises(CodingError, match="more than 3"):
        decode(b"", ["gzip"] * 4)


@pytest.mark.parametrize("step", [0, 1, 13])
def test_frames_one_after_another(step: int) -> None:
    """Members of gzip and frames of Zstandard are all read; padding after them is not."""
    members = gzip.compress(b"a" * 1000) + gzip.compress(b"") + gzip.compress(b"b")
    assert decode(members + bytes(512), ["gzip"], step=step)[0] == b"a" * 1000 + b"b"
    skipped = b"\x50\x2a\x4d\x18\x04\x00\x00\x00skip"
    frames = skipped + zstd.compress(b"a" * 1000) + skipped + zstd.compress(b"b") + skipped
    assert decode(frames, ["zstd"], step=step)[0] == b"a" * 1000 + b"b"


@pytest.mark.parametrize("name", ENCODERS)
def test_a_body_that_ends_too_early_is_an_error(name: str) -> None:
    """A cut body without an announced length is never taken for a whole one."""
    coding, encode = ENCODERS[name]
    body = encode(random.Random(8).randbytes(200_000))
    for end in (len(body) // 2, len(body) - 1):
        with pytest.raises(CodingError, match="ends in the middle"):
            decode(body[:end], [coding])


@pytest.mark.parametrize("name", ENCODERS)
def test_a_body_that_is_broken_later_is_an_error(name: str) -> None:
    """Its beginning has the coding: it is never passed on as it is."""
    coding, encode = ENCODERS[name]
    body = bytearray(encode(random.Random(9).randbytes(400_000) + b"a" * 400_000))
    body[len(body) // 2 :] = b"\xff" * (len(body) - len(body) // 2)
    with pytest.raises(CodingError):
        decode(bytes(body), [coding])


def test_a_broken_beginning_of_gzip_is_an_error() -> None:
    """Its first bytes are gzip's: it is not taken for a wrong label."""
    body = bytearray(gzip.compress(random.Random(10).randbytes(1000)))
    body[10:20] = b"\xff" * 10
    with pytest.raises(CodingError, match="not valid gzip"):
        decode(bytes(body), ["gzip"])


@pytest.mark.parametrize("name", ENCODERS)
def test_a_bomb_is_refused_before_it_is_large(name: str) -> None:
    """Within the limit of size, growth out of proportion ends it; and so does the limit itself."""
    coding, encode = ENCODERS[name]
    bomb = encode(bytes(80 * MIB))
    sizes: list[int] = []

    def explode(max_bytes: int) -> None:
        for piece in BodyDecoder([coding], max_bytes=max_bytes).decode(bomb + b"\0" * 70_000):
            assert len(piece) <= 2 * PIECE_BYTES
            sizes.append(len(piece))

    for max_bytes, reason in ((1 << 40, "times as large"), (10 * MIB, "larger than the limit")):
        sizes.clear()
        with pytest.raises(CodingError, match=reason) as caught:
            explode(max_bytes)
        assert caught.value.is_too_large
        assert sum(sizes) <= min(max_bytes, 65 * MIB)


def test_a_bomb_within_another_coding_is_refused() -> None:
    bomb = gzip.compress(gzip.compress(bytes(80 * MIB)))
    with pytest.raises(CodingError) as caught:
        decode(bomb, ["gzip", "gzip"])
    assert caught.value.is_too_large


@pytest.mark.parametrize(
    ("header", "codings"),
    [
        ("", Codings()),
        ("identity", Codings()),
        (" GZIP , x-gzip,, ", Codings(("gzip", "gzip"))),
        ("deflate, br, zstd", Codings(("deflate", "br", "zstd"))),
        ("base64", Codings(ignored=("base64",))),
        ("aws-chunked,gzip", Codings(("gzip",), ignored=("aws-chunked",))),
        ("utf-8", Codings(ignored=("utf-8",))),
        ("compress", Codings(unknown=("compress",))),
        ("x" * 99, Codings(ignored=("x" * 40,))),
    ],
)
def test_what_a_header_says(header: str, codings: Codings) -> None:
    assert parse_codings(header) == codings
