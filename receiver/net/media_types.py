"""What a body is, by its first bytes; what its server says only refines that. Pure; for `download`.

Servers send media without a type, as `binary/octet-stream`, with a type twice, or as another type.
Some answer with an error page and status 200. The signatures of formats are those of puremagic;
pages and other documents of text, which have none, are recognized here.
"""

import mimetypes
import re
from collections.abc import Iterator, Mapping
from urllib.parse import urlsplit

import puremagic

from receiver.model import Output, OutputType

HEAD_BYTES = 4096
"""As many of the first bytes as are looked at."""

_SURE = 0.3
"""Least confidence of puremagic in a signature of three bytes.

Shorter ones, such as `BM`, count only if they agree with the server or with the type of the output.
"""
_UNSPECIFIC = frozenset(
    {
        "application/binary",
        "application/download",
        "application/force-download",
        "application/octet-stream",
        "application/x-download",
        "application/x-octet-stream",
        "binary/octet-stream",
        "unknown/unknown",
    }
)
_CONTAINERS = (
    ("application/zip", "application/epub+zip", "application/x-zip-compressed"),
    ("audio/flac", "audio/x-flac"),
    ("audio/mpeg", "audio/mp3", "audio/x-mpeg", "audio/mpeg3"),
    ("audio/wav", "audio/wave", "audio/x-wav", "audio/vnd.wave"),
    ("application/ogg", "audio/ogg", "audio/opus", "audio/vorbis", "video/ogg"),
    ("application/xml", "text/xml"),
    ("image/bmp", "image/x-bmp", "image/x-ms-bmp"),
    ("image/heif", "image/heic", "image/heif-sequence", "image/heic-sequence"),
    ("image/jpeg", "image/jpg", "image/pjpeg"),
    ("image/png", "image/apng", "image/x-png"),
    ("image/tiff", "image/x-adobe-dng"),
    ("image/vnd.adobe.photoshop", "image/x-photoshop", "application/x-photoshop"),
    ("text/html", "application/xhtml+xml"),
    ("video/mp4", "audio/mp4", "audio/x-m4a", "video/x-m4v", "video/3gpp", "application/mp4"),
    ("video/webm", "audio/webm"),
    ("video/x-matroska", "audio/x-matroska", "application/x-matroska"),
    ("video/x-msvideo", "video/avi", "video/msvideo"),
)
"""Types of one format. The first bytes show the format, the server may know which type it is."""
_FORMATS = {name: names[0] for names in _CONTAINERS for name in names}
_SIGNED = frozenset(
    {
        "application/pdf",
        "application/zip",
        "audio/aac",
        "audio/flac",
        "audio/mp4",
        "audio/mpeg",
        "audio/wav",
        "image/avif",
        "image/bmp",
        "image/gif",
        "image/heif",
        "image/jpeg",
        "image/jxl",
        "image/png",
        "image/tiff",
        "image/vnd.adobe.photoshop",
        "image/webp",
        "image/x-exr",
        "video/3gpp",
        "video/mp4",
        "video/mpeg",
        "video/ogg",
        "video/quicktime",
        "video/webm",
        "video/x-matroska",
        "video/x-msvideo",
    }
)
"""The types that a signature may show.

Others are rare, and their signatures short: they would overrule what a server knows.
"""
_USUAL_NAMES = {
    "application/ogg": "video/ogg",
    "audio/wave": "audio/wav",
    "audio/x-wav": "audio/wav",
    "image/x-ms-bmp": "image/bmp",
    "video/avi": "video/x-msvideo",
}
"""Types that puremagic calls otherwise."""
_BY_SUFFIX = {".m4a": "audio/mp4", ".3gp": "video/3gpp"}
"""Types of signatures to which puremagic gives none."""
_AS_SOUND = {"video/mp4": "audio/mp4", "video/ogg": "audio/ogg", "video/webm": "audio/webm"}
"""Types of formats that hold videos and sounds, for an output that is a sound."""
_FAMILIES: Mapping[str, str] = {
    OutputType.IMAGE: "image/",
    OutputType.VIDEO: "video/",
    OutputType.AUDIO: "audio/",
}
_NOUNS: Mapping[str, str] = {
    OutputType.IMAGE: "an image",
    OutputType.VIDEO: "a video",
    OutputType.AUDIO: "a sound",
}
_TEXTS = {
    "application/json": "a JSON document",
    "application/xml": "an XML document",
    "text/html": "an HTML page",
}
_OWN_XML = frozenset({"application/dash+xml", "application/xhtml+xml", "image/svg+xml"})
"""Types of XML that are known by their root element."""
_MARKUP = re.compile(
    rb"\s*+(?:(?><\?.*?\?>|<!--.*?-->|(?P<doctype><!doctype\s++(?P<name>[\w:.-]++)[^>\[]*+(?>\[[^\]]*+\]\s*+)?+>))\s*+)*+"
    rb"(?:<(?P<root>[a-z][\w:.-]*+))?",
    re.IGNORECASE | re.DOTALL,
)
_HTML = frozenset(
    b"a b body br center div font form h1 h2 head html iframe link meta p pre script style table"
    b" title".split()
)
_TYPES_OF_SUFFIXES = mimetypes.MimeTypes()  # without the files of the machine


