"""How stored outputs are called: key templates, clean path segments, file extensions. Pure; for `handlers.storage`.

A key is a relative path with `/` between its segments. Its values come from outside (ids, metadata), its literal text
and its date formats from the configuration: only the latter may contain a `/`.
"""

import hashlib
import json
import re
import string
import unicodedata
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import urlsplit

from receiver.handler import Output, OutputType, SettledRun

VALUE_BYTES = 120
SEGMENT_BYTES = 200  # leaves room for `-{position}` within the 255 bytes that file systems allow
KEY_BYTES = 880  # leaves room for a prefix and the extension within the 1024 bytes that buckets allow

_TIMES = frozenset({"created_at", "started_at", "completed_at", "settled_at"})
_RUN_FIELDS = frozenset({"run_id", "run_type", "status", "technique_id", "workspace_id", "project_id"})
_OUTPUT_FIELDS = frozenset({"output_id", "output_type", "position", "ext"})
_FIELDS = _TIMES | _RUN_FIELDS | _OUTPUT_FIELDS
_FIELD = re.compile(r"(?P<name>\w+)(?:\[(?P<key>[^\[\]]+)\])?")
_POSITION = re.compile(r"(0?\d{1,2})?d?")  # of what `format` would take: no fillers, no megabytes
_DEFAULT_TIME = "%Y%m%dT%H%M%SZ"

# Separators, what Windows forbids, control characters (of text direction too) and lone surrogates.
_FORBIDDEN = re.compile(r'[/\\<>:"|?*\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]')
_PORTS = tuple(f"{port}{n}" for port in ("COM", "LPT") for n in "0123456789¹²³")
_RESERVED = frozenset({"CON", "PRN", "AUX", "NUL", "CONIN$", "CONOUT$", *_PORTS})

