"""What a key, a secret or a token may consist of, and that no header refuses what is accepted."""

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from receiver.net.credentials import describe_character, find_fault, split_list


@pytest.mark.parametrize(
    "value", ["sk_live_0123456789", "whsec_aB1+/=", "t", "a.b-c_d~!#$%&()*:<=>?@[]^{|}"]
)
def test_printable_ascii_is_accepted(value: str) -> None:
    assert find_fault(value) is None


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("", "is empty"),
        (" ", "is empty"),
        ("key\n", "white space around it"),
        ("\u00a0key", "white space around it"),
        ("\ufeffkey", "begins with a byte order mark"),
        ("ke\ufeffy", "an invisible character (U+FEFF) inside"),
        ("key\u200b", "an invisible character (U+200B) at its end"),
        ("key\u201d", "a quotation mark (U+201D) at its end"),
        ("'key", "a quotation mark (U+0027) at its beginning"),
        ("ke y", "white space (U+0020) inside"),
        ("key\n#", "a line break inside"),
        ("k\x00y", "a control character (U+0000) inside"),
        ("kéy", "not ASCII (U+00E9) inside"),
        ("whsec_1whsec_2", "more than one"),
    ],
)
def test_a_fault_is_named(value: str, words: str) -> None:
    fault = find_fault(value)
    assert fault is not None
    assert words in fault


@given(st.text(max_size=30))
def test_what_is_accepted_fits_into_a_header(value: str) -> None:
    """And a refusal never contains the value."""
    fault = find_fault(value)
    if fault is None:
        assert httpx.Headers({"Authorization": f"Bearer {value}"})["Authorization"] == f"Bearer {value}"
    elif len(value) > 12:
        assert value not in fault


@given(st.characters(codec=None))
def test_every_character_is_described(character: str) -> None:
    assert f"(U+{ord(character):04X})" in describe_character(character) or character in "\r\n"


def test_a_list_is_split_between_values_only() -> None:
    assert split_list("a,b;c\nd , e") == ["a", "b", "c", "d", "e"]
    assert split_list(" a b\n") == [" a b\n"]
