"""The picture of the README shows what the demo prints."""

from tests.docs.picture import COMMAND, PICTURE, draw, normalise, read_lines, render_screen, run_demo


def test_the_picture_shows_a_real_run() -> None:
    """The same lines, but for times, ids, sizes and ports: else `make docs` draws it anew."""
    shown = read_lines(PICTURE.read_text("utf-8"))
    assert normalise(shown) == normalise([f"$ {COMMAND}", *run_demo()]), (
        "the picture is stale: run `make docs`"
    )


def test_nothing_is_fetched_by_the_picture() -> None:
    text = PICTURE.read_text("utf-8").replace("http://www.w3.org/2000/svg", "")
    assert "url(http" not in text
    assert "cdnjs" not in text


def test_what_is_erased_is_not_shown() -> None:
    """A table in progress, two lines high, is replaced by what is printed at the end."""
    assert render_screen("a\nb\nc\r\x1b[2K\x1b[1A\x1b[2Kd \x1b[32me\x1b[0m\n") == [
        "a",
        "d \x1b[32me\x1b[0m",
        "",
    ]


def test_lines_are_read_as_they_were_drawn() -> None:
    drawn = draw(["a <b> & c", "\x1b[32me\x1b[0m   f", "  d"])
    assert read_lines(drawn) == [f"$ {COMMAND}", "a <b> & c", "e   f", "  d"]
