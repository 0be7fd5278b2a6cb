"""FLORA's callback signature, pure: bytes and a time in, a verdict out.

`Flora-Signature: t=<unix seconds>,v1=<hex>[,v1=<hex>…]`, where v1 is HMAC-SHA256 over `"{t}." +
body` and the key is the whole secret string, its `whsec_` prefix included. Called by the intake
(verify), the emulator and `trigger` (sign).
"""

import hashlib
import hmac
import re
from collections.abc import Sequence

import msgspec

from receiver.errors import SignatureError, SignatureProblem

__all__ = ["HEADER", "Verified", "canary_key", "sign", "verify"]

HEADER = "Flora-Signature"

# FLORA sends some 80 bytes, some 150 while a secret is rotated; a header beyond this was not
# written by FLORA.
_MAX_HEADER = 4096
_MAX_CANDIDATES = 16
_CANARY = b"flora-receiver/canary/1"
# ASCII digits only: int() would also take full-width digits, "1_0" and "+1", which FLORA's own SDK
# never signs.
_SECONDS = re.compile(r"[0-9]{1,15}", re.ASCII)
_DIGEST = re.compile(r"[0-9a-f]{64}", re.ASCII)
_USUAL = re.compile(r"t=([0-9]{1,15}),v1=([0-9a-f]{64})", re.ASCII)
"""A header with one signature, read at once. The result is the same as part by part."""


class Verified(msgspec.Struct, frozen=True):
    """A valid signature: the index of its secret, and its age in seconds (negative: ahead)."""

    secret: int
    age: int


def canary_key(secret: str) -> str:
    """Return the key that signs canaries, the probes of the way from outside to the receiver.

    It signs no callback, and the webhook secret cannot be derived from it.
    """
    return hmac.digest(secret.encode("utf-8", "surrogatepass"), _CANARY, hashlib.sha256).hex()


def sign(body: bytes, secret: str, *, timestamp: int) -> str:
    """Return the header's value for `body`, signed at `timestamp` (unix seconds)."""
    return f"t={timestamp},v1={_digest(secret, str(timestamp), body).hex()}"


def verify(
    body: bytes,
    header: str | None,
    secrets: Sequence[str],
    *,
    now: int,
    tolerance_past: int | None = 900,
    tolerance_future: int | None = 300,
) -> Verified:
    """Return which of `secrets` signed `body`, or raise `SignatureError`, whatever the bytes are.

    `now` and the tolerances are seconds; a tolerance of None turns that check off (0 does not). A
    body that is signed well at the wrong time raises `timestamp_out_of_tolerance` with `secret` set
    on the error, since it is authentic.
    """
    if header is None or not header.strip():
        raise SignatureError(SignatureProblem.MISSING_SIGNATURE, f"there is no {HEADER} header")
    seconds, candidates = _parse(header)
    secret = _match(body, seconds, candidates, secrets)
    if secret is None:
        raise SignatureError(
            SignatureProblem.SIGNATURE_MISMATCH,
            "no configured secret made this signature: is FLORA_WEBHOOK_SECRET this workspace's, "
            "is the body unaltered?",
        )
    age = now - int(seconds)
    if (tolerance_past is not None and age > tolerance_past) or (
        tolerance_future is not None and -age > tolerance_future
    ):
        raise SignatureError(
            SignatureProblem.TIMESTAMP_OUT_OF_TOLERANCE,
            f"the signature is {abs(age)} s {'old' if age > 0 else 'ahead'}: is this machine's clock right?",
            secret=secret,
        )
    return Verified(secret, age)


def _parse(header: str) -> tuple[str, list[bytes]]:
    """Split a header into its time, as the text that was signed, and its v1 digests."""
    if usual := _USUAL.fullmatch(header):
        return usual[1], [bytes.fromhex(usual[2])]
    if len(header) > _MAX_HEADER:
        raise _malformed_header(f"it is longer than {_MAX_HEADER} characters")
    times: list[str] = []
    digests: list[str] = []
    for part in header.split(","):
        key, separator, value = part.strip(" \t").partition("=")
        if separator and key == "t":
            times.append(value)
        elif separator and key == "v1":
            digests.append(value)
    if len(times) != 1 or not _SECONDS.fullmatch(times[0]):
        raise _malformed_header("it needs exactly one t=<unix seconds>")
    if not digests:
        raise _malformed_header("it has no v1=<hex>")
    if len(digests) > _MAX_CANDIDATES:
        raise _malformed_header(f"it has more than {_MAX_CANDIDATES} v1 values")
    candidates = [bytes.fromhex(digest) for digest in digests if _DIGEST.fullmatch(digest)]
    if not candidates:
        raise _malformed_header("no v1 value is 64 lower-case hex digits")
    return times[0], candidates


def _match(body: bytes, seconds: str, candidates: Sequence[bytes], secrets: Sequence[str]) -> int | None:
    """Return the index of the first secret that made a candidate.

    Every pair is compared, so that the time taken reveals nothing.
    """
    found: int | None = None
    for index, secret in enumerate(secrets):
        expected = _digest(secret, seconds, body)
        for candidate in candidates:
            if hmac.compare_digest(expected, candidate) and found is None:
                found = index
    return found


def _digest(secret: str, seconds: str, body: bytes) -> bytes:
    # surrogatepass: a secret read from a badly encoded environment must fail to match, not raise.
    return hmac.digest(
        secret.encode("utf-8", "surrogatepass"), seconds.encode("ascii") + b"." + body, hashlib.sha256
    )


def _malformed_header(why: str) -> SignatureError:
    return SignatureError(
        SignatureProblem.MALFORMED_SIGNATURE, f"the {HEADER} header cannot be read: {why}"
    )
