"""Every row against what its technique declares, before a cent is spent. Pure.

`job_of` makes a row into what will be started, or into what is wrong with it; `check` does so for a whole table and keeps
16 bytes of each key.
"""

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from receiver.cli.batch.table import Row, RowProblem
from receiver.cli.batch.templates import Template

_SPELLINGS = {"image_url": "imageUrl", "video_url": "videoUrl", "audio_url": "audioUrl", "document_url": "documentUrl"}
"""Older pages of FLORA write types with an underscore."""
_BATCH = re.compile(r"[^:/\\\x00-\x1f\x7f]{1,64}")
"""No colon, else two batches could share a key."""
_LONGEST_KEY = 128
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


@dataclass(frozen=True, slots=True)
class Declared:
    """One input that a technique declares."""

    id: str
    type: str
    required: bool

    @property
    def is_url(self) -> bool:
        return self.type.endswith("Url")


@dataclass(frozen=True, slots=True)
class Technique:
    """What a batch must know of its technique; `run_cost` in USD, None where FLORA does not say."""

    technique_id: str
    inputs: tuple[Declared, ...]
    run_cost: float | None


def technique_of(document: Mapping[str, Any], technique_id: str) -> Technique:
    """Read what `GET /techniques/{id}` answered; inputs that cannot be read are left out.

    Its own id counts, not the slug that was asked for: else rows would be new to a command that names it differently.
    """
    inputs = []
    for each in document.get("inputs") or ():
        if isinstance(each, Mapping) and isinstance(each.get("id"), str):
            kind = str(each.get("type") or "text")
            required = each.get("required", not each.get("optional", False))
            inputs.append(Declared(each["id"], _SPELLINGS.get(kind, kind), bool(required)))
    cost = document.get("run_cost")
    known = isinstance(cost, int | float) and not isinstance(cost, bool)
    own_id = document.get("technique_id")
    return Technique(
        own_id if isinstance(own_id, str) and own_id else technique_id,
        tuple(inputs),
        float(cost) if known else None,  # type: ignore[arg-type]
    )


@dataclass(frozen=True, slots=True)
class Plan:
    """How rows become runs. `inputs` are in the order of the declaration, whatever the order of the options."""

    technique: Technique
    batch: str
    inputs: tuple[tuple[Declared, Template], ...]
    key: Template
    name: Template
    columns: tuple[str, ...]
    """Every column that a row must have."""

    def idempotency_key(self, key: str) -> str:
        """Return a row's key as the service knows it: batches do not share keys."""
        return f"batch:{self.batch}:{key}"


@dataclass(frozen=True, slots=True)
class Job:
    """One row, ready to be started. `position` counts the rows of the file from 0."""

    position: int
    row: int
    key: str
    idempotency_key: str
    inputs: tuple[Mapping[str, str], ...]
    metadata: Mapping[str, Any] = field(repr=False)


def plan_of(
    technique: Technique,
    *,
    batch: str,
    maps: Sequence[str],
    key: str,
    name: str | None,
    columns: Sequence[str] | None,
) -> Plan | list[RowProblem]:
    """Hold the options against the technique and the table's header; everything wrong with them, or the plan."""
    problems: list[RowProblem] = []
    templates = _parsed(maps, problems)
    declared = {each.id: each for each in technique.inputs}
    known = ", ".join(declared) or "none"
    problems += [
        RowProblem(None, None, f"the technique has no input {unknown!r}; its inputs: {known}")
        for unknown in templates
        if unknown not in declared
    ]
    problems += [
        RowProblem(None, None, f"the technique requires input {each.id!r}: add --map '{each.id}={{column}}'")
        for each in technique.inputs
        if each.required and each.id not in templates
    ]
    if not templates and not problems:
        problems.append(RowProblem(None, None, "no input is mapped: add --map 'input={column}'"))
    if not _BATCH.fullmatch(batch):
        problems.append(
            RowProblem(None, None, f"{batch!r} cannot name a batch (64 characters, no : / \\): give another by --batch")
        )
    keys = _template("--key", key, problems)
    names = _template("--name", key if name is None else name, problems)
    if keys is not None and not keys.columns:
        problems.append(RowProblem(None, None, f"--key {key!r} names no column, so all rows would have the same key"))
    if problems or keys is None or names is None:
        return problems
    inputs = tuple((each, templates[each.id]) for each in technique.inputs if each.id in templates)
    used = (keys, names, *(template for _, template in inputs))
    needed = tuple(dict.fromkeys(column for template in used for column in template.columns))
    if columns is not None and (missing := [column for column in needed if column not in columns]):
        there = ", ".join(column for column in columns if column)
        return [RowProblem(None, column, f"the file has no such column; it has: {there}") for column in missing]
    return Plan(technique, batch, inputs, keys, names, needed)


