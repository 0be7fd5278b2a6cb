"""The handler `storage`, killed at every step: no file is partial, and the retry succeeds."""

import hashlib
import json
import subprocess
import sys

import pytest

from tests.support.patience import PATIENCE_SECONDS
from tests.support.storage_deaths import TEXTS

WHOLE = {name: hashlib.sha256(body).hexdigest() for name, body in TEXTS.items()}


@pytest.fixture(scope="module")
def deaths(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, object]]:
    """Return a report for each step, and of the attempt that was not killed."""
    command = [sys.executable, "-m", "tests.support.storage_deaths", str(tmp_path_factory.mktemp("deaths"))]
    printed = subprocess.run(
        command, check=True, capture_output=True, text=True, timeout=PATIENCE_SECONDS
    ).stdout
    return [json.loads(line) for line in printed.splitlines()]


def test_whenever_it_is_killed_files_are_whole_or_not_there(deaths: list[dict[str, object]]) -> None:
    """No file is partial; the retry leaves all complete, recorded, and no leftovers."""
    *killed, lived = deaths
    assert len(killed) > 30
    assert {death["code"] for death in killed} == {-9}
    assert lived["code"] == 0
    for death in deaths:
        left, then = death["left"], death["then"]
        assert isinstance(left, dict)
        assert isinstance(then, dict)
        assert left.items() <= {**WHOLE, "run.json": left.get("run.json")}.items()
        assert left.get("run.json") in {None, then["run.json"]}
        assert death["again"] == 0
        assert then == death["recorded"] == {**WHOLE, "run.json": then["run.json"]}
        assert death["hidden"] == []


def test_each_step_waits_for_the_one_that_it_relies_on(deaths: list[dict[str, object]]) -> None:
    """Reserved, written, synced, renamed, directory synced, recorded: in this order."""
    steps = deaths[0]["steps"]
    assert isinstance(steps, list)
    done = [
        step.removeprefix("after ") for step in steps if step.startswith("after ") and step != "after mkdir"
    ]
    second = done[done.index("record") + 1 :]
    assert second[:8] == ["reserve", "write", "write", "write", "fsync", "replace", "fsync", "record"]
