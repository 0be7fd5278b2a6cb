"""Keys of stored outputs: relative paths made from a template. Pure; the handler and writer use it.

Ids and metadata come from outside: each becomes one path segment at most. Only literal text and
time formats, which come from the configuration, may contain a `/`.
"""

import unicodedata
from collections.abc import Callable, Mapping
from datetime import UTC, datetime

from handlers.file_names import FORBIDDEN, expected_extension, is_reserved, shorten, to_file_name
from handlers.template import RUN_FIELDS, FieldKind, Fields, Placeholder, Template, run_text
from receiver.handler import Output, SettledRun

SEGMENT_BYTES = 200  # leaves room for `-{position}` within the 255 bytes that file systems allow
KEY_BYTES = 880  # leaves room for a prefix and the extension within the 1024 bytes that buckets allow

FIELDS: Fields = {
    **RUN_FIELDS,
    "output_id": FieldKind.TEXT,
    "output_type": FieldKind.TEXT,
    "position": FieldKind.NUMBER,
    "ext": FieldKind.TEXT,
}


class KeyTemplate:
    """A parsed key template, such as `{completed_at:%Y-%m-%d}/{run_id}/{output_id}{ext}`.

    ValueError if it cannot be parsed, or would not make relative paths of usable names.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        self._template = Template(text, FIELDS)
        self.directory_names_run = _directory_has_run_id(self._template)
        _check(text, self._fill(_SAMPLE_RUN, _SAMPLE_OUTPUT, ".ext"))

    def render(self, run: SettledRun, output: Output, ext: str) -> str:
        """Return the key of one output: always the same for the same run, output and extension."""
        *directories, name = self._fill(run, output, ext).split("/")
        stem, ext = (name[: -len(ext)], ext) if ext and name.endswith(ext) and name != ext else (name, "")
        limit = max(24, min(SEGMENT_BYTES, KEY_BYTES // (len(directories) + 1) - 1))
        return "/".join(_to_segment(segment, limit) for segment in (*directories, stem)) + ext

    def _fill(self, run: SettledRun, output: Output, ext: str) -> str:
        return self._template.fill(lambda field: _value(field, run, output, ext, to_file_name))


class LabelTemplate:
    """A template with the fields of a key, whose values stay as they are. ValueError if wrong."""

    def __init__(self, text: str) -> None:
        self._template = Template(text, FIELDS)

    def render(self, run: SettledRun, output: Output, ext: str) -> str:
        return self._template.fill(lambda field: _value(field, run, output, ext, str))


def _directory_has_run_id(template: Template) -> bool:
    """Whether `{run_id}` stands before a `/`."""
    has_run_id = False
    for part in template.parts:
        if isinstance(part, Placeholder) and part.name == "run_id":
            has_run_id = True
        elif has_run_id and "/" in (part if isinstance(part, str) else part.spec):
            return True
    return False


def _check(text: str, sample: str) -> None:
    for segment in sample.split("/"):
        if not segment or segment.startswith(".") or segment != segment.rstrip(". "):
            raise ValueError(
                f"{text!r} must be a relative path without empty parts, and no part may start "
                "with a dot or end with a dot or space"
            )
    if FORBIDDEN.search(sample.replace("/", "")):
        raise ValueError(f"{text!r} has characters that file names cannot have everywhere")


def _value(
    field: Placeholder, run: SettledRun, output: Output, ext: str, escape: Callable[[str], str]
) -> str:
    match field.name:
        case "ext":
            return ext
        case "position":
            return format(output.position, field.spec)
        case "output_id":
            return escape(output.output_id)
        case "output_type":
            return escape(output.type)
        case _:
            return run_text(run, field, escape)


def _to_segment(segment: str, limit: int) -> str:
    """Apply the rules for one value to a whole segment, which may consist of several values."""
    name = segment.rstrip(". ") or "_"
    if name.startswith(".") or is_reserved(name):
        name = f"_{name}"
    return name if len(name.encode()) <= limit else shorten(name, limit, original=segment)


class RunKeys:
    """The keys of one run's outputs. Equal keys get `-{position}` before the extension."""

    def __init__(self, template: KeyTemplate, run: SettledRun, taken: Mapping[int, str]) -> None:
        """`taken` holds the keys that earlier attempts have used, by position."""
        self._template = template
        self._run = run
        self._owners = {_fold(key): position for position, key in taken.items()}
        self._suffixes: dict[int, str] = {}
        planned: set[str] = set()
        # By the expected extensions, so that the order of downloads does not matter.
        for output in run.outputs:
            ext = expected_extension(output)
            key, suffix = template.render(run, output, ext), ""
            while _fold(_add_suffix(key, suffix, ext)) in planned:
                suffix += f"-{output.position}"
            planned.add(_fold(_add_suffix(key, suffix, ext)))
            self._suffixes[output.position] = suffix

    def output(self, output: Output, ext: str) -> str:
        """Return the key of an output that was downloaded with the extension `ext`."""
        key = self._template.render(self._run, output, ext)
        return self._claim(_add_suffix(key, self._suffixes[output.position], ext), ext, output.position)

    def manifest(self, position: int, beside: str | None) -> str:
        """Return the manifest's key: in the directory of the key `beside`, else of any output."""
        if beside is None:
            no_output = Output(position=0, output_id="", type="", value="")
            beside = self._template.render(self._run, no_output, "")
        directory = beside.rpartition("/")[0]
        name = (
            "run.json"
            if self._template.directory_names_run
            else f"{to_file_name(self._run.run_id)}.run.json"
        )
        return self._claim(f"{directory}/{name}" if directory else name, ".json", position)

    def _claim(self, key: str, ext: str, position: int) -> str:
        while self._owners.setdefault(_fold(key), position) != position:
            key = _add_suffix(key, f"-{abs(position)}", ext)
        return key


def _fold(key: str) -> str:
    """Make equal what some file systems take as equal: A and a, and the two encodings of ä."""
    return unicodedata.normalize("NFD", unicodedata.normalize("NFD", key).casefold())


def _add_suffix(key: str, suffix: str, ext: str) -> str:
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
