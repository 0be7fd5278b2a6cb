"""Signatures: FLORA's own results, the code of each refusal, and no other error."""

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from receiver.errors import SignatureError, SignatureProblem
from receiver.flora.signature import Verified, sign, verify

VECTORS = json.loads((Path(__file__).parents[1] / "vectors" / "signature-vectors.json").read_text())[
    "cases"
]
SECRET, OTHER = "whsec_one", "whsec_two"
NOW = 1_750_000_000
BODY = b'{"id":"whd_1"}'
DIGEST = sign(BODY, SECRET, timestamp=NOW).partition("v1=")[2]


def refusal_of(header: str | None, *, body: bytes = BODY, **options: Any) -> SignatureError:
    """Return the refusal that this header earns."""
    with pytest.raises(SignatureError) as caught:
        verify(body, header, [SECRET], now=NOW, **options)
    return caught.value


@pytest.mark.parametrize("case", VECTORS, ids=[case["name"] for case in VECTORS])
def test_agrees_with_floras_own_sdk(case: dict[str, Any]) -> None:
    """Every verdict of `@flora-ai/flora` is ours too; its tolerance 0 (off) is our None."""
    tolerance = case["tolerance"] or None

    def verdict() -> bool:
        try:
            verify(
                case["body"].encode(), case["header"], [case["secret"]], now=case["now"],
                tolerance_past=tolerance, tolerance_future=tolerance,
            )  # fmt: skip
        except SignatureError:
            return False
        return True

    assert verdict() is case["valid"]


def test_there_are_33_vectors() -> None:
    """No vector gets lost on the way."""
    assert len(VECTORS) == 33


@pytest.mark.parametrize(
    ("header", "problem"),
    [
        (None, SignatureProblem.MISSING_SIGNATURE),
        ("", SignatureProblem.MISSING_SIGNATURE),
        ("  \t", SignatureProblem.MISSING_SIGNATURE),
        ("hello", SignatureProblem.MALFORMED_SIGNATURE),
        (",,,=,=", SignatureProblem.MALFORMED_SIGNATURE),
        (f"v1={DIGEST}", SignatureProblem.MALFORMED_SIGNATURE),
        (f"t={NOW}", SignatureProblem.MALFORMED_SIGNATURE),
        (f"t={NOW},v1=", SignatureProblem.MALFORMED_SIGNATURE),
        (f"t={NOW},v0={DIGEST}", SignatureProblem.MALFORMED_SIGNATURE),
        (f"t={NOW},t={NOW},v1={DIGEST}", SignatureProblem.MALFORMED_SIGNATURE),
        (f"t={NOW},v1={DIGEST},t={NOW},v1={DIGEST}", SignatureProblem.MALFORMED_SIGNATURE),
        (f"t={NOW},v1={DIGEST[:-1]}", SignatureProblem.MALFORMED_SIGNATURE),
        (f"t={NOW},v1={DIGEST}0", SignatureProblem.MALFORMED_SIGNATURE),
        (f"t={NOW},v1={DIGEST.upper()}", SignatureProblem.MALFORMED_SIGNATURE),
        (f"t=+{NOW},v1={DIGEST}", SignatureProblem.MALFORMED_SIGNATURE),
        (f"t=-1,v1={DIGEST}", SignatureProblem.MALFORMED_SIGNATURE),
        (f"t=1_750_000_000,v1={DIGEST}", SignatureProblem.MALFORMED_SIGNATURE),
        (f"t=１７５００００００,v1={DIGEST}", SignatureProblem.MALFORMED_SIGNATURE),  # noqa: RUF001  # full-width digits are the point
        (f"t={NOW}.0,v1={DIGEST}", SignatureProblem.MALFORMED_SIGNATURE),
        (f"t={'9' * 16},v1={DIGEST}", SignatureProblem.MALFORMED_SIGNATURE),
        (f"t={NOW},v1={'٣' * 64}", SignatureProblem.MALFORMED_SIGNATURE),
        (f"t={NOW},v1={DIGEST}" + "," * 5000, SignatureProblem.MALFORMED_SIGNATURE),
        (f"t={NOW}" + f",v1={DIGEST}" * 17, SignatureProblem.MALFORMED_SIGNATURE),
        (f"t={NOW + 1},v1={DIGEST}", SignatureProblem.SIGNATURE_MISMATCH),
        (f"t=0{NOW},v1={DIGEST}", SignatureProblem.SIGNATURE_MISMATCH),
        (f"t={NOW},v1={'0' * 64}", SignatureProblem.SIGNATURE_MISMATCH),
        (sign(BODY + b" ", SECRET, timestamp=NOW), SignatureProblem.SIGNATURE_MISMATCH),
        (sign(BODY, OTHER, timestamp=NOW), SignatureProblem.SIGNATURE_MISMATCH),
        (sign(BODY, SECRET.removeprefix("whsec_"), timestamp=NOW), SignatureProblem.SIGNATURE_MISMATCH),
        (sign(BODY, SECRET, timestamp=NOW - 901), SignatureProblem.TIMESTAMP_OUT_OF_TOLERANCE),
        (sign(BODY, SECRET, timestamp=NOW + 301), SignatureProblem.TIMESTAMP_OUT_OF_TOLERANCE),
        (sign(BODY, SECRET, timestamp=0), SignatureProblem.TIMESTAMP_OUT_OF_TOLERANCE),
        (sign(BODY, SECRET, timestamp=999_999_999_999_999), SignatureProblem.TIMESTAMP_OUT_OF_TOLERANCE),
        # A forged signature at a wrong time tells nothing about our clock: the signature is judged
        # first.
        (sign(BODY, OTHER, timestamp=0), SignatureProblem.SIGNATURE_MISMATCH),
    ],
)  # fmt: skip
def test_every_refusal_has_its_code(header: str | None, problem: SignatureProblem) -> None:
    """A header that does not verify is refused with the code of its problem."""
    assert refusal_of(header).problem is problem


