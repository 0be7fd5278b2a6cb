"""Thumbnails: small, safe, and never a reason for a run to fail."""

import io
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from handlers.storage import Storage, StorageConfig
from handlers.storage.thumbnails import MAX_MEMORY, MAX_SCANS, SIDE, NoThumbnailError, make_thumbnail
from receiver.handler import THUMBNAIL, Done, MissingExtraError, SettledRun
from tests.support.media import MediaServer, page
from tests.support.patience import PATIENCE_SECONDS

ContextOf = Callable[..., Any]
KINDS = {
    "PNG": "image/png",
    "JPEG": "image/jpeg",
    "WEBP": "image/webp",
    "GIF": "image/gif",
    "BMP": "image/bmp",
}


def picture(
    kind: str = "PNG", size: tuple[int, int] = (1200, 600), mode: str = "RGB", **options: Any
) -> bytes:
    made = io.BytesIO()
    Image.linear_gradient("L").resize(size).convert(mode).save(made, kind, **options)
    return made.getvalue()


def open_webp(body: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(body), formats=["WEBP"])
    image.load()
    return image


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few bytes that claims to be huge."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0"))
        + chunk(b"IEND", b"")
    )


def repeat_scan(times: int) -> bytes:
    """A progressive JPEG with its last scan many times over: work without end in a few bytes."""
    body = picture("JPEG", progressive=True)
    scan = body.rindex(b"\xff\xda")
    return body[:scan] + body[scan:-2] * times + body[-2:]


