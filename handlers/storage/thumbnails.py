"""Thumbnails of stored images. `writer` calls it in a thread, since Pillow blocks.

Images come from outside. Few formats are opened, pixels are counted before any is decoded, and a
broken or too large image has no thumbnail.
"""

import io
import warnings
from collections.abc import Mapping
from importlib import import_module
from typing import Any

from receiver.handler import needs

CONTENT_TYPE = "image/webp"
SUFFIX = ".thumb.webp"
SIDE = 512
MAX_BYTES = 32 * 1024 * 1024
MAX_MEMORY = 320_000_000  # bytes; 8K video has 33 million pixels
_MAX_SIDE = 32_768
MAX_SCANS = 100  # of a progressive JPEG, about ten are usual; each is a pass over all pixels
_SCAN = b"\xff\xda"

_BYTES_PER_PIXEL = {"WEBP": 16}
"""Worst case of decoding, with several copies at once. Default: 8."""

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
    """An image gets no thumbnail. The message says why, for the log."""


def has_thumbnail(content_type: str | None) -> bool:
    return _format(content_type) is not None


def require_pillow() -> None:
    """Raise MissingExtraError if Pillow is not installed."""
    with needs("flora-receiver[thumbnails]"):
        import_module("PIL.Image")


def make_thumbnail(body: bytes, content_type: str | None) -> bytes:
    """Return a WebP of at most 512 × 512 pixels, the same for the same bytes.

    Raises NoThumbnailError.
    """
    from PIL import Image, ImageOps  # an extra

    kind = _format(content_type)
    if kind is None:
        raise NoThumbnailError(f"{content_type} is not a supported format")
    if kind == "JPEG" and body.count(_SCAN) > MAX_SCANS:
        raise NoThumbnailError(f"more than {MAX_SCANS} scans are too many")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(body), formats=[kind]) as image:
                _check_size(kind, image.size)
                image.verify()
            with Image.open(io.BytesIO(body), formats=[kind]) as image:
                picture: Any = image
                image.draft(None, (2 * SIDE, 2 * SIDE))  # decodes a JPEG in a smaller size
                if image.mode not in _PLAIN_MODES:
                    picture = image.convert("RGBA" if image.has_transparency_data else "RGB")
                picture.thumbnail((SIDE, SIDE))
                ImageOps.exif_transpose(picture, in_place=True)
                result = io.BytesIO()
                picture.save(result, "WEBP", quality=80, method=4)
    except NoThumbnailError:
        raise
    except Exception as error:
        raise NoThumbnailError(f"cannot be opened as {kind}: {type(error).__name__}") from error
    return result.getvalue()


def _format(content_type: str | None) -> str | None:
    return _FORMATS.get((content_type or "").partition(";")[0].strip().lower())


def _check_size(kind: str, size: tuple[int, int]) -> None:
    width, height = size
    if width * height * _BYTES_PER_PIXEL.get(kind, 8) > MAX_MEMORY or max(size) > _MAX_SIDE:
        raise NoThumbnailError(f"{width} × {height} pixels are too many")
