"""Every row is checked against its technique's declaration, and all errors are reported."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from receiver.cli.batch.table import Row, RowProblem
from receiver.cli.batch.validation import (
    Job,
    Plan,
    check_rows,
    make_job,
    make_jobs,
    make_plan,
    to_technique,
)

ROOT = Path(__file__).parents[3]
DOCUMENT: dict[str, Any] = {
    "technique_id": "tech_poster",
    "inputs": [
        {"id": "headline", "type": "text"},
        {"id": "image", "type": "image_url"},
        {"id": "mood", "type": "text", "optional": True},
        {"id": "clip", "type": "videoUrl", "required": False},
    ],
    "run_cost": 0.04,
}
TECHNIQUE = to_technique(DOCUMENT, "tech_poster")
MAPS = ["headline={headline}", "image={url}"]
COLUMNS = ["code", "headline", "url"]


def a_plan(**given: Any) -> Plan | list[RowProblem]:
    options = {"batch": "spring", "maps": MAPS, "key": "{code}", "name": None, "columns": COLUMNS, **given}
    return make_plan(TECHNIQUE, **options)


def the_plan(**given: Any) -> Plan:
    plan = a_plan(**given)
    assert isinstance(plan, Plan), plan
    return plan


def row(number: int = 2, **values: Any) -> Row:
    return Row(number, {"code": "de", "headline": "Hallo", "url": "https://example.com/a.png", **values})


def messages(problems: object) -> list[str]:
    assert isinstance(problems, list), problems
    return [str(problem) for problem in problems]


def test_a_row_becomes_a_start() -> None:
    """Inputs are in the technique's order, so that the request is the same on every run."""
    plan = the_plan(maps=[*reversed(MAPS), "mood={mood}"], name="{code}-x", columns=[*COLUMNS, "mood"])
    job = make_job(row(url=" https://example.com/a.png ", mood=""), plan, 7)
    assert isinstance(job, Job)
    assert job.inputs == (
        {"id": "headline", "type": "text", "value": "Hallo"},
        {"id": "image", "type": "imageUrl", "value": "https://example.com/a.png"},
    )
    assert (job.position, job.key, job.idempotency_key) == (7, "de", "batch:spring:de")
    assert job.metadata["headline"] == "Hallo"
    assert {name: job.metadata[name] for name in ("key", "name", "batch")} == {
        "key": "de",
        "name": "de-x",
        "batch": "spring",
    }


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ({"maps": [*MAPS, "colour={code}"]}, "no input 'colour'; its inputs: headline, image, mood, clip"),
        ({"maps": MAPS[:1]}, "requires input 'image'"),
        ({"maps": [*MAPS, "headline={code}"]}, "mapped twice"),
        ({"maps": [*MAPS, "mood"]}, "must be 'input={column}'"),
        ({"maps": ["headline={headline", MAPS[1]]}, "--map headline"),
        ({"key": "same"}, "names no column"),
        ({"key": "{code}{"}, "--key"),
        ({"batch": "a:b"}, "cannot name a batch"),
        ({"batch": ""}, "cannot name a batch"),
        (
            {"columns": ["code", "headline"]},
            "column 'url': the file has no such column; it has: code, headline",
        ),
        ({"name": "{nick}"}, "column 'nick'"),
    ],
)
def test_wrong_options_are_refused(given: dict[str, Any], problem: str) -> None:
    assert problem in " | ".join(messages(a_plan(**given)))


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"headline": " "}, "row 2, column 'headline': is empty; input 'headline' is required"),
        ({"url": "http://example.com/a.png"}, "is not an https URL; input 'image' is of type imageUrl"),
        ({"url": "https://"}, "is not an https URL"),
        ({"url": "https://[::1"}, "is not a URL"),
        ({"url": "https://example.com:port/"}, "is not a URL"),
        ({"url": "https://example.com/a b"}, "is not an https URL"),
        ({"url": "file:///etc/passwd"}, "is not an https URL"),
        ({"code": ""}, "column 'code': the row's key is empty"),
        ({"code": "a\nb"}, "the row's key has control characters"),
        ({"code": "x" * 200}, "is longer than 128 characters"),
    ],
)
def test_wrong_rows_are_refused(values: dict[str, Any], problem: str) -> None:
    assert problem in " | ".join(messages(make_job(row(**values), the_plan(), 0)))


