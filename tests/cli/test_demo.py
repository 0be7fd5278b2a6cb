"""The demo, once, for real: it is the first thing that anybody runs."""

import json
from pathlib import Path

import pytest

from receiver.cli.demo import SCENES, human
from tests.cli.conftest import Start


def test_the_demo_settles_eight_runs_and_then_keeps_running(start: Start, tmp_path: Path) -> None:
    """Every run ends as its scene says, its files are there, and SIGTERM ends what `--keep` left running."""
    demo = start("demo", "--json", "--keep")
    found = json.loads("".join(demo.until(lambda line: line == "}\n")))
    assert found["ok"]
    runs = {run["scene"]: run for run in found["runs"]}
    assert list(runs) == [scene.title for scene in SCENES]
    assert {run["verdict"] for run in runs.values()} == {"matched", "recovered"}
    assert [scene for scene, run in runs.items() if run["verdict"] == "recovered"] == ["image, never called back"]
    assert [scene for scene, run in runs.items() if run["state"] != "completed"] == ["a failing run"]
    assert [len(run["files"]) for run in runs.values()] == [2, 3, 2, 2, 2, 2, 0, 2]
    for run in runs.values():
        for file in map(Path, run["files"]):
            assert file.is_relative_to(tmp_path / "outputs")
            assert file.stat().st_size
    assert demo.stop() == 0


@pytest.mark.parametrize(
    ("size", "words"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (1536, "1.5 KiB"), (5 << 20, "5.0 MiB"), (3 << 40, "3072.0 GiB")],
)
def test_sizes_are_written_for_people(size: int, words: str) -> None:
    assert human(size) == words
