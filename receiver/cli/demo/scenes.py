"""The runs of the demo, and what the ledger has of each."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from receiver.model import Artifact, Dispatch, DispatchState, Run, RunState

_FINISHED = {DispatchState.DONE, DispatchState.SKIPPED, DispatchState.DEAD}


@dataclass(frozen=True, slots=True)
class Scene:
    """A run to start: its title, its technique and the faults of the emulator."""

    title: str
    technique: str
    faults: tuple[dict[str, Any], ...] = ()


SCENES = (
    Scene("image", "emu-image"),
    Scene("two images", "emu-two-images"),
    Scene("video", "emu-video"),
    Scene("audio, called back 3×", "emu-audio", ({"kind": "duplicate", "copies": 2},)),
    Scene("document", "emu-document"),
    Scene("text", "emu-text"),
    Scene("a failing run", "emu-fail"),
    Scene("image, never called back", "emu-image", ({"kind": "drop"},)),
)


@dataclass(slots=True)
class DemoRun:
    """A scene that was started, with its rows in the ledger."""

    scene: Scene
    run_id: str
    run: Run | None = None
    artifacts: list[Artifact] = field(default_factory=list)
    dispatches: tuple[Dispatch, ...] = ()

    @property
    def is_finished(self) -> bool:
        """Whether the run is settled, has its verdict, and no handler has work left."""
        if self.run is None or self.run.verdict is None or not self.dispatches:
            return False
        is_settled = self.run.state in {RunState.COMPLETED, RunState.FAILED}
        return is_settled and all(each.state in _FINISHED for each in self.dispatches)

    @property
    def is_stored(self) -> bool:
        """Whether the run is finished and no dispatch is dead."""
        return self.is_finished and all(each.state is not DispatchState.DEAD for each in self.dispatches)

    @property
    def verdict(self) -> str:
        return self.run.verdict.value if self.run and self.run.verdict else "unsettled"

    @property
    def size(self) -> int:
        """Bytes of the stored outputs, without the manifest."""
        outputs = (each for each in self.artifacts if each.position >= 0)
        return sum(each.size or 0 for each in outputs if each.stored_at is not None)

    @property
    def cost(self) -> str:
        if self.run is None or self.run.charged_cost is None:
            return ""
        return f"${self.run.charged_cost:.2f}"

    @property
    def files(self) -> list[Path]:
        stored = [artifact for artifact in self.artifacts if artifact.stored_at is not None]
        return [Path(unquote(urlsplit(artifact.location).path)) for artifact in stored]

    def to_json(self) -> dict[str, Any]:
        return {
            "run_id": self.run_id,
            "scene": self.scene.title,
            "state": self.run.state.value if self.run else "unknown",
            "verdict": self.verdict,
            "error_code": self.run.error_code if self.run else None,
            "files": [str(file) for file in self.files],
        }