_BY_CONTENT_TYPE = {
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


def extension(content_type: str | None, output: Output) -> str:
    """Choose a file's extension, dot included: by content type, else the URL's own suffix, else by output type."""
    if output.is_text:
        return ".txt"
    media_type = (content_type or "").partition(";")[0].strip().lower()
    return _BY_CONTENT_TYPE.get(media_type) or _url_suffix(output.value) or expected_extension(output)


def expected_extension(output: Output) -> str:
    """Guess the extension before anything is fetched."""
    return _BY_OUTPUT_TYPE.get(output.type, ".bin")


def _url_suffix(url: str) -> str | None:
    try:
        suffix = PurePosixPath(urlsplit(url).path).suffix.lower()
    except ValueError:
        return None
    return suffix if _SUFFIX.fullmatch(suffix) else None


def clean(value: str) -> str:
    """Make any text one harmless path segment of at most 120 bytes.

    Whatever had to be changed is followed by a short hash of the whole, so that different texts stay different.
    """
    if not value:
        return "_"
    cleaned = _FORBIDDEN.sub("_", value).lstrip(". ").rstrip(". ")
    if cleaned.partition(".")[0].rstrip().upper() in _RESERVED:
        cleaned = f"_{cleaned}"
    if cleaned == value and len(cleaned.encode()) <= VALUE_BYTES:
        return cleaned
    return _shortened(cleaned or "_", VALUE_BYTES, of=value)


def _shortened(text: str, limit: int, *, of: str) -> str:
    """Cut `text` so that it fits into `limit` bytes together with a hash of the text that it comes from."""
    mark = "-" + hashlib.sha256(of.encode(errors="surrogatepass")).hexdigest()[:8]
    return text.encode()[: limit - len(mark)].decode(errors="ignore").rstrip(". ") + mark


@dataclass(frozen=True, slots=True)
class _Piece:
    literal: str
    name: str | None = None
    key: str = ""
    spec: str = ""


class KeyTemplate:
    """A parsed key template, such as `{completed_at:%Y-%m-%d}/{run_id}/{output_id}{ext}`; ValueError when it is wrong."""

    def __init__(self, text: str) -> None:
        self.text = text
        self._pieces = tuple(_parse(text))
        self.directory_names_run = any(
            piece.name == "run_id" and any("/" in later.literal + later.spec for later in self._pieces[index + 1 :])
            for index, piece in enumerate(self._pieces)
        )
        _check(text, self._fill(_SAMPLE_RUN, _SAMPLE_OUTPUT, ".ext"))

    def render(self, run: SettledRun, output: Output, ext: str) -> str:
        """Build the key of one output: a relative path of clean segments, the same for the same run and output."""
        *directories, name = self._fill(run, output, ext).split("/")
        stem, ext = (name[: -len(ext)], ext) if ext and name.endswith(ext) and name != ext else (name, "")
        limit = max(24, min(SEGMENT_BYTES, KEY_BYTES // (len(directories) + 1) - 1))
        return "/".join(_tidy(segment, limit) for segment in (*directories, stem)) + ext

    def _fill(self, run: SettledRun, output: Output, ext: str) -> str:
        return "".join(piece.literal + _value(piece, run, output, ext, clean) for piece in self._pieces)


class LabelTemplate:
    """A parsed text with the fields of a key, whose values stay as they are; ValueError when it is wrong."""

    def __init__(self, text: str) -> None:
        self._pieces = tuple(_parse(text))

    def render(self, run: SettledRun, output: Output, ext: str) -> str:
        return "".join(piece.literal + _value(piece, run, output, ext, str) for piece in self._pieces)


def _parse(text: str) -> Iterable[_Piece]:
    for literal, name, spec, conversion in string.Formatter().parse(text):
        if name is None:
            yield _Piece(literal)
            continue
        match = _FIELD.fullmatch(name)
        known = match and (match["name"] in _FIELDS if match["key"] is None else match["name"] == "metadata")
        if not match or not known:
            raise ValueError(f"unknown field {{{name}}}; there are {', '.join(sorted(_FIELDS))} and metadata[…]")
        if conversion or (spec and ("{" in spec or match["name"] not in _TIMES | {"position"})):
            raise ValueError(f"{{{name}}} takes no conversion, and a format only if it is a time or a position")
        if spec and match["name"] == "position" and not _POSITION.fullmatch(spec):
            raise ValueError(f"{{{name}}} takes no other format than a width, such as 03d")
        yield _Piece(literal, match["name"], match["key"] or "", spec or "")


def _check(text: str, sample: str) -> None:
    for segment in sample.split("/"):
        if not segment or segment.startswith(".") or segment != segment.rstrip(". "):
            raise ValueError(f"{text!r} must be a relative path: no empty part, none with dots or spaces at its ends")
    if _FORBIDDEN.search(sample.replace("/", "")):
        raise ValueError(f"{text!r} has characters that file names cannot have everywhere")


def _value(piece: _Piece, run: SettledRun, output: Output, ext: str, made: Callable[[str], str]) -> str:
    if piece.name is None:
        return ""
    own = {"output_id": output.output_id, "output_type": output.type, "metadata": run.metadata.get(piece.key)}
    if piece.name == "ext":
        return ext
    if piece.name == "position":
        return format(output.position, piece.spec)
    if piece.name in _TIMES:
        return _time(getattr(run, piece.name), piece.spec)
    return made(_text(own[piece.name] if piece.name in own else getattr(run, piece.name)))


def _time(at: datetime | None, spec: str) -> str:
    return "_" if at is None else at.astimezone(UTC).strftime(spec or _DEFAULT_TIME)


def _text(value: Any) -> str:
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True, ensure_ascii=False, default=str)


def _tidy(segment: str, limit: int) -> str:
    """Hold a whole segment, which may be made of several values, to what each value is held to."""
    tidy = segment.rstrip(". ") or "_"
    if tidy.startswith(".") or tidy.partition(".")[0].rstrip().upper() in _RESERVED:
        tidy = f"_{tidy}"
    return tidy if len(tidy.encode()) <= limit else _shortened(tidy, limit, of=segment)


class RunKeys:
    """The keys of one run's outputs: `-{position}` goes before the extension wherever two would be equal."""

    def __init__(self, template: KeyTemplate, run: SettledRun, taken: Mapping[int, str]) -> None:
        """`taken` is what earlier attempts have used, by position."""
        self._template = template
        self._run = run
        self._owners = {_fold(key): position for position, key in taken.items()}
        self._suffixes: dict[int, str] = {}
        planned: set[str] = set()
        for (
            output
        ) in run.outputs:  # by what can be known beforehand, so that it does not matter which download is first
            ext = expected_extension(output)
            key, suffix = template.render(run, output, ext), ""
            while _fold(_inserted(key, suffix, ext)) in planned:
                suffix += f"-{output.position}"
            planned.add(_fold(_inserted(key, suffix, ext)))
            self._suffixes[output.position] = suffix

    def output(self, output: Output, ext: str) -> str:
        key = _inserted(self._template.render(self._run, output, ext), self._suffixes[output.position], ext)
        return self._claimed(key, ext, output.position)

    def manifest(self, position: int, beside: str | None) -> str:
        """Name the manifest: in the directory of the key `beside`, or where an output would be if there is none."""
        beside = beside or self._template.render(self._run, Output(position=0, output_id="", type="", value=""), "")
        directory = beside.rpartition("/")[0]
        name = "run.json" if self._template.directory_names_run else f"{clean(self._run.run_id)}.run.json"
        return self._claimed(f"{directory}/{name}" if directory else name, ".json", position)

    def _claimed(self, key: str, ext: str, position: int) -> str:
        while self._owners.setdefault(_fold(key), position) != position:
            key = _inserted(key, f"-{abs(position)}", ext)
        return key


def _fold(key: str) -> str:
    """Make equal what some file systems do not tell apart: A and a, and the two spellings of ä."""
    return unicodedata.normalize("NFD", unicodedata.normalize("NFD", key).casefold())


def _inserted(key: str, suffix: str, ext: str) -> str:
    return f"{key[: -len(ext)]}{suffix}{ext}" if ext and key.endswith(ext) else key + suffix


_SAMPLE_AT = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
_SAMPLE_OUTPUT = Output(position=0, output_id="output", type="type", value="")
_SAMPLE_RUN = SettledRun(
    run_id="run",
    run_type="type",
    status="completed",
    technique_id="technique",
    workspace_id="workspace",
    project_id="project",
    outputs=(),
    metadata={},
    charged_cost=None,
    error_code=None,
    error_message=None,
    created_at=_SAMPLE_AT,
    started_at=_SAMPLE_AT,
    completed_at=_SAMPLE_AT,
    settled_at=_SAMPLE_AT,
    settled_by="poll",
    verdict=None,
)
