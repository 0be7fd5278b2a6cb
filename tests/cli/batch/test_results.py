"""`results.csv`: written atomically, in the order of the table, and readable."""

import csv
import os
import threading
from pathlib import Path

import pytest

from receiver.cli.batch.results import (
    COLUMNS,
    Outcome,
    Spool,
    check_path,
    open_spool,
    summarize,
    to_outcome,
    write_results,
)
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
    with path.open(newline="", encoding="utf-8-sig") as file:
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
    with pytest.raises(OSError, match="directory"):
        check_path(path)


def test_a_path_is_checked_without_a_trace(tmp_path: Path) -> None:
    """What is there stays, and a missing directory is an error before anything is started."""
    path = tmp_path / "results.csv"
    check_path(path)
    assert list(tmp_path.iterdir()) == []
    path.write_text("old")
    check_path(path)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]
    with pytest.raises(FileNotFoundError):
        check_path(tmp_path / "nowhere" / "results.csv")


def test_a_pipe_gets_the_lines_and_stays_a_pipe(tmp_path: Path) -> None:
    """`--results /dev/stdout` and the like must not be replaced by a file."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    check_path(pipe)
    lines: list[bytes] = []
    reader = threading.Thread(target=lambda: lines.append(pipe.read_bytes()))
    reader.start()
    with open_spool() as spool:
        spool.store(0, Outcome(2, "a", "completed"))
        write_results(pipe, spool)
    reader.join()
    assert lines[0].startswith(b"\xef\xbb\xbfkey,run_id,")
    assert pipe.is_fifo()


def test_no_cell_is_a_formula(tmp_path: Path) -> None:
    """A key or a message of others cannot make a spreadsheet calculate, and a cost stays a number."""
    path = tmp_path / "results.csv"
    keys = ["=1+1", "+49", "-5", "@SUM(A1)", "\t=1", "\uff1d1+1", "a=b", "'x", ""]
    with open_spool() as spool:
        for position, key in enumerate(keys):
            spool.store(
                position, Outcome(position + 2, key, "refused", error_message=f"{key} is wrong", cost=0.5)
            )
        write_results(path, spool, separator=";")
    with path.open(newline="", encoding="utf-8-sig") as file:
        rows = list(csv.DictReader(file, delimiter=";"))
    assert [row["key"] for row in rows] == [*(f"'{key}" for key in keys[:6]), *keys[6:]]
    assert rows[0]["error_message"] == "'=1+1 is wrong"
    assert {row["cost"] for row in rows} == {"0.5"}


def test_a_full_disk_loses_no_outcome() -> None:
    """The spool keeps in memory what its file does not take."""
    with Path("/dev/full").open("r+b", buffering=0) as full:
        spool = Spool(full)
        for position in range(3):
            spool.store(position, Outcome(position, "a", "unfinished"))
        spool.store(1, Outcome(1, "b", "completed", files=("x", "y")))
        assert [(outcome.key, outcome.files) for outcome in spool] == [
            ("a", ()),
            ("b", ("x", "y")),
            ("a", ()),
        ]


def test_without_a_temporary_file_outcomes_are_in_memory() -> None:
    spool = Spool(None)
    spool.store(1, Outcome(3, "b", "completed"))
    assert list(spool.items()) == [(1, Outcome(3, "b", "completed"))]


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
