"""Values of the service: compared and hashed by their fields, frozen at run time, silent about what no log may show."""

from datetime import UTC, datetime

import pytest
from msgspec.structs import replace

from receiver.flora.signature import Verified
from receiver.model import Delivery, storable_text

NOW = datetime(2026, 7, 1, 12, tzinfo=UTC)


def test_a_value_is_its_fields() -> None:
    """Equal values are one in a set; a changed copy is another value, and the first stays as it was."""
    one = Verified(0, 5)
    assert {one, Verified(0, 5)} == {one}
    assert replace(one, age=6) != one
    assert one.age == 5
    assert one.__struct_fields__ == ("secret", "age")
    assert not hasattr(one, "__dict__")


def test_a_value_is_frozen() -> None:
    """At run time too, not for the type checker alone."""
    one = Verified(0, 5)
    with pytest.raises(AttributeError, match="immutable"):
        one.age = 6  # type: ignore[misc]  # what mypy refuses is what is tried


def test_the_body_of_a_delivery_is_not_in_its_repr() -> None:
    """A delivery may be logged; what FLORA sent must not be."""
    delivery = Delivery("whd_1", b"secret text", "t=1,v1=ab", NOW, age=0, secret=0)
    assert "secret text" not in repr(delivery)
    assert repr(delivery).startswith("Delivery(delivery_id='whd_1', signature=")


@pytest.mark.parametrize(
    ("text", "stored"),
    [("", ""), ("Ä 🧪\n\x7f", "Ä 🧪\n\x7f"), ("a\x00b\ud800\udfff", "a\ufffdb\ufffd\ufffd")],
)
def test_text_that_no_database_holds_is_replaced(text: str, stored: str) -> None:
    """NUL and lone surrogates become U+FFFD, one each; everything else stays."""
    assert storable_text(text) == stored
