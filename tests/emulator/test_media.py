"""Media: valid files of any size, ranges, and every way a download can go wrong."""

import asyncio
import struct
import wave
import zlib
from io import BytesIO

import httpx
import pytest

from receiver.emulator.media import make_media
from receiver.net.codings import BodyDecoder, parse_codings
from tests.emulator.conftest import Bench

KINDS = {
    "emu-image": ("imageUrl", "image/png"),
    "emu-video": ("videoUrl", "video/mp4"),
    "emu-audio": ("audioUrl", "audio/wav"),
    "emu-document": ("documentUrl", "application/pdf"),
}
SIZES = (0, 70_000, 65_536 * 3 + 9, 1_000_001)


def whole(output_type: str, size: int) -> bytes:
    media = make_media(output_type, "run_1/0", size)
    found = b"".join(media.read(0, media.size))
    assert len(found) == media.size
    assert media.size == size or not size
    return found


def chunks_of(png: bytes) -> list[bytes]:
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    kinds, position = [], 8
    while position < len(png):
        (length,) = struct.unpack_from(">I", png, position)
        named = png[position + 4 : position + 8 + length]
        assert struct.unpack_from(">I", png, position + 8 + length) == (zlib.crc32(named),)
        kinds.append(named[:4])
        position += length + 12
    return kinds


def boxes_of(data: bytes) -> list[bytes]:
    kinds, position = [], 0
    while position < len(data):
        length, kind = struct.unpack_from(">I4s", data, position)
        if length == 1:
            (length,) = struct.unpack_from(">Q", data, position + 8)
        kinds.append(kind)
        position += length
    assert position == len(data)
    return kinds


@pytest.mark.parametrize("size", SIZES)
def test_files_are_valid_at_any_size(size: int) -> None:
    """Structure and checksums hold, and the size is exact."""
    kinds = chunks_of(whole("imageUrl", size))
    assert (kinds[0], kinds[1], kinds[-1]) == (b"IHDR", b"IDAT", b"IEND")
    assert boxes_of(whole("videoUrl", size)) == [b"ftyp", b"moov", b"mdat", b"free"]
    with wave.open(BytesIO(whole("audioUrl", size))) as sound:
        assert (sound.getnchannels(), sound.getframerate()) == (1, 8000)
        assert len(sound.readframes(sound.getnframes())) >= 16_000
    pdf = whole("documentUrl", size)
    start = int(pdf.rpartition(b"startxref\n")[2].split()[0])
    assert pdf[start : start + 4] == b"xref"


@pytest.mark.parametrize("output_type", [kind for kind, _ in KINDS.values()])
def test_any_piece_is_the_same_piece(output_type: str) -> None:
    """Reading from the middle gives what reading from the start gave."""
    data = whole(output_type, 300_001)
    media = make_media(output_type, "run_1/0", 300_001)
    for start, stop in ((0, 1), (5, 299_999), (65_000, 200_000), (299_000, 300_001), (300_001, 400_000)):
        assert b"".join(media.read(start, stop)) == data[start:stop]


@pytest.mark.parametrize("size", [0, 70_000])
def test_a_video_belongs_to_its_seed(size: int) -> None:
    """Another seed makes another file; the same seed makes the same file again."""
    first, again, other = (
        b"".join(media.read(0, media.size))
        for media in (make_media("videoUrl", seed, size) for seed in ("run_1/0", "run_1/0", "run_2/0"))
    )
    assert first == again != other


def test_a_size_beyond_memory_costs_nothing() -> None:
    """Four tebibytes are described, and any place in them can be read."""
    media = make_media("videoUrl", "run_1/0", 2**42)
    assert media.size == 2**42
    assert len(b"".join(media.read(2**41, 2**41 + 100_000))) == 100_000


@pytest.mark.parametrize("technique", KINDS)
async def test_outputs_are_served(bench: Bench, technique: str) -> None:
    """Public, with the right type and length; HEAD has the same headers and no body."""
    url = await bench.media_url(technique)
    async with httpx.AsyncClient(trust_env=False) as stranger:
        got, head = await stranger.get(url), await stranger.head(url)
    assert got.headers["content-type"] == KINDS[technique][1]
    assert len(got.content) == int(got.headers["content-length"]) == int(head.headers["content-length"])
    assert head.content == b""


async def test_text_is_inline(bench: Bench) -> None:
    """For a text, `url` holds the text."""
    assert "a lighthouse" in await bench.media_url("emu-text")


async def test_size_by_input_and_by_fault(bench: Bench) -> None:
    """Both ways give exactly that many bytes, also beyond one chunk."""
    inputs = [
        {"id": "prompt", "type": "text", "value": "x"},
        {"id": "size", "type": "text", "value": "3MiB"},
    ]
    url = await bench.media_url("emu-audio", body={"inputs": inputs})
    assert len((await bench.client.get(url)).content) == 3 * 2**20
    url = await bench.media_url(faults={"kind": "size", "bytes": 5 * 2**30})
    assert (await bench.client.head(url)).headers["content-length"] == str(5 * 2**30)