def job_of(row: Row, plan: Plan, position: int) -> Job | list[RowProblem]:
    """Return what a row starts, or everything that is wrong with it."""
    missing = [column for column in plan.columns if column not in row.values]
    if missing:
        return [RowProblem(row.number, column, "is missing") for column in missing]
    problems: list[RowProblem] = []
    inputs = []
    for declared, template in plan.inputs:
        value = template.fill(row.values)
        where = template.columns[0] if template.columns else None
        if declared.is_url:
            value = value.strip()
        if not value.strip():
            if declared.required:
                problems.append(RowProblem(row.number, where, f"is empty; input {declared.id!r} is required"))
        elif declared.is_url and (wrong := _wrong_url(value)):
            problems.append(RowProblem(row.number, where, f"{wrong}; input {declared.id!r} is of type {declared.type}"))
        else:
            inputs.append({"id": declared.id, "type": declared.type, "value": value})
    if not inputs and not problems:
        problems.append(RowProblem(row.number, None, "has no value for any input"))
    key, name = plan.key.fill(row.values).strip(), plan.name.fill(row.values).strip()
    problems += [
        RowProblem(row.number, template.columns[0] if template.columns else None, f"{wrong}: {what}")
        for what, template, text in (("the row's key", plan.key, key), ("the row's name", plan.name, name))
        if (wrong := _wrong_key(text))
    ]
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


@dataclass(slots=True)
class Check:
    """What a look through the whole table found. `problems` are the first of `wrong`, in the file's order."""

    jobs: int = 0
    wrong: int = 0
    problems: list[RowProblem] = field(default_factory=list)
    digests: set[bytes] = field(default_factory=set)

    def knows(self, idempotency_key: str) -> bool:
        """Return whether this key belongs to a row of the table."""
        return digest(idempotency_key) in self.digests


def check(rows: Iterable[Row | RowProblem], plan: Plan, *, keep: int | None = 50) -> Check:
    """Look at every row; keep the first `keep` problems (None: all) and count the rest."""
    found = Check()

    def note(problem: RowProblem) -> None:
        found.wrong += 1
        if keep is None or len(found.problems) < keep:
            found.problems.append(problem)

    for row in rows:
        job = [row] if isinstance(row, RowProblem) else job_of(row, plan, found.jobs)
        if isinstance(job, list):
            for wrong in job:
                note(wrong)
        else:
            found.jobs += 1
        if isinstance(row, Row) and not plan.key.missing(row.values) and (key := plan.key.fill(row.values).strip()):
            mark = digest(plan.idempotency_key(key))
            if mark in found.digests:
                problem = f"has the key {key[:80]!r} of an earlier row: keys must differ"
                note(RowProblem(row.number, plan.key.columns[0], problem))
            found.digests.add(mark)
    if not found.jobs and not found.wrong:
        note(RowProblem(None, None, "the file has no rows"))
    return found


def jobs_of(rows: Iterable[Row | RowProblem], plan: Plan) -> Iterator[Job | tuple[int, RowProblem]]:
    """Give every row's job in the file's order; a row that is wrong only now comes with its position."""
    for position, row in enumerate(rows):
        job = [row] if isinstance(row, RowProblem) else job_of(row, plan, position)
        yield (position, job[0]) if isinstance(job, list) else job


def digest(key: str) -> bytes:
    return hashlib.blake2b(key.encode(), digest_size=16).digest()


def _parsed(maps: Sequence[str], problems: list[RowProblem]) -> dict[str, Template]:
    templates: dict[str, Template] = {}
    for given in maps:
        input_id, equals, text = given.partition("=")
        input_id = input_id.strip()
        if not equals or not input_id:
            problems.append(RowProblem(None, None, f"--map {given!r} must be 'input={{column}}'"))
        elif input_id in templates:
            problems.append(RowProblem(None, None, f"input {input_id!r} is mapped twice"))
        elif (template := _template(f"--map {input_id}", text, problems)) is not None:
            templates[input_id] = template
    return templates


def _template(option: str, text: str, problems: list[RowProblem]) -> Template | None:
    try:
        return Template(text)
    except ValueError as error:
        problems.append(RowProblem(None, None, f"{option}: {error}"))
        return None


def _wrong_url(value: str) -> str | None:
    try:
        parts = urlsplit(value)
        host, _ = parts.hostname, parts.port
    except ValueError:
        return f"{value[:80]!r} is not a URL"
    if parts.scheme.lower() != "https" or not host or re.search(r"\s", value):
        return f"{value[:80]!r} is not an https URL"
    return None


def _wrong_key(text: str) -> str | None:
    if not text:
        return "is empty"
    if len(text) > _LONGEST_KEY:
        return f"is longer than {_LONGEST_KEY} characters"
    return "holds control characters" if _CONTROL.search(text) else None
