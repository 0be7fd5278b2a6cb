"""The check of a table against the inputs that its technique declares, before anything is started.

Pure. `make_job` turns a row into a job, or into its errors; `check_rows` does so for a whole table
and keeps 16 bytes of each key.
"""

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from receiver.cli.batch.table import Row, RowProblem
from receiver.cli.batch.templates import Template

_TYPES = {
    "image_url": "imageUrl",
    "video_url": "videoUrl",
    "audio_url": "audioUrl",
    "document_url": "documentUrl",
}
"""Older pages of FLORA's documentation write types with an underscore."""
_BATCH = re.compile(r"[^:/\\\x00-\x1f\x7f]{1,64}")
"""No colon, because two batches could then share a key."""
_LONGEST_KEY = 128
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


@dataclass(frozen=True, slots=True)
class DeclaredInput:
    """An input that a technique declares."""

    id: str
    type: str
    required: bool

    @property
    def is_url(self) -> bool:
        return self.type.endswith("Url")


@dataclass(frozen=True, slots=True)
class Technique:
    """A technique; `run_cost` in USD, None if FLORA does not say."""

    technique_id: str
    inputs: tuple[DeclaredInput, ...]
    run_cost: float | None


def to_technique(document: Mapping[str, Any], technique_id: str) -> Technique:
    """Return the technique in the response of `GET /techniques/{id}`, without malformed inputs.

    It has its own id, not the slug that was requested: otherwise the rows would look new to a
    command that names the technique differently.
    """
    inputs = []
    for each in document.get("inputs") or ():
        if isinstance(each, Mapping) and isinstance(each.get("id"), str):
            name = str(each.get("type") or "text")
            required = each.get("required", not each.get("optional", False))
            inputs.append(DeclaredInput(each["id"], _TYPES.get(name, name), bool(required)))
    cost = document.get("run_cost")
    if isinstance(cost, bool) or not isinstance(cost, int | float):
        cost = None
    own_id = document.get("technique_id")
    return Technique(
        own_id if isinstance(own_id, str) and own_id else technique_id,
        tuple(inputs),
        None if cost is None else float(cost),
    )


@dataclass(frozen=True, slots=True)
class Plan:
    """How rows become runs; `inputs` are in the order of their declaration."""

    technique: Technique
    batch: str
    inputs: tuple[tuple[DeclaredInput, Template], ...]
    key: Template
    name: Template
    columns: tuple[str, ...]
    """Every column that a row must have."""

    def idempotency_key(self, key: str) -> str:
        """Return the key under which the service knows a row; batches do not share keys."""
        return f"batch:{self.batch}:{key}"


@dataclass(frozen=True, slots=True)
class Job:
    """A row that is ready to start. `position` counts the rows of the file from 0."""

    position: int
    row: int
    key: str
    idempotency_key: str
    inputs: tuple[Mapping[str, str], ...]
    metadata: Mapping[str, Any] = field(repr=False)


def make_plan(
    technique: Technique,
    *,
    batch: str,
    maps: Sequence[str],
    key: str,
    name: str | None,
    columns: Sequence[str] | None,
    separator: str = ",",
) -> Plan | list[RowProblem]:
    """Return the plan, or every error in the options and in the table's header."""
    problems: list[RowProblem] = []
    templates = _parse_maps(maps, problems)
    problems += _check_maps(technique, templates)
    if not templates and not problems:
        problems.append(RowProblem(None, None, "no input is mapped: add --map 'input={column}'"))
    if not _BATCH.fullmatch(batch):
        rule = "a batch's name has at most 64 characters, without : / \\"
        problems.append(RowProblem(None, None, f"{batch!r} cannot name a batch ({rule}): use --batch"))
    keys = _parse_template("--key", key, problems)
    names = _parse_template("--name", key if name is None else name, problems)
    if keys is not None and not keys.columns:
        message = f"--key {key!r} names no column, so all rows would have the same key"
        problems.append(RowProblem(None, None, message))
    if problems or keys is None or names is None:
        return problems
    inputs = tuple((each, templates[each.id]) for each in technique.inputs if each.id in templates)
    used = (keys, names, *(template for _, template in inputs))
    needed = tuple(dict.fromkeys(column for template in used for column in template.columns))
    if columns is not None and (missing := [each for each in needed if each not in columns]):
        known = ", ".join(column for column in columns if column)
        message = (
            f"the file has no such column; it has: {known} (separated by {separator!r}: see --separator)"
        )
        return [RowProblem(None, column, message) for column in missing]
    return Plan(technique, batch, inputs, keys, names, needed)


def make_job(row: Row, plan: Plan, position: int) -> Job | list[RowProblem]:
    """Return what a row starts, or every error in it."""
    missing = [column for column in plan.columns if column not in row.values]
    if missing:
        return [RowProblem(row.number, column, "is missing") for column in missing]
    problems: list[RowProblem] = []
    inputs = _fill_inputs(row, plan, problems)
    if not inputs and not problems:
        problems.append(RowProblem(row.number, None, "has no value for any input"))
    key, name = plan.key.fill(row.values).strip(), plan.name.fill(row.values).strip()
    for what, template, text in (("key", plan.key, key), ("name", plan.name, name)):
        if (error := _find_key_error(text)) is not None:
            column = template.columns[0] if template.columns else None
            problems.append(RowProblem(row.number, column, f"the row's {what} {error}"))
    if problems:
        return problems
    return Job(
        position=position,
        row=row.number,
        key=key,
        idempotency_key=plan.idempotency_key(key),
        inputs=tuple(inputs),
        metadata={**row.values, "key": key, "name": name, "batch": plan.batch},
    )