def recognize(head: bytes, stated: str | None, output: Output) -> str | None:
    """Return the content type of a body that begins with `head`, or None if it is not known.

    `stated` is the server's `Content-Type`. It is returned as it is where it fits the bytes.
    """
    stated = _to_single(stated)
    media_type = _media_type(stated)
    text = _text_type(head, media_type)
    found = [(text, 1.0)] if text else list(_signatures(head, output))
    if any(_format(each) == _format(media_type) for each, _ in found):
        return stated
    is_specific = bool(stated) and media_type not in _UNSPECIFIC
    family = _FAMILIES.get(output.type, "-")
    fitting = [each for each, _ in found if each.startswith(family)]
    sure = [each for each, confidence in found if confidence >= _SURE]
    for candidates in ([each for each in fitting if each in sure], sure, [] if is_specific else fitting):
        if candidates:
            return candidates[0]
    return stated if is_specific else None


def describe_mismatch(content_type: str | None, output: Output) -> str | None:
    """Return what a body is in place of the media that an output is, or None if it may be the output.

    `an HTML page in place of an image`
    """
    noun = _TEXTS.get(_format(_media_type(content_type)))
    if noun is None:
        return None
    if output.type in _NOUNS:
        return f"{noun} in place of {_NOUNS[output.type]}"
    expected = _type_of_suffix(output.value)
    if expected is None or expected.startswith("text/") or _format(expected) in _TEXTS or "+" in expected:
        return None
    return f"{noun} in place of {expected}"


def _to_single(stated: str | None) -> str | None:
    """Return a stated type, or None if it names none, or several."""
    values = [value.strip() for value in (stated or "").split(",")]
    types = {_media_type(value) for value in values}
    (media_type, *others) = types
    return values[0] if not others and re.fullmatch(r"[\w.+-]+/[\w.+-]+", media_type) else None


def _media_type(content_type: str | None) -> str:
    return (content_type or "").partition(";")[0].strip().lower()


def _format(media_type: str) -> str:
    """Return the type that stands for the format of a type."""
    if media_type.startswith(("application/vnd.openxmlformats-", "application/vnd.oasis.")):
        return "application/zip"
    if media_type.endswith("+xml") and media_type not in _OWN_XML:
        return "application/xml"
    if media_type.endswith("+json"):
        return "application/json"
    return _FORMATS.get(media_type, media_type)


def _signatures(head: bytes, output: Output) -> Iterator[tuple[str, float]]:
    """Yield the types whose signature the bytes have, with puremagic's confidence, the best first."""
    try:
        found = puremagic.magic_string(head[:HEAD_BYTES])
    except (puremagic.PureError, ValueError):  # no signature, no bytes
        return
    for each in found:
        media_type = each.mime_type.lower() or _BY_SUFFIX.get(each.extension, "")
        media_type = _USUAL_NAMES.get(media_type, media_type)
        if _format(media_type) == "application/zip":
            media_type = "application/zip"  # the first bytes do not show what is inside
        if media_type in _SIGNED:
            is_sound = output.type == OutputType.AUDIO
            yield _AS_SOUND.get(media_type, media_type) if is_sound else media_type, each.confidence


def _text_type(head: bytes, stated: str) -> str | None:
    """Return the type of a document of text: by its root element, or as stated if it looks like it."""
    head = head[:HEAD_BYTES].removeprefix(b"\xef\xbb\xbf").lstrip()
    if head[:1] in {b"{", b"["} and _format(stated) == "application/json":
        return "application/json"
    if head[:1] != b"<":
        return None
    match = _MARKUP.match(head)
    assert match is not None, "every part of it is optional"
    name = (match["name"] or match["root"] or b"").lower().rpartition(b":")[2]
    if name in _HTML:
        return "text/html"
    if name == b"svg":
        return "image/svg+xml"
    if name == b"mpd":
        return "application/dash+xml"
    is_xml = head[:5].lower() == b"<?xml" or name == b"error"
    return "application/xml" if is_xml or _format(stated) == "application/xml" else None


def _type_of_suffix(url: str) -> str | None:
    try:
        return _TYPES_OF_SUFFIXES.guess_type(urlsplit(url).path.rpartition("/")[2])[0]
    except ValueError:
        return None
