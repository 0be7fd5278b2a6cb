"""The demo, run once in full."""

import json
from pathlib import Path

from receiver.cli.demo.scenes import SCENES
from tests.cli.conftest import Start


def test_the_demo_settles_eight_runs_and_then_keeps_running(start: Start, tmp_path: Path) -> None:
    """Every run ends as its scene says and stores its files; SIGTERM ends `--keep`."""
    demo = start("demo", "--json", "--keep")
    found = json.loads("".join(demo.until(lambda line: line == "}\n")))
    assert found["ok"]
    runs = {run["scene"]: run for run in found["runs"]}
    assert list(runs) == [scene.title for scene in SCENES]
    assert {run["verdict"] for run in runs.values()} == {"matched", "recovered"}
    assert [scene for scene, run in runs.items() if run["verdict"] == "recovered"] == [
        "image, never called back"
    ]
    assert [scene for scene, run in runs.items() if run["state"] != "completed"] == ["a failing run"]
    assert [len(run["files"]) for run in runs.values()] == [2, 3, 2, 2, 2, 2, 0, 2]
    for run in runs.values():
        for file in map(Path, run["files"]):
            assert file.is_relative_to(tmp_path / "outputs")
            assert file.stat().st_size
    assert demo.stop() == 0
