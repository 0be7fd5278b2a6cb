"""The emulator's techniques, and FLORA's rules for the inputs of a run. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass

from receiver.emulator.problems import Field

__all__ = ["GENERATED", "TECHNIQUES", "Input", "Output", "Technique", "find_technique", "input_values"]

# Older pages of FLORA's documentation spell the types of inputs with an underscore.
_SPELLINGS = {"image_url": "imageUrl", "video_url": "videoUrl"}
_INPUT_TYPES = frozenset({"text", "imageUrl", "videoUrl"})


@dataclass(frozen=True, slots=True)
class Input:
    """One declared input."""

    id: str
    name: str
    type: str
    description: str
    optional: bool = False

    def to_json(self) -> dict[str, object]:
        document: dict[str, object] = {
            "id": self.id,
            "name": self.name,
            "type": self.type,
            "description": self.description,
        }
        return document | {"optional": True} if self.optional else document


@dataclass(frozen=True, slots=True)
class Output:
    """One declared output; its id becomes the `output_id` of a run."""

    id: str
    name: str
    type: str

    def to_json(self) -> dict[str, object]:
        return {"id": self.id, "name": self.name, "type": self.type}


_PROMPT = Input("prompt", "Prompt", "text", "What to make.")
_SIZE = Input("size", "Size", "text", "Bytes of each media output: 1048576, 10MiB, 2GiB.", optional=True)
_IMAGE = Input("image", "Image", "imageUrl", "A picture to start from.", optional=True)


@dataclass(frozen=True, slots=True)
class Technique:
    """One technique. `run_cost` is in US dollars; with an `error_code`, every run of it fails."""

    technique_id: str
    slug: str
    name: str
    description: str
    outputs: tuple[Output, ...]
    run_cost: float
    inputs: tuple[Input, ...] = (_PROMPT, _IMAGE, _SIZE)
    error_code: str | None = None

    def to_json(self) -> dict[str, object]:
        return {
            "technique_id": self.technique_id,
            "slug": self.slug,
            "name": self.name,
            "description": self.description,
            "inputs": [declared.to_json() for declared in self.inputs],
            "outputs": [declared.to_json() for declared in self.outputs],
            "run_cost": self.run_cost,
        }


def _technique(
    kind: str, description: str, *types: str, cost: float, error_code: str | None = None
) -> Technique:
    outputs = tuple(
        Output(f"output_{number}", f"Output {number}", media_type)
        for number, media_type in enumerate(types, 1)
    )
    return Technique(
        technique_id="tech_emu_" + kind.replace("-", "_"),
        slug=f"emu-{kind}",
        name=f"Emulated {kind.replace('-', ' ')}",
        description=description,
        outputs=outputs,
        run_cost=cost,
        error_code=error_code,
    )


TECHNIQUES: tuple[Technique, ...] = (
    _technique("image", "One PNG.", "imageUrl", cost=0.04),
    _technique("two-images", "Two PNGs.", "imageUrl", "imageUrl", cost=0.08),
    _technique("video", "One MP4.", "videoUrl", cost=0.5),
    _technique("audio", "One WAV.", "audioUrl", cost=0.02),
    _technique("document", "One PDF.", "documentUrl", cost=0.03),
    _technique("text", "A text, which stands in the field `url` itself.", "text", cost=0.01),
    _technique(
        "everything",
        "One output of each type.",
        "imageUrl",
        "videoUrl",
        "audioUrl",
        "documentUrl",
        "text",
        cost=0.6,
    ),
    _technique(
        "fail",
        "Always refused by moderation.",
        "imageUrl",
        cost=0.04,
        error_code="GENERATION_PROMPT_MODERATED",
    ),
)

# Of POST /generate: by `type`, the type of its only output, its cost in USD and its default model.
GENERATED: dict[str, tuple[str, float, str]] = {
    "image": ("imageUrl", 0.04, "emu-image-1"),
    "video": ("videoUrl", 0.5, "emu-video-1"),
    "audio": ("audioUrl", 0.02, "emu-audio-1"),
    "text": ("text", 0.01, "emu-text-1"),
}


def find_technique(name: str) -> Technique | None:
    """Return the technique with this id or slug."""
    return next(
        (technique for technique in TECHNIQUES if name in (technique.technique_id, technique.slug)), None
    )


def input_values(technique: Technique, inputs: object) -> tuple[dict[str, str], list[Field]]:
    """Check the `inputs` of a start. Return the values by input id, and every problem."""
    if not isinstance(inputs, list) or not inputs:
        return {}, [Field("inputs", "must be an array with at least one input")]
    declared = {one.id: one for one in technique.inputs}
    values: dict[str, str] = {}
    problems: list[Field] = []
    for index, given in enumerate(inputs):
        problem = _find_problem(given, declared, values)
        if problem is not None:
            problems.append(Field(f"inputs.{index}" + problem.field, problem.message))
        else:
            values[given["id"]] = given["value"]
    if not problems:
        problems = _missing_inputs(technique.inputs, values)
    return values, problems


def _find_problem(given: object, declared: dict[str, Input], seen: dict[str, str]) -> Field | None:
    if not isinstance(given, dict):
        return Field("", "must be an object with id, type and value")
    for key in ("id", "type", "value"):
        if not isinstance(given.get(key), str):
            return Field(f".{key}", "must be a string")
    expected = declared.get(given["id"])
    if expected is None:
        return Field(".id", f"the technique has no input {given['id']!r}")
    kind = _SPELLINGS.get(given["type"], given["type"])
    if kind not in _INPUT_TYPES:
        return Field(".type", "must be one of text, imageUrl, videoUrl")
    if kind != expected.type:
        return Field(".type", f"input {expected.id!r} is of type {expected.type}")
    if expected.id in seen:
        return Field(".id", f"input {expected.id!r} is given twice")
    if kind != "text" and not given["value"].startswith(("https://", "http://")):
        return Field(".value", "must be a URL")
    return None


def _missing_inputs(inputs: Sequence[Input], values: dict[str, str]) -> list[Field]:
    return [
        Field("inputs", f"input {one.id!r} is required")
        for one in inputs
        if not one.optional and one.id not in values
    ]