@pytest.mark.parametrize(
    ("requested", "status", "piece"),
    [
        ("bytes=0-99", 206, slice(0, 100)),
        ("bytes=100-", 206, slice(100, None)),
        ("bytes=-10", 206, slice(-10, None)),
        ("bytes=50-999999999", 206, slice(50, None)),
        ("bytes=9-5", 200, slice(None)),
        ("lines=1-2", 200, slice(None)),
        ("bytes=-", 200, slice(None)),
        ("bytes=999999999-", 416, None),
        ("bytes=-0", 416, None),
    ],
)
async def test_ranges(bench: Bench, requested: str, status: int, piece: slice | None) -> None:
    """206 with the right piece, 416 beyond the end, the whole file for a malformed header."""
    url = await bench.media_url()
    full = await bench.client.get(url)
    part = await bench.client.get(url, headers={"range": requested})
    assert part.status_code == status
    if piece is not None:
        assert part.content == full.content[piece]
    if status == 206:
        start = range(len(full.content))[piece][0] if piece is not None else 0
        assert part.headers["content-range"].startswith(f"bytes {start}-")
    stale = await bench.client.get(url, headers={"range": requested, "if-range": '"other"'})
    assert stale.content == full.content


async def test_missing_outputs(bench: Bench) -> None:
    """No output before the end, none beyond the last, none under another name."""
    url = await bench.media_url()
    waiting = await bench.run_id(faults={"kind": "run_seconds", "seconds": 3600})
    for wrong in (
        url.replace(".png", ".mp4"),
        url.replace("/0.", "/1."),
        f"{bench.origin}/media/{waiting}/0.png",
    ):
        assert (await bench.client.get(wrong)).status_code == 404


@pytest.mark.parametrize(
    "fault",
    [{"kind": "cut", "after_bytes": 1000}, {"kind": "cut"}, {"kind": "wrong_length", "delta": 500}],
)
async def test_downloads_that_break_off(bench: Bench, fault: dict[str, object]) -> None:
    """Fewer bytes come than were announced, and the connection closes."""
    url = await bench.media_url(faults=fault)
    with pytest.raises(httpx.RemoteProtocolError):
        await bench.client.get(url)


async def test_a_length_that_is_too_small(bench: Bench) -> None:
    """The file ends early and looks whole."""
    url = await bench.media_url()
    whole_file = await bench.client.get(url)
    await bench.break_it({"kind": "wrong_length", "delta": -500})
    assert (await bench.client.get(url)).content == whole_file.content[:-500]


async def test_stall(bench: Bench) -> None:
    """After the first bytes nothing comes until the emulator closes; then the rest follows."""
    url = await bench.media_url(faults={"kind": "stall", "after_bytes": 1000})
    async with bench.client.stream("GET", url) as answer:
        pieces = answer.aiter_raw()
        first = await anext(pieces)
        rest = asyncio.ensure_future(anext(pieces))
        assert not (await asyncio.wait((rest,), timeout=0.05))[0]
        await bench.emulator.aclose()
        received = len(first) + len(await rest) + sum([len(piece) async for piece in pieces])
    assert received == int(answer.headers["content-length"])


async def test_expired_redirect_and_type(bench: Bench) -> None:
    """403 (or 404), a redirect to anywhere, a wrong content type."""
    assert (await bench.client.get(await bench.media_url(faults={"kind": "expired"}))).status_code == 403
    gone = await bench.media_url(faults={"kind": "expired", "status": 404})
    assert (await bench.client.get(gone)).status_code == 404
    moved = await bench.media_url(faults={"kind": "redirect", "url": "http://169.254.169.254/latest"})
    assert (await bench.client.get(moved)).headers["location"] == "http://169.254.169.254/latest"
    typed = await bench.media_url(faults={"kind": "content_type", "value": "text/html"})
    assert (await bench.client.get(typed)).headers["content-type"] == "text/html"


async def test_media_faults_for_the_next_download(bench: Bench) -> None:
    """One download fails, and the next succeeds, as a retry needs it."""
    url = await bench.media_url()
    await bench.break_it({"kind": "expired", "next": 1, "path": "/media"})
    assert [(await bench.client.get(url)).status_code for _ in range(2)] == [403, 200]


async def test_public_origin(bench: Bench) -> None:
    """URLs follow the request, or the origin that is set."""
    bench.emulator.public_origin = "https://emulator.example/"
    run = await bench.start()
    assert str(run["poll_url"]).startswith(
        "https://emulator.example/api/v1/techniques/tech_emu_image/runs/run_"
    )


@pytest.mark.parametrize("coding", ["gzip", "deflate", "br", "zstd", "base64"])
@pytest.mark.parametrize("is_applied", [True, False])
async def test_content_encoding(bench: Bench, coding: str, is_applied: bool) -> None:
    """The label, and the coding itself where it is one."""
    fault = {"kind": "content_encoding", "value": coding, "apply": is_applied}
    url = await bench.media_url(faults=fault)
    async with bench.client.stream("GET", url) as answer:
        sent = b"".join([part async for part in answer.aiter_raw()])
    assert answer.headers["content-encoding"] == coding
    assert len(sent) == int(answer.headers["content-length"])
    assert sent.startswith(b"\x89PNG") == (not is_applied or coding == "base64")
    decoder = BodyDecoder(parse_codings(coding).decodable, max_bytes=1 << 30)
    assert b"".join([*decoder.decode(sent), *decoder.finish()]).startswith(b"\x89PNG")


async def test_unavailable(bench: Bench) -> None:
    """A media server that asks to come back later."""
    url = await bench.media_url(faults={"kind": "unavailable", "retry_after": 7})
    answer = await bench.client.get(url)
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "7")