@pytest.mark.parametrize(
    "header", [f"t={NOW},v1={DIGEST}" + ",v1=zz" * 15, f"t={NOW},v1={'0' * 64},v1={DIGEST}"]
)
def test_one_good_signature_among_others_is_enough(header: str) -> None:
    """FLORA sends several while a secret is rotated.

    Unreadable ones do not spoil the readable one.
    """
    assert verify(BODY, header, [SECRET], now=NOW) == Verified(0, 0)


def test_tells_which_secret_matched() -> None:
    """The index of the secret names the workspace; the first of several that match counts."""
    header = sign(BODY, OTHER, timestamp=NOW)
    assert verify(BODY, header, [SECRET, OTHER], now=NOW).secret == 1
    assert verify(BODY, header, [OTHER, SECRET, OTHER], now=NOW).secret == 0


def test_without_secrets_nothing_verifies() -> None:
    """An empty list of secrets is no open door."""
    with pytest.raises(SignatureError) as caught:
        verify(BODY, sign(BODY, "", timestamp=NOW), [], now=NOW)
    assert caught.value.problem is SignatureProblem.SIGNATURE_MISMATCH


@pytest.mark.parametrize(
    ("age", "good"), [(900, True), (901, False), (-300, True), (-301, False), (0, True)]
)
def test_tolerance_includes_its_edge(age: int, good: bool) -> None:
    """900 s in the past and 300 s ahead pass, one second more does not; the age is told."""
    header = sign(BODY, SECRET, timestamp=NOW - age)
    if good:
        assert verify(BODY, header, [SECRET], now=NOW) == Verified(0, age)
    else:
        assert refusal_of(header).problem is SignatureProblem.TIMESTAMP_OUT_OF_TOLERANCE