def test_a_row_without_a_column_is_refused() -> None:
    """JSON Lines have no header: each row is checked against the templates."""
    assert messages(make_job(Row(5, {"code": "de"}), the_plan(columns=None), 0)) == [
        "row 5, column 'headline': is missing",
        "row 5, column 'url': is missing",
    ]


def test_all_errors_are_reported_at_once() -> None:
    """In the order of rows, unreadable and duplicate ones too; more than `keep` are counted."""
    rows: list[Row | RowProblem] = [
        row(2),
        row(3, code="fr", headline="", url="ftp://x"),
        RowProblem(4, None, "cannot be read"),
        row(5),
        row(6, code="fr"),
    ]
    found = check_rows(rows, the_plan())
    assert (found.wrong, found.jobs) == (5, 3)
    assert [problem.row for problem in found.problems] == [3, 3, 4, 5, 6]
    assert (
        str(found.problems[-1])
        == "row 6, column 'code': has the key 'fr' of an earlier row: keys must differ"
    )
    assert len(check_rows(rows, the_plan(), keep=2).problems) == 2
    assert check_rows(rows, the_plan(), keep=2).wrong == 5


def test_an_empty_file_is_a_problem() -> None:
    assert messages(check_rows([], the_plan()).problems) == ["the file has no rows"]


def test_a_position_counts_every_row() -> None:
    """A row that has an error only since the check keeps its position."""
    jobs = list(make_jobs([row(2), RowProblem(3, None, "cannot be read"), row(4)], the_plan()))
    assert [job.position if isinstance(job, Job) else job[0] for job in jobs] == [0, 1, 2]


def test_a_technique_is_parsed_liberally() -> None:
    """Both spellings of types, both ways to say optional, malformed inputs, a missing cost."""
    assert [(each.type, each.required) for each in TECHNIQUE.inputs] == [
        ("text", True),
        ("imageUrl", True),
        ("text", False),
        ("videoUrl", False),
    ]
    odd = to_technique({"inputs": [{"type": "text"}, "x", {"id": "a"}], "run_cost": None}, "t")
    assert [each.id for each in odd.inputs] == ["a"]
    assert odd.run_cost is None


@given(
    st.dictionaries(
        st.sampled_from(["code", "headline", "url", "more"]), st.text() | st.none() | st.integers()
    )
)
def test_any_row_is_a_job_or_a_list_of_problems(values: dict[str, Any]) -> None:
    job = make_job(Row(2, values), the_plan(columns=None), 0)
    if isinstance(job, Job):
        assert job.key
        assert all(each["value"].strip() for each in job.inputs)
    else:
        assert job


_MEASURE = """
import io, resource, sys
from pathlib import Path
from receiver.cli.batch.table import Table, open_source
from receiver.cli.batch.validation import check_rows, make_jobs, make_plan, to_technique

plan = make_plan(
    to_technique({"inputs": [{"id": "image", "type": "imageUrl"}]}, "t"),
    batch="b", maps=["image={url}"], key="{code}", name=None, columns=None,
)
with open_source(Path(sys.argv[1]), io.BytesIO()) as source:
    table = Table(source)
    found = check_rows(table.rows(), plan)
    again = sum(1 for _ in make_jobs(table.rows(), plan))
    print(found.jobs, found.wrong, again, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def _memory(tmp_path: Path, rows: int) -> int:
    """Check a file and read it again in a new process; return its peak memory in KiB."""
    path = tmp_path / f"{rows}.csv"
    with path.open("w") as file:
        file.write("code,headline,url\n")
        file.writelines(
            f"row-{number},{'x' * 150},https://example.com/{number}.png\n" for number in range(rows)
        )
    done = subprocess.run(
        [sys.executable, "-c", _MEASURE, path], capture_output=True, text=True, check=True, cwd=ROOT
    )
    jobs, wrong, again, most = map(int, done.stdout.split())
    assert (jobs, wrong, again) == (rows, 0, rows)
    return most


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    """Checking 100,000 rows (20 MB) takes little more memory than the digests of their keys."""
    assert _memory(tmp_path, 100_000) - _memory(tmp_path, 100) < 14_000
