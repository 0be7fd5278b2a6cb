"""Keys of stored outputs: below their root, distinct, and the same every time."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from handlers.storage.keys import KeyTemplate, RunKeys
from receiver.handler import Output
from tests.support.handler_kit import RUN

ANY_TEXT = st.text(st.characters(codec=None), max_size=300)  # lone surrogates included


def output(
    position: int = 0, output_id: str = "out", kind: str = "imageUrl", value: str = "https://x.test/a"
) -> Output:
    return Output(position=position, output_id=output_id, type=kind, value=value)


@given(
    ANY_TEXT,
    ANY_TEXT,
    st.sampled_from(["{metadata[a]}/{metadata[b]}{ext}", "{metadata[a]}{metadata[b]}", "x {metadata[a]}"]),
)
def test_every_key_stays_below_its_root(one: str, other: str, text: str) -> None:
    """No metadata leads out of the directory, deeper into it, or to an invalid name."""
    run = replace(RUN, metadata={"a": one, "b": other})
    root = Path("/srv/outputs")
    key = KeyTemplate(text).render(run, output(), ".png")
    path = (root / key).resolve()
    assert path.is_relative_to(root)
    assert len(path.relative_to(root).parts) == 1 + text.count("/")
    assert all(
        0 < len(segment.encode()) <= 255 and not segment.startswith(".") for segment in key.split("/")
    )


@pytest.mark.parametrize("depth", [1, 4, 8, 20])
def test_however_deep_a_key_is_buckets_take_it(depth: int) -> None:
    """Buckets allow 1024 bytes with the prefix: deep keys have shorter, still distinct parts."""
    template = KeyTemplate("/".join(f"{{metadata[{n}]}}" for n in range(depth)) + "{ext}")
    long = {str(n): "ä" * 55 for n in range(depth)}
    keys = {
        template.render(replace(RUN, metadata={**long, str(depth - 1): "ä" * 55 + end}), output(), ".webp")
        for end in ("", "b", "c")
    }
    assert len(keys) == 3
    assert all(len(key.encode()) <= 900 and len(key.split("/")) == depth for key in keys)


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("{completed_at:%Y-%m-%d}/{run_id}/{output_id}{ext}", "2026-11-24/run_1/out.png"),
        (
            "{run_type}/{completed_at:%Y/%m/%d}/{run_id}/{output_id}{ext}",
            "technique/2026/11/24/run_1/out.png",
        ),
        ("{metadata[market]}-{metadata[n]}/{position:03d}{ext}", "DE-7/000.png"),
        ("{metadata[none]}/{project_id}/{status}-{output_type}", "_/_/completed-imageUrl"),
        ("{workspace_id}/{technique_id}/{started_at}", "ws_1/tech_1/20261124T115900Z"),
        ("{created_at:%H.%M}/{settled_at:%S}/{{x}}", "11.58/01/{x}"),
        ("{position}-{position:d}-{position:2}-{position:02}", "0-0- 0-00"),
    ],
)
def test_templates_by_example(text: str, key: str) -> None:
    """Every field, and formats for times and positions."""
    run = replace(RUN, metadata={"market": "DE", "n": 7})
    assert KeyTemplate(text).render(run, output(), ".png") == key


@pytest.mark.parametrize(
    "text",
    [
        "",
        "/{run_id}",
        "{run_id}/",
        "a//b",
        "../{run_id}",
        "{run_id}/./x",
        ".{run_id}",
        "{run_id}.",
        "a\\b",
        "a\0b",
        "{nonsense}",
        "{run_id.__class__}",
        "{run_id[0]}",
        "{metadata}",
        "{metadata[]}",
        "{}",
        "{0}",
        "{run_id!r}",
        "{run_id:>99999999}",
        "{completed_at:{run_id}}",
        "{completed_at:%Y/../%m}",
        "{position:s}",
        "{position:>9999999999}",
        "{position:999}",
        "{position:/>2}",
        "{position:,}",
        "{run_id",
        "run_id}",
    ],
)
def test_templates_that_cannot_be_used(text: str) -> None:
    """A wrong template is found when the service starts, not when the first run ends."""
    with pytest.raises(ValueError, match=r".+"):
        KeyTemplate(text)


def keys_of(
    outputs: list[Output], order: list[int], taken: dict[int, str] | None = None, ext: str = ".png"
) -> dict[int, str]:
    keys = RunKeys(
        KeyTemplate("{run_id}/{output_id}{ext}"), replace(RUN, outputs=tuple(outputs)), taken or {}
    )
    return {position: keys.output(outputs[position], ext) for position in order}


def test_equal_keys_get_the_position_whatever_comes_first() -> None:
    """The order of downloads does not matter."""
    outputs = [output(0, "a"), output(1, "a"), output(2, "A"), output(3, "a-1"), output(4, "b")]
    expected = {
        0: "run_1/a.png",
        1: "run_1/a-1.png",
        2: "run_1/A-2.png",
        3: "run_1/a-1-3.png",
        4: "run_1/b.png",
    }
    assert keys_of(outputs, [0, 1, 2, 3, 4]) == expected
    assert keys_of(outputs, [4, 3, 2, 1, 0]) == expected


def test_spellings_that_file_systems_take_as_equal() -> None:
    """The composed and the decomposed ä are one file on some disks, as A and a are."""
    outputs = [output(0, "\u00e4"), output(1, "a\u0308"), output(2, "A\u0308")]
    assert keys_of(outputs, [2, 1, 0]) == {
        0: "run_1/\u00e4.png",
        1: "run_1/a\u0308-1.png",
        2: "run_1/A\u0308-2.png",
    }


def test_equal_ids_of_different_types_need_no_position() -> None:
    """`a.png` and `a.txt` are two keys already."""
    outputs = [output(0, "a"), output(1, "a", "text")]
    keys = RunKeys(KeyTemplate("{output_id}{ext}"), replace(RUN, outputs=tuple(outputs)), {})
    assert [keys.output(outputs[0], ".jpg"), keys.output(outputs[1], ".txt")] == ["a.jpg", "a.txt"]


def test_keys_that_turn_out_equal_get_the_position_too() -> None:
    """An image and a video that both come as `.bin`, now or in an earlier attempt."""
    outputs = [output(0, "a"), output(1, "a", "videoUrl")]
    assert keys_of(outputs, [0, 1], ext=".bin") == {0: "run_1/a.bin", 1: "run_1/a-1.bin"}
    assert keys_of(outputs, [0], {1: "run_1/a.bin"}, ext=".bin") == {0: "run_1/a-0.bin"}
    assert keys_of(outputs, [1], {1: "run_1/a.bin"}, ext=".bin") == {1: "run_1/a.bin"}


@pytest.mark.parametrize(
    ("text", "beside", "key"),
    [
        ("{run_id}/{output_id}{ext}", "run_1/out.png", "run_1/run.json"),
        ("{run_id}/{output_id}{ext}", None, "run_1/run.json"),
        ("{run_id}/{output_id}{ext}", "run_1/run.json", "run_1/run.json"),
        ("{run_id}-{output_id}{ext}", "run_1-out.png", "run_1.run.json"),
        ("{technique_id}/{output_id}{ext}", "tech_1/out.png", "tech_1/run_1.run.json"),
    ],
)
def test_the_manifest_lies_beside_the_outputs(text: str, beside: str | None, key: str) -> None:
    """Its name has the run's id unless its directory does."""
    keys = RunKeys(KeyTemplate(text), RUN, {})
    assert keys.manifest(-1, beside) == key


def test_an_output_may_be_called_like_the_manifest() -> None:
    """The output was first: the manifest gets another name."""
    only: Any = output(0, "run", "documentUrl")
    keys = RunKeys(KeyTemplate("{run_id}/{output_id}{ext}"), replace(RUN, outputs=(only,)), {})
    assert keys.output(only, ".json") == "run_1/run.json"
    assert keys.manifest(-1, "run_1/run.json") == "run_1/run-1.json"
