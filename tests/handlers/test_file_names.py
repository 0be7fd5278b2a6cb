"""File names: harmless, distinct, and with the extension that fits."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from handlers.file_names import file_extension, to_file_name
from receiver.handler import Output

ANY_TEXT = st.text(st.characters(codec=None), max_size=300)  # lone surrogates included


@given(ANY_TEXT)
def test_any_text_becomes_one_harmless_segment(text: str) -> None:
    """Whatever metadata says, it names one entry of one directory on any file system."""
    segment = to_file_name(text)
    assert 0 < len(segment.encode()) <= 120
    assert segment not in {".", ".."}
    assert not segment.startswith(".")
    assert not segment.endswith((".", " "))
    assert not set(segment) & set('/\\<>:"|?*\0\n')


@given(ANY_TEXT, ANY_TEXT)
def test_different_texts_stay_different(one: str, other: str) -> None:
    """Cleaning must not make two names one; only nothing and `_` look the same."""
    assert one == other or {one, other} == {"", "_"} or to_file_name(one) != to_file_name(other)


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("spring sale", "spring sale"),
        ("Größe-1.2", "Größe-1.2"),
        ("", "_"),
        ("..", "_-"),
        ("../../etc/passwd", "_.._etc_passwd-"),
        (".hidden", "hidden-"),
        ("name. ", "name-"),
        ("a\\b", "a_b-"),
        ("a\0b", "a_b-"),
        ("CON", "_CON-"),
        ("nul.txt", "_nul.txt-"),
        ("COM¹", "_COM¹-"),
        ("conin$", "_conin$-"),
        ("a\u200fb\u202ec", "a_b_c-"),
        ("x" * 121, "x" * 111 + "-"),
        ("ä" * 61, "ä" * 55 + "-"),
    ],
)
def test_cleaning_by_example(text: str, cleaned: str) -> None:
    """What is harmless stays; what was changed ends in a hash of eight digits."""
    assert (
        to_file_name(text)[:-8] + "#" * 8 == cleaned + "#" * 8
        if cleaned.endswith("-")
        else to_file_name(text) == cleaned
    )


@pytest.mark.parametrize(
    ("content_type", "kind", "value", "ext"),
    [
        ("image/jpeg", "imageUrl", "https://x.test/a.png", ".jpg"),
        ("IMAGE/WEBP; q=1", "imageUrl", "https://x.test/a", ".webp"),
        ("application/octet-stream", "imageUrl", "https://x.test/a.TIFF?b=c.d", ".tiff"),
        ("application/octet-stream", "documentUrl", "https://x.test/a.123", ".pdf"),
        (None, "videoUrl", "https://x.test/a.b-c", ".mp4"),
        (None, "audioUrl", "https://x.test/", ".mp3"),
        (None, "modelUrl", "https://[x", ".bin"),
        ("text/plain; charset=utf-8", "text", "see https://x.test/a.png", ".txt"),
    ],
)
def test_extensions(content_type: str | None, kind: str, value: str, ext: str) -> None:
    """The content type comes first, then the URL, then FLORA's type."""
    assert file_extension(content_type, Output(position=0, output_id="out", type=kind, value=value)) == ext
