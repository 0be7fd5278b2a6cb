"""A later read may list outputs in another order: each keeps its own source, or the one that it had."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from receiver.decide import refresh_outputs
from receiver.model import Output

HOST = "https://media.flora.example"


def a_list(*outputs: tuple[str, str] | tuple[str, str, str]) -> tuple[Output, ...]:
    """Return outputs from (id, URL) or (id, URL, type)."""
    return tuple(
        Output(position, each[0], each[2] if len(each) == 3 else "imageUrl", each[1])
        for position, each in enumerate(outputs)
    )


@pytest.mark.parametrize(
    ("stored", "read", "expected"),
    [
        pytest.param(
            [("a", "A"), ("b", "B")],
            [("b", "B2"), ("a", "A2")],
            ["A2", "B2"],
            id="unique ids in another order",
        ),
        pytest.param(
            [("o", "A"), ("o", "B")],
            [("o", "B2"), ("o", "A")],
            ["A", "B2"],
            id="equal ids: what is left over",
        ),
        pytest.param(
            [("o", "A"), ("o", "B")], [("o", "B"), ("o", "A")], ["A", "B"], id="equal ids, same values"
        ),
        pytest.param(
            [("o", f"{HOST}/a?sig=1"), ("o", f"{HOST}/b?sig=1")],
            [("o", f"{HOST}/b?sig=2"), ("o", f"{HOST}/a?sig=2")],
            [f"{HOST}/a?sig=2", f"{HOST}/b?sig=2"],
            id="equal ids: signed again",
        ),
        pytest.param(
            [("o", f"{HOST}/a"), ("o", f"{HOST}/b")],
            [("o", "https://cdn.example/b?x"), ("o", "https://cdn.example/a?x")],
            ["https://cdn.example/a?x", "https://cdn.example/b?x"],
            id="equal ids: another host",
        ),
        pytest.param(
            [("o", f"{HOST}/?id=1"), ("o", f"{HOST}/?id=2")],
            [("o", f"{HOST}/?id=2&t=9"), ("o", f"{HOST}/?id=1&t=9")],
            [f"{HOST}/?id=1", f"{HOST}/?id=2"],
            id="the path says nothing",
        ),
        pytest.param(
            [("o", "A"), ("o", "B", "videoUrl")],
            [("o", "B2", "videoUrl"), ("o", "A2")],
            ["A2", "B2"],
            id="equal ids of two types",
        ),
        pytest.param([("o", "A"), ("o", "B")], [("o", "X"), ("o", "Y")], ["A", "B"], id="in doubt"),
        pytest.param([("o", "A"), ("o", "B")], [("o", "A"), ("o", "A")], ["A", "B"], id="one source twice"),
        pytest.param(
            [("a", "A"), ("b", "B")], [("a", "A"), ("b", "A")], ["A", "B"], id="one source, two ids"
        ),
        pytest.param(
            [("o", "A"), ("o", "A")], [("o", "A"), ("o", "A")], ["A", "A"], id="twins from the start"
        ),
        pytest.param([("a", "A"), ("b", "B")], [("b", "B2")], ["A", "B2"], id="one is missing"),
        pytest.param([("a", "A")], [("b", "B"), ("a", "A2"), ("c", "C")], ["A2"], id="more than before"),
        pytest.param([("a", "A")], [("a", "A2", "videoUrl")], ["A"], id="another type"),
        pytest.param(
            [("output_0", "A"), ("output_1", "B")],
            [("", "B2"), ("", "A")],
            ["A", "B2"],
            id="FLORA gives no ids",
        ),
        pytest.param(
            [("output_0", "A"), ("output_1", "B")],
            [("output_1", "B2"), ("output_0", "A2")],
            ["A2", "B2"],
            id="ids that look as if we had made them",
        ),
        pytest.param(
            [("a", "yes", "text"), ("b", "no", "text")],
            [("b", "yes", "text"), ("a", "yes", "text")],
            ["yes", "yes"],
            id="equal texts are no shared source",
        ),
        pytest.param(
            [("o", "//[a"), ("o", "//[b")], [("o", "//[c"), ("o", "//[d")], ["//[a", "//[b"], id="no URLs"
        ),
    ],
)
def test_each_output_gets_its_own_new_url(
    stored: list[tuple[str, str]], read: list[tuple[str, str]], expected: list[str]
) -> None:
    """By id where it is unique, else by id, type and what the values show; in doubt it stays as it was."""
    outputs = a_list(*stored)
    result = refresh_outputs(outputs, a_list(*read))
    assert [each.value for each in result] == expected
    assert [(each.position, each.output_id, each.type) for each in result] == [
        (each.position, each.output_id, each.type) for each in outputs
    ]


IDS = st.sampled_from(["", "a", "b", "output_0", "output_1"])
URLS = st.sampled_from([f"{HOST}/{name}?{sig}" for name in "abc" for sig in "12"])
OUTPUTS = st.lists(st.tuples(IDS, URLS), max_size=4).map(lambda rows: a_list(*rows))


@given(OUTPUTS, OUTPUTS)
def test_no_two_outputs_come_to_share_a_source(
    stored: tuple[Output, ...], read: tuple[Output, ...]
) -> None:
    """Whatever a read shows, two outputs that had different URLs never end with one, or one would be lost."""
    result = refresh_outputs(stored, read)
    assert [each.position for each in result] == [each.position for each in stored]
    for before, after in zip(stored, result, strict=True):
        sharing = [other for other in result if other.value == after.value and other is not after]
        assert after.value == before.value or not sharing


@given(OUTPUTS, st.randoms())
def test_the_same_read_in_any_order_changes_nothing(stored: tuple[Output, ...], random: object) -> None:
    """Order alone is no news."""
    shuffled = list(stored)
    random.shuffle(shuffled)  # type: ignore[attr-defined]  # hypothesis types it as Random only at run time
    again = tuple(
        Output(position, each.output_id, each.type, each.value) for position, each in enumerate(shuffled)
    )
    assert refresh_outputs(stored, again) == stored