def _fill_inputs(row: Row, plan: Plan, problems: list[RowProblem]) -> list[Mapping[str, str]]:
    inputs: list[Mapping[str, str]] = []
    for declared, template in plan.inputs:
        value = template.fill(row.values)
        column = template.columns[0] if template.columns else None
        if declared.is_url:
            value = value.strip()
        if not value.strip():
            if declared.required:
                message = f"is empty; input {declared.id!r} is required"
                problems.append(RowProblem(row.number, column, message))
        elif declared.is_url and (error := _find_url_error(value)):
            message = f"{error}; input {declared.id!r} is of type {declared.type}"
            problems.append(RowProblem(row.number, column, message))
        else:
            inputs.append({"id": declared.id, "type": declared.type, "value": value})
    return inputs


@dataclass(slots=True)
class Check:
    """The result of a check of the whole table; `problems` are the first of `wrong`, in order."""

    jobs: int = 0
    wrong: int = 0
    problems: list[RowProblem] = field(default_factory=list)
    digests: set[bytes] = field(default_factory=set)

    def has_key(self, idempotency_key: str) -> bool:
        """Return whether this key belongs to a row of the table."""
        return _digest(idempotency_key) in self.digests


def check_rows(rows: Iterable[Row | RowProblem], plan: Plan, *, keep: int | None = 50) -> Check:
    """Check every row; keep the first `keep` problems (None: all) and count the others."""
    check = Check()

    def add(problem: RowProblem) -> None:
        check.wrong += 1
        if keep is None or len(check.problems) < keep:
            check.problems.append(problem)

    for row in rows:
        job = [row] if isinstance(row, RowProblem) else make_job(row, plan, check.jobs)
        if isinstance(job, list):
            for problem in job:
                add(problem)
        else:
            check.jobs += 1
        if isinstance(row, RowProblem) or plan.key.find_missing(row.values):
            continue
        if key := plan.key.fill(row.values).strip():
            digest = _digest(plan.idempotency_key(key))
            if digest in check.digests:
                message = f"has the key {key[:80]!r} of an earlier row: keys must differ"
                add(RowProblem(row.number, plan.key.columns[0], message))
            check.digests.add(digest)
    if not check.jobs and not check.wrong:
        add(RowProblem(None, None, "the file has no rows"))
    return check


def make_jobs(rows: Iterable[Row | RowProblem], plan: Plan) -> Iterator[Job | tuple[int, RowProblem]]:
    """Yield every row's job in order; a row that has an error only now, with its position."""
    for position, row in enumerate(rows):
        job = [row] if isinstance(row, RowProblem) else make_job(row, plan, position)
        yield (position, job[0]) if isinstance(job, list) else job


def _digest(key: str) -> bytes:
    return hashlib.blake2b(key.encode(), digest_size=16).digest()


def _parse_maps(maps: Sequence[str], problems: list[RowProblem]) -> dict[str, Template]:
    templates: dict[str, Template] = {}
    for given in maps:
        input_id, equals, text = given.partition("=")
        input_id = input_id.strip()
        if not equals or not input_id:
            problems.append(RowProblem(None, None, f"--map {given!r} must be 'input={{column}}'"))
        elif input_id in templates:
            problems.append(RowProblem(None, None, f"input {input_id!r} is mapped twice"))
        elif (template := _parse_template(f"--map {input_id}", text, problems)) is not None:
            templates[input_id] = template
    return templates


def _check_maps(technique: Technique, templates: Mapping[str, Template]) -> Iterator[RowProblem]:
    declared = {each.id: each for each in technique.inputs}
    known = ", ".join(declared) or "none"
    for unknown in (name for name in templates if name not in declared):
        message = f"the technique has no input {unknown!r}; its inputs: {known}"
        yield RowProblem(None, None, message)
    for each in technique.inputs:
        if each.required and each.id not in templates:
            advice = f"add --map '{each.id}={{column}}'"
            yield RowProblem(None, None, f"the technique requires input {each.id!r}: {advice}")


def _parse_template(option: str, text: str, problems: list[RowProblem]) -> Template | None:
    try:
        return Template(text)
    except ValueError as error:
        problems.append(RowProblem(None, None, f"{option}: {error}"))
        return None


def _find_url_error(value: str) -> str | None:
    try:
        parts = urlsplit(value)
        host, _ = parts.hostname, parts.port
    except ValueError:
        return f"{value[:80]!r} is not a URL"
    if parts.scheme.lower() != "https" or not host or re.search(r"\s", value):
        return f"{value[:80]!r} is not an https URL"
    return None


def _find_key_error(text: str) -> str | None:
    if not text:
        return "is empty"
    if len(text) > _LONGEST_KEY:
        return f"is longer than {_LONGEST_KEY} characters"
    return "has control characters" if _CONTROL.search(text) else None
