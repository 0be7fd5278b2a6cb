"""The health of the callback channel, judged from the ledger's counts. Pure."""

from collections.abc import Mapping
from dataclasses import dataclass

_BROKEN = ("recovered", "late")


@dataclass(frozen=True, slots=True)
class ChannelHealth:
    """Whether callbacks arrive as they should; if not, the likely cause and its fix."""

    ok: bool
    matched: int = 0
    recovered: int = 0
    diverged: int = 0
    lost: int = 0
    cause: str | None = None
    cure: str | None = None


def channel_health(
    outcomes: Mapping[str, int], *, arrivals: int, refusals: Mapping[str, int]
) -> ChannelHealth:
    """Judge a period by its outcomes of runs, its callbacks, and its refusals by code."""
    missed = sum(outcomes.get(name, 0) for name in _BROKEN)
    cause, cure = _cause(arrivals, refusals) if missed else (None, None)
    diverged, lost = outcomes.get("diverged", 0), outcomes.get("lost", 0)
    return ChannelHealth(
        ok=not (missed or diverged or lost),
        matched=outcomes.get("matched", 0),
        recovered=outcomes.get("recovered", 0),
        diverged=diverged,
        lost=lost,
        cause=cause,
        cure=cure,
    )


def _cause(arrivals: int, refusals: Mapping[str, int]) -> tuple[str, str]:
    if refusals.get("signature_mismatch", 0) or refusals.get("workspace_mismatch", 0):
        return (
            "callbacks arrive and their signatures are refused",
            "compare FLORA_WEBHOOK_SECRET with the workspace's secret; a proxy must not change the body",
        )
    if refusals.get("timestamp_out_of_tolerance", 0):
        return "callbacks arrive with times that are refused", "set this machine's clock (NTP)"
    if refusals.get("missing_signature", 0) or refusals.get("malformed_signature", 0):
        return (
            "requests arrive without FLORA's signature",
            "a proxy may drop or rewrite the Flora-Signature header: pass it through unchanged",
        )
    if refusals.get("body_too_large", 0) or refusals.get("body_timeout", 0):
        return (
            "bodies arrive too large or too slowly",
            "check [public] max_body_bytes, and how the proxy forwards bodies",
        )
    if arrivals == 0:
        return (
            "no callback reaches this listener at all",
            "check public_url from outside: DNS, the tunnel or proxy, its TLS certificate, redirects",
        )
    return (
        "some callbacks arrive and some do not",
        "was this service or its proxy down for more than six minutes, or slower than 10 s to answer?",
    )
