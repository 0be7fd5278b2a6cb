"""Nouns that are plain at run time behave as frozen ones do, short of refusing."""

from dataclasses import fields, replace

import pytest

from receiver.flora.signature import Verified
from receiver.model import storable_text
from receiver.nouns import noun


def test_a_noun_is_its_fields() -> None:
    """Equal nouns are one in a set; another value is another noun, and the first stays as it was."""
    one = Verified(0, 5)
    assert {one, Verified(0, 5)} == {one}
    assert replace(one, age=6) != one
    assert one.age == 5
    assert [field.name for field in fields(one)] == ["secret", "age"]
    assert not hasattr(one, "__dict__")


def test_a_noun_says_that_it_is_frozen() -> None:
    """Else mypy would let it be changed."""
    with pytest.raises(AssertionError, match="mypy"):
        noun(frozen=False, slots=True)


@pytest.mark.parametrize(
    ("text", "stored"), [("", ""), ("Ä 🧪\n\x7f", "Ä 🧪\n\x7f"), ("a\x00b\ud800\udfff", "a\ufffdb\ufffd\ufffd")]
)
def test_text_that_no_database_holds_is_replaced(text: str, stored: str) -> None:
    """NUL and lone surrogates become U+FFFD, one each; everything else stays."""
    assert storable_text(text) == stored
