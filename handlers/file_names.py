"""File names: any text as one harmless path segment, and the extension of an output. Pure.

The handler `storage` builds keys from them, `command` names downloads and fills arguments.
"""

import hashlib
import re
from collections.abc import Mapping
from pathlib import PurePosixPath
from urllib.parse import urlsplit

from receiver.handler import Output, OutputType

_MAX_BYTES = 120

# Separators, what Windows forbids, control characters (of text direction too), lone surrogates.
FORBIDDEN = re.compile(
    r'[/\\<>:"|?*\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]'
)
_PORTS = tuple(f"{port}{n}" for port in ("COM", "LPT") for n in "0123456789¹²³")
_RESERVED = frozenset({"CON", "PRN", "AUX", "NUL", "CONIN$", "CONOUT$", *_PORTS})

_BY_CONTENT_TYPE = {
    "application/dash+xml": ".mpd",
    "application/json": ".json",
    "application/msword": ".doc",
    "application/pdf": ".pdf",
    "application/vnd.openxmlformats-officedocument.presentationml.presentation": ".pptx",
    "application/vnd.openxmlformats-officedocument.spreadsheetml.sheet": ".xlsx",
    "application/vnd.openxmlformats-officedocument.wordprocessingml.document": ".docx",
    "application/xml": ".xml",
    "application/zip": ".zip",
    "audio/aac": ".aac",
    "audio/flac": ".flac",
    "audio/mp3": ".mp3",
    "audio/mp4": ".m4a",
    "audio/mpeg": ".mp3",
    "audio/ogg": ".ogg",
    "audio/opus": ".opus",
    "audio/vnd.wave": ".wav",
    "audio/wav": ".wav",
    "audio/wave": ".wav",
    "audio/webm": ".weba",
    "audio/x-flac": ".flac",
    "audio/x-m4a": ".m4a",
    "audio/x-wav": ".wav",
    "image/apng": ".apng",
    "image/avif": ".avif",
    "image/bmp": ".bmp",
    "image/gif": ".gif",
    "image/heic": ".heic",
    "image/heif": ".heif",
    "image/jpeg": ".jpg",
    "image/jpg": ".jpg",
    "image/jxl": ".jxl",
    "image/png": ".png",
    "image/svg+xml": ".svg",
    "image/tiff": ".tiff",
    "image/vnd.adobe.photoshop": ".psd",
    "image/webp": ".webp",
    "image/x-exr": ".exr",
    "model/gltf+json": ".gltf",
    "model/gltf-binary": ".glb",
    "text/csv": ".csv",
    "text/html": ".html",
    "text/markdown": ".md",
    "text/plain": ".txt",
    "text/vtt": ".vtt",
    "video/3gpp": ".3gp",
    "video/mp4": ".mp4",
    "video/mpeg": ".mpg",
    "video/ogg": ".ogv",
    "video/quicktime": ".mov",
    "video/webm": ".webm",
    "video/x-m4v": ".m4v",
    "video/x-matroska": ".mkv",
    "video/x-msvideo": ".avi",
}
_BY_OUTPUT_TYPE: Mapping[str, str] = {
    OutputType.IMAGE: ".png",
    OutputType.VIDEO: ".mp4",
    OutputType.AUDIO: ".mp3",
    OutputType.DOCUMENT: ".pdf",
    OutputType.TEXT: ".txt",
}
_SUFFIX = re.compile(r"\.(?=[a-z0-9]*[a-z])[a-z0-9]{2,5}")


def file_extension(content_type: str | None, output: Output) -> str:
    """Return an output's extension, with dot, by content type, else URL, else output type."""
    if output.is_text:
        return ".txt"
    media_type = (content_type or "").partition(";")[0].strip().lower()
    return _BY_CONTENT_TYPE.get(media_type) or _url_suffix(output.value) or expected_extension(output)


def expected_extension(output: Output) -> str:
    """Return the extension that is likely before anything has been fetched."""
    return _BY_OUTPUT_TYPE.get(output.type, ".bin")


def _url_suffix(url: str) -> str | None:
    try:
        suffix = PurePosixPath(urlsplit(url).path).suffix.lower()
    except ValueError:
        return None
    return suffix if _SUFFIX.fullmatch(suffix) else None


def to_file_name(text: str) -> str:
    """Turn any text into one harmless path segment of at most 120 bytes.

    A text that had to be changed gets a short hash of the original, so that different texts stay
    different.
    """
    if not text:
        return "_"
    name = FORBIDDEN.sub("_", text).lstrip(". ").rstrip(". ")
    if is_reserved(name):
        name = f"_{name}"
    if name == text and len(name.encode()) <= _MAX_BYTES:
        return name
    return shorten(name or "_", _MAX_BYTES, original=text)


def is_reserved(name: str) -> bool:
    """Whether Windows keeps the name for a device, with or without an extension."""
    return name.partition(".")[0].rstrip().upper() in _RESERVED


def shorten(text: str, limit: int, *, original: str) -> str:
    """Cut `text` so that it fits into `limit` bytes together with a hash of `original`."""
    mark = "-" + hashlib.sha256(original.encode(errors="surrogatepass")).hexdigest()[:8]
    return text.encode()[: limit - len(mark)].decode(errors="ignore").rstrip(". ") + mark