def test_zero_tolerance_is_no_tolerance() -> None:
    """0 takes this very second only: it does not turn the check off, as it does in FLORA's SDK."""
    header = sign(BODY, SECRET, timestamp=NOW)
    assert verify(BODY, header, [SECRET], now=NOW, tolerance_past=0, tolerance_future=0) == Verified(0, 0)
    for off in (-1, 1):
        header = sign(BODY, SECRET, timestamp=NOW + off)
        assert (
            refusal_of(header, tolerance_past=0, tolerance_future=0).problem
            is SignatureProblem.TIMESTAMP_OUT_OF_TOLERANCE
        )


@pytest.mark.parametrize(("past", "future", "good"), [(None, 300, "past"), (900, None, "future")])
def test_none_turns_one_side_off(past: int | None, future: int | None, good: str) -> None:
    """None switches the check off on its own side alone."""
    headers = {"past": sign(BODY, SECRET, timestamp=0), "future": sign(BODY, SECRET, timestamp=NOW * 2)}
    for side, header in headers.items():
        if side == good:
            found = verify(BODY, header, [SECRET], now=NOW, tolerance_past=past, tolerance_future=future)
            assert found.secret == 0
        else:
            refusal_of(header, tolerance_past=past, tolerance_future=future)


def test_an_authentic_body_at_a_wrong_time_names_its_secret() -> None:
    """Only the time is wrong, so the body is worth a look; a forged one never is."""
    assert refusal_of(sign(BODY, SECRET, timestamp=0)).secret == 0
    assert refusal_of(sign(BODY, OTHER, timestamp=0)).secret is None


def test_a_secret_that_is_not_unicode_matches_nothing() -> None:
    """A secret from a badly encoded environment matches nothing, and does not affect the others."""
    header = sign(BODY, SECRET, timestamp=NOW)
    assert verify(BODY, header, ["whsec_\udcff", SECRET], now=NOW).secret == 1


def test_refusals_never_show_the_secret_or_the_digest() -> None:
    """The message goes to the sender and into logs."""
    for header in (f"t={NOW},v1={'0' * 64}", f"t={NOW},v1={DIGEST[:10]}", sign(BODY, SECRET, timestamp=0)):
        text = str(refusal_of(header))
        assert SECRET not in text
        assert DIGEST[:10] not in text


headers = st.one_of(
    st.none(),
    st.text(),
    st.text(alphabet="t=v1,0123456789abcdef \t"),
    st.builds("t={},v1={}".format, st.integers() | st.text(), st.text() | st.just(DIGEST)),
)


@given(body=st.binary(), header=headers, secrets=st.lists(st.text(), max_size=3), now=st.integers())
@example(body=b"", header="t=,v1=", secrets=[""], now=0)
@example(body=b"\x00", header="t=1,v1=\ud800", secrets=["\ud800"], now=2**70)
def test_nothing_but_a_signature_error_ever_comes_out(
    body: bytes, header: str | None, secrets: list[str], now: int
) -> None:
    """Whatever the bytes are, verification answers or refuses; it never breaks."""
    with contextlib.suppress(SignatureError):
        verify(body, header, secrets, now=now)


@given(body=st.binary(), secret=st.text(min_size=1), timestamp=st.integers(0, 10**15 - 1))
def test_what_we_sign_verifies(body: bytes, secret: str, timestamp: int) -> None:
    """Signing and verifying are each other's mirror, for any bytes and any secret."""
    header = sign(body, secret, timestamp=timestamp)
    assert verify(body, header, [secret], now=timestamp) == Verified(0, 0)


@given(body=st.binary(min_size=1), place=st.integers(0), flip=st.integers(1, 255))
def test_one_changed_byte_is_refused(body: bytes, place: int, flip: int) -> None:
    """No byte of the body is free."""
    header = sign(body, SECRET, timestamp=NOW)
    changed = bytearray(body)
    changed[place % len(body)] ^= flip
    assert refusal_of(header, body=bytes(changed)).problem is SignatureProblem.SIGNATURE_MISMATCH