@pytest.mark.parametrize("kind", KINDS)
def test_each_format_becomes_a_small_webp(kind: str) -> None:
    """In proportion, at most 512 pixels, the same bytes each time."""
    body = picture(kind)
    made = make_thumbnail(body, KINDS[kind])
    assert open_webp(made).size == (SIDE, SIDE // 2)
    assert made == make_thumbnail(body, f"{KINDS[kind]}; x=1")


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "I;16"])
def test_every_kind_of_pixel(mode: str) -> None:
    """Palettes, transparency, one bit and sixteen."""
    assert open_webp(make_thumbnail(picture(mode=mode), "image/png")).size == (SIDE, SIDE // 2)


def test_a_photo_stands_upright() -> None:
    """The orientation in EXIF is applied, and removed with all else."""
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x010E] = "private"
    made = open_webp(make_thumbnail(picture("JPEG", exif=exif), "image/jpeg"))
    assert made.size == (SIDE // 2, SIDE)
    assert not made.getexif()


def test_a_progressive_one_may_have_many_scans() -> None:
    """Ten are usual."""
    assert open_webp(make_thumbnail(repeat_scan(MAX_SCANS - 20), "image/jpeg")).size == (SIDE, SIDE // 2)


def test_small_ones_are_not_blown_up() -> None:
    """One pixel is one pixel."""
    assert open_webp(make_thumbnail(picture(size=(1, 1)), "image/png")).size == (1, 1)


@pytest.mark.parametrize(
    ("body", "content_type"),
    [
        (bomb(40_000, 40_000), "image/png"),
        (bomb(40_000, 1), "image/png"),
        (bomb(6_400, 6_400), "image/png"),
        (picture("WEBP", (5_000, 5_000), method=0), "image/webp"),
        (bomb(0, 5), "image/png"),
        (bomb(100, 100), "image/png"),
        (picture()[:500], "image/png"),
        (b"", "image/png"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n", "image/png"),
        (picture("JPEG"), "image/png"),
        (repeat_scan(MAX_SCANS), "image/jpeg"),
        (picture("TIFF"), "image/tiff"),
        (b"<svg/>", "image/svg+xml"),
        (picture(), None),
    ],
)
def test_what_has_no_thumbnail(body: bytes, content_type: str | None) -> None:
    """Bombs, broken files, wrong formats, unsupported formats."""
    with pytest.raises(NoThumbnailError):
        make_thumbnail(body, content_type)


LARGEST = """
import sys
from pathlib import Path
from handlers.storage.thumbnails import make_thumbnail

def peak():
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024

content_type = sys.argv[1]
make_thumbnail(Path("small").read_bytes(), content_type)
body = Path("large").read_bytes()
before = peak()
make_thumbnail(body, content_type)
print(peak() - before)
"""


@pytest.mark.parametrize(
    ("kind", "mode", "side"),
    [("PNG", "RGBA", 6_300), ("PNG", "LA", 6_300), ("JPEG", "CMYK", 6_300), ("WEBP", "RGB", 4_470)],
)
def test_the_largest_take_as_much_memory_as_is_said(
    tmp_path: Path, kind: str, mode: str, side: int
) -> None:
    """A small file must not exhaust the memory: all copies stay within the documented limit."""
    options = {"WEBP": {"method": 0}, "PNG": {"compress_level": 1}}.get(kind, {})
    for name, size in (("small", 16), ("large", side)):
        (tmp_path / name).write_bytes(picture(kind, (size, size), mode, **options))
    command = [sys.executable, "-c", LARGEST, KINDS[kind]]
    printed = subprocess.run(
        command, cwd=tmp_path, check=True, capture_output=True, text=True, timeout=PATIENCE_SECONDS
    ).stdout
    assert int(printed) <= MAX_MEMORY * 1.1


async def test_a_thumbnail_lies_beside_its_image_and_is_on_record(
    tmp_path: Path, run: SettledRun, media: MediaServer, context_of: ContextOf
) -> None:
    """Made once, and again only if missing; texts have none; the manifest lists outputs only."""
    body = picture()
    words = media.output("/words", page(b"x", "text/plain"), position=1, output_id="words")
    run = replace(run, outputs=(media.output("/a", page(body)), words))
    handler, context = Storage(StorageConfig(url=str(tmp_path), thumbnails=True)), context_of()
    assert await handler.handle(run, context) == Done({"files": 2, "bytes": len(body) + 1})
    file = tmp_path / "2026-11-24/run_1/out.png.thumb.webp"
    record = context.records[THUMBNAIL]
    assert record.location == file.as_uri()
    assert (record.size, record.content_type, record.output_id) == (
        file.stat().st_size,
        "image/webp",
        "out",
    )
    assert THUMBNAIL - 1 not in context.records
    stores, requests = context.stores, len(media.requests)
    await handler.handle(run, context)
    assert (context.stores, len(media.requests)) == (stores, requests)
    file.unlink()
    await handler.handle(run, context)
    assert open_webp(file.read_bytes()).size == (SIDE, SIDE // 2)
    assert len(media.requests) == requests


async def test_a_broken_image_does_not_fail_its_run(
    tmp_path: Path, run: SettledRun, media: MediaServer, context_of: ContextOf
) -> None:
    """The image is stored; the log says why it has no thumbnail."""
    run = replace(run, outputs=(media.output("/secret", page(bomb(40_000, 40_000))),))
    context = context_of()
    answer = await Storage(StorageConfig(url=str(tmp_path), thumbnails=True)).handle(run, context)
    assert isinstance(answer, Done)
    [(level, event, values)] = context.log.lines
    assert (level, event, values["position"]) == ("warning", "storage.no_thumbnail", 0)
    assert "Bomb" in values["reason"]
    assert "secret" not in str(values)


@pytest.mark.parametrize("overwrite", ["never", "same"])
async def test_a_file_of_someone_else_is_not_replaced_by_a_thumbnail(
    tmp_path: Path, run: SettledRun, media: MediaServer, context_of: ContextOf, overwrite: str
) -> None:
    """The existing file stays; the run succeeds."""
    file = tmp_path / "2026-11-24/run_1/out.png.thumb.webp"
    file.parent.mkdir(parents=True)
    file.write_bytes(b"mine")
    run = replace(run, outputs=(media.output("/a", page(picture())),))
    config = StorageConfig.model_validate(
        {"url": str(tmp_path), "thumbnails": True, "overwrite": overwrite}
    )
    context = context_of()
    assert isinstance(await Storage(config).handle(run, context), Done)
    assert file.read_bytes() == b"mine"
    assert THUMBNAIL not in context.records


def test_pillow_is_an_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without Pillow, only the option is refused."""
    monkeypatch.setitem(sys.modules, "PIL", None)
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    Storage(StorageConfig(url=str(tmp_path)))
    with pytest.raises(MissingExtraError, match=r"flora-receiver\[thumbnails\]"):
        Storage(StorageConfig(url=str(tmp_path), thumbnails=True))
