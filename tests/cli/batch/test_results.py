"""`results.csv`: written atomically, in the order of the table, and readable."""

import csv
from pathlib import Path

import pytest

from receiver.cli.batch.results import COLUMNS, Outcome, open_spool, summarize, to_outcome, write_results
from tests.support.batch_fakes import a_dispatch, a_run


def test_results_are_written_in_the_order_of_the_file(tmp_path: Path) -> None:
    """Quotes, line breaks and separators in FLORA's messages survive."""
    path = tmp_path / "results.csv"
    path.write_text("old")
    with open_spool() as spool:
        spool.store(2, Outcome(4, "c", "refused", error_code="bad", error_message='no "x",\nnever'))
        spool.store(0, to_outcome(a_run("run_a"), row=2, key="ä"))
        spool.store(1, Outcome(3, "b", "unfinished"))
        spool.store(1, Outcome(3, "b", "completed", "run_b", "late", 0.123456))
        write_results(path, spool)
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == COLUMNS
    assert [row["key"] for row in rows] == ["ä", "b", "c"]
    assert rows[0]["files"] == "file:///out/run_a/image.png"
    assert [row["cost"] for row in rows] == ["0.04", "0.123456", ""]
    assert rows[2]["error_message"] == 'no "x",\nnever'
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_that_cannot_be_written_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "results.csv"
    path.mkdir()
    with open_spool() as spool:
        spool.store(0, Outcome(2, "a", "completed"))
        with pytest.raises(OSError, match="directory"):
            write_results(path, spool)
    assert list(tmp_path.iterdir()) == [path]


def test_a_batch_is_summarized() -> None:
    with open_spool() as spool:
        spool.store(0, to_outcome(a_run("run_a"), row=2, key="a"))
        spool.store(1, to_outcome(a_run("run_b", charged_cost=None, cost_final=False), row=3, key="b"))
        spool.store(2, Outcome(4, "c", "not_started"))
        summary = summarize(spool)
    assert (summary.rows, summary.succeeded, summary.cost, summary.cost_unknown) == (3, 2, 0.04, 1)
    assert summary.states == {"completed": 2, "not_started": 1}
    assert not summary.ok


def test_a_completed_run_that_was_not_stored_fails_its_row() -> None:
    """A dead dispatch fails the row; one that is skipped, or about the final cost, does not."""
    dead = a_dispatch("dead", 12, "no space")
    skipped = a_dispatch("skipped", 0, "status is failed")
    leased = a_dispatch("leased", 1, event="cost_final")
    assert not to_outcome(a_run("r", dispatches=(dead,)), row=2, key="a").succeeded
    assert to_outcome(a_run("r", dispatches=(skipped,)), row=2, key="a").succeeded
    assert to_outcome(a_run("r", dispatches=(leased,)), row=2, key="a").succeeded
