"""What a value of a request may be."""

import pytest

from receiver.web.values import MOST_LEVELS, find_problem, find_start_token


def nested(levels: int) -> object:
    value: object = []
    for _ in range(levels - 1):
        value = {"a": value}
    return value


@pytest.mark.parametrize(
    "value",
    [
        "",
        "é",
        "\U0001f3a8",
        "a\tb",
        "\ufffd",
        2**63 - 1,
        -(2**63),
        1.5,
        True,
        None,
        [],
        {"a": [1]},
        nested(MOST_LEVELS),
    ],
)
def test_usable_values(value: object) -> None:
    assert find_problem(value, "name", longest=10) is None


@pytest.mark.parametrize(
    ("value", "field", "message"),
    [
        ("a\0b", "name", "NUL"),
        ("\ud800", "name", "surrogate"),
        ("a" * 11, "name", "more than 10 characters"),
        (2**63, "name", "64 bits"),
        (-(2**63) - 1, "name", "64 bits"),
        (float("inf"), "name", "too large"),
        ({"a": [0, {"b": "\0"}]}, "name.a.1.b", "NUL"),
        ({"a": {"\udfff": 1}}, "name.a", "key"),
        (nested(MOST_LEVELS + 1), "name" + ".a" * 97, "deeper"),
    ],
)
def test_unusable_values_are_named(value: object, field: str, message: str) -> None:
    """The name itself can be sent in a response: it is short, and storable."""
    found = find_problem(value, "name", longest=10)
    assert found is not None
    assert found[0].startswith(field)
    assert message in found[1]
    assert len(found[0]) <= 200


def test_a_start_token_has_the_form_of_ours() -> None:
    token = "0123456789abcdef" * 2
    assert find_start_token(token) == token
    for other in (None, "", "\0", token + "\n", token[1:], token.upper(), token + "0", "abc"):
        assert find_start_token(other) is None
