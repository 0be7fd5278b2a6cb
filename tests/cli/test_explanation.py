"""The explanation of a run: the sentence on top names the cause, and what failed is not called a read."""

from typing import Any

import pytest

from receiver.cli.explanation import explain_run

KEY = "FLORA does not accept this service's API key (Bad key): check FLORA_API_KEY"


def a_read(outcome: str, at: str = "2026-11-24T12:00:05+00:00", **fields: Any) -> dict[str, Any]:
    given = dict.fromkeys(("run_status", "http_status", "problem", "request_id", "seconds"))
    return {"requested_at": at, "source": "run", "outcome": outcome, **given, **fields}


def a_timeline(state: str, *reads: dict[str, Any], failed: int = 0, **fields: Any) -> dict[str, Any]:
    run = {
        "run_id": "run_1", "state": state, "settled": False, "lost_reason": None, "error_code": None,
        "error_message": None, "verdict": None, "callback_expected": True, "cost_final": True, "dispatches": [],
        "next_poll_at": "2026-11-24T12:00:30+00:00", "reported_at": "2026-11-24T12:00:00+00:00",
        "last_reads": list(reads), **fields,
    }  # fmt: skip
    entries = [{"at": read["requested_at"], "kind": "read", **read} for read in reads]
    return {"run": run, "reads": len(reads) - failed, "failed_reads": failed, "entries": entries}


REFUSED = a_read("failed", http_status=401, problem="Bad key", request_id="req_1", seconds=0.25)
MOVED = a_read(
    "failed", http_status=308, problem="FLORA responded with 308, a redirect, which is not followed"
)
GONE = a_read("failed", problem="FLORA cannot be reached: ConnectError")
MISSING = a_read("not_found", http_status=404, problem="No such run")
RUNNING = a_read("returned", http_status=200, run_status="running", seconds=0.04)
EMPTY = a_read(
    "returned", http_status=200, run_status="completed", problem="it has no outputs that can be fetched yet"
)
EARLIER = {**RUNNING, "requested_at": "2026-11-24T11:59:00+00:00"}


@pytest.mark.parametrize(
    ("state", "read", "sentence"),
    [
        ("open", REFUSED, "Its end is not known: the last read failed: HTTP 401: Bad key."),
        ("reported", REFUSED, "A callback reported its end, but the last read failed: HTTP 401: Bad key."),
        (
            "reported",
            MOVED,
            "but the last read failed: FLORA responded with 308, a redirect, which is not followed.",
        ),
        ("reported", GONE, "but the last read failed: FLORA cannot be reached: ConnectError."),
        ("open", MISSING, "FLORA's API has no such run (404)."),
        ("reported", MISSING, "A callback reported its end, but FLORA's API has no such run (404)."),
        ("open", RUNNING, "FLORA has not reported its end yet."),
        ("reported", RUNNING, "A callback reported its end; FLORA's API still shows it as running."),
        ("reported", EARLIER, "A callback reported its end; it has not been read from FLORA since."),
        ("reported", EMPTY, "FLORA reports that it completed, but without outputs that can be fetched."),
        ("open", None, "FLORA has not reported its end yet."),
        ("lost", REFUSED, "It was given up."),
    ],
)
def test_the_first_line_names_the_cause(state: str, read: dict[str, Any] | None, sentence: str) -> None:
    first = explain_run(a_timeline(state, *([read] if read else [])))[0]
    assert first.startswith(f"run_1 is {state}. ")
    assert first.endswith(sentence)


def test_failed_reads_are_counted_apart_and_listed() -> None:
    """With what was wrong, how long it took, and the request id that FLORA's support asks for."""
    lines = explain_run(a_timeline("reported", RUNNING, REFUSED, GONE, failed=2))
    assert "It was read 1 time, and 2 reads failed; the next read is at 2026-11-24 12:00:30." in lines
    assert "  2026-11-24 12:00:05  read: running (0.0 s)" in lines
    assert "  2026-11-24 12:00:05  read failed: HTTP 401: Bad key (0.2 s, req_1)" in lines
    assert "  2026-11-24 12:00:05  read failed: FLORA cannot be reached: ConnectError" in lines


def test_a_hold_says_until_when_nothing_is_read() -> None:
    held = {"reason": KEY, "until": "2026-11-24T12:01:00+00:00"}
    lines = explain_run(a_timeline("open", REFUSED, failed=1, reads_held=held))
    assert f"Nothing is read until 2026-11-24 12:01:00: {KEY}." in lines


def test_a_cost_that_cannot_be_read_says_why() -> None:
    lines = explain_run(
        a_timeline("completed", REFUSED, failed=1, settled=True, cost_final=False, verdict="matched")
    )
    assert (
        "Its cost is not final yet; FLORA is polled for it. But the last read failed: HTTP 401: Bad key."
        in lines
    )


def test_an_older_service_is_explained_as_before() -> None:
    """It sends neither the reads nor a count of those that failed."""
    timeline = a_timeline("reported")
    del timeline["run"]["last_reads"], timeline["failed_reads"]
    lines = explain_run(timeline)
    assert lines[0] == "run_1 is reported. A callback reported its end; FLORA's API does not show it yet."
