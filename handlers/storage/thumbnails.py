"""Small pictures of stored images, for the dashboard. Pure but for Pillow; `keeping` calls it in a thread.

Images come from outside: the formats are few, the pixels are counted before any is decoded, and what is broken or too
large has no thumbnail.
"""

import io
import warnings
from collections.abc import Mapping
from typing import Any

from receiver.handler import needs

CONTENT_TYPE = "image/webp"
SUFFIX = ".thumb.webp"
SIDE = 512
MAX_BYTES = 32 * 1024 * 1024
MAX_MEMORY = 320_000_000  # bytes; 8K video has 33 million pixels
MAX_SIDE = 32_768
MAX_SCANS = 100  # of a progressive JPEG, which has about ten; each goes over all pixels, and takes a few bytes
_SCAN = b"\xff\xda"

_BYTES_PER_PIXEL = {"WEBP": 16}
"""What decoding takes at its worst, several copies at once; 8 where nothing is said."""

_FORMATS: Mapping[str, str] = {
    "image/bmp": "BMP",
    "image/gif": "GIF",
    "image/jpeg": "JPEG",
    "image/jpg": "JPEG",
    "image/png": "PNG",
    "image/webp": "WEBP",
}
_PLAIN_MODES = frozenset({"L", "LA", "RGB", "RGBA"})


class NoThumbnailError(Exception):
    """This image has no thumbnail; the message says why, for the log."""


def can_be_shown(content_type: str | None) -> bool:
    return _format(content_type) is not None


def require_pillow() -> None:
    with needs("flora-receiver[thumbnails]"):
        import PIL.Image  # noqa: F401, PLC0415 - only who asks for thumbnails has it


def thumbnail(body: bytes, content_type: str | None) -> bytes:
    """Make a WebP of at most 512 × 512 pixels, or raise NoThumbnailError. The same bytes make the same picture."""
    from PIL import Image, ImageOps  # noqa: PLC0415

    kind = _format(content_type)
    if kind is None:
        raise NoThumbnailError(f"{content_type} is not among the formats that are opened")
    if kind == "JPEG" and body.count(_SCAN) > MAX_SCANS:
        raise NoThumbnailError(f"more than {MAX_SCANS} scans are too many")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(body), formats=[kind]) as image:
                _measure(kind, image.size)
                image.verify()
            with Image.open(io.BytesIO(body), formats=[kind]) as image:
                picture: Any = image
                image.draft(None, (2 * SIDE, 2 * SIDE))  # a JPEG is decoded small at once
                if image.mode not in _PLAIN_MODES:
                    picture = image.convert("RGBA" if image.has_transparency_data else "RGB")
                picture.thumbnail((SIDE, SIDE))
                ImageOps.exif_transpose(picture, in_place=True)
                made = io.BytesIO()
                picture.save(made, "WEBP", quality=80, method=4)
    except NoThumbnailError:
        raise
    except Exception as exc:
        raise NoThumbnailError(f"cannot be opened as {kind}: {type(exc).__name__}") from exc
    return made.getvalue()


def _format(content_type: str | None) -> str | None:
    return _FORMATS.get((content_type or "").partition(";")[0].strip().lower())


def _measure(kind: str, size: tuple[int, int]) -> None:
    width, height = size
    if width * height * _BYTES_PER_PIXEL.get(kind, 8) > MAX_MEMORY or max(size) > MAX_SIDE:
        raise NoThumbnailError(f"{width} × {height} pixels are too many")
