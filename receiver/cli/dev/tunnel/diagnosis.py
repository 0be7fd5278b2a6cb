"""Decides what is at fault when callbacks do not arrive: the tunnel, the receiver or FLORA. Pure.

Two canaries are sent at the same time: one through the public URL, one to the receiver on loopback.
A fault that only the first one meets lies in between; one that both meet lies with the receiver.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import assert_never

from receiver.cli.doctor.probe import ProbeFailure, ProbeResult

__all__ = ["Diagnosis", "Fault", "FloraState", "compare_request_counts", "diagnose"]

_REDIRECTS = range(300, 400)


class Fault(StrEnum):
    """The part that does not work."""

    TUNNEL = "tunnel"
    """The route from the internet to this machine, whether `dev` opened it or not."""
    RECEIVER = "receiver"
    FLORA = "flora"


class FloraState(StrEnum):
    """How FLORA's API has responded since the previous check."""

    UNKNOWN = "unknown"
    """No request was sent."""
    HEALTHY = "healthy"
    UNREACHABLE = "unreachable"
    """There was no response."""
    KEY_REFUSED = "key_refused"
    """The API key was refused."""
    FAILING = "failing"
    """The responses were 5xx."""


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """The result of a check. `code` is stable; `reason` is for people."""

    fault: Fault | None
    code: str
    reason: str
    can_reopen: bool = False
    """Whether reopening the tunnel may help."""
    seconds: float | None = None
    """How long the canary through the public URL took, if it arrived."""

    @property
    def is_open(self) -> bool:
        """Whether callbacks arrive, as far as this machine can tell."""
        return self.fault in {None, Fault.FLORA}


def diagnose(
    outside: ProbeResult | None,
    inside: ProbeResult,
    flora: FloraState = FloraState.UNKNOWN,
    *,
    is_ours: bool = True,
) -> Diagnosis:
    """Return what is at fault. `outside` is None without a public URL.

    `is_ours` says that `dev` opened the tunnel. Where it did not, the URL may belong to the local
    router, and many routers do not route their own public address back inside: then a URL that does
    not respond proves nothing.
    """
    if not inside.has_arrived:
        return _diagnose_receiver(inside)
    if outside is None or outside.has_arrived:
        return _diagnose_flora(flora, None if outside is None else outside.seconds)
    if outside.status is None:
        return _diagnose_no_response(outside, flora, is_ours=is_ours)
    return _diagnose_other_response(outside, is_ours=is_ours)


def compare_request_counts(before: Mapping[str, float], after: Mapping[str, float]) -> FloraState:
    """Return how FLORA responded between two counts by HTTP status (`none`: no response)."""
    statuses = {status for status, count in after.items() if count > before.get(status, 0)}
    if not statuses:
        return FloraState.UNKNOWN
    if statuses & {"401", "403"}:
        return FloraState.KEY_REFUSED
    if any(status.isdecimal() and int(status) < 500 for status in statuses):
        return FloraState.HEALTHY
    return FloraState.UNREACHABLE if "none" in statuses else FloraState.FAILING


def _diagnose_receiver(inside: ProbeResult) -> Diagnosis:
    if inside.status is None:
        reason = f"it does not respond on this machine: {inside.message}"
        return Diagnosis(Fault.RECEIVER, "receiver_silent", reason)
    if inside.code == "unavailable":
        reason = "it cannot commit; check its database and its disk"
        return Diagnosis(Fault.RECEIVER, "receiver_unavailable", reason)
    reason = f"on this machine it responded to the canary with {inside.code or f'HTTP {inside.status}'}"
    return Diagnosis(Fault.RECEIVER, "receiver_refuses", reason)


def _diagnose_flora(flora: FloraState, seconds: float | None) -> Diagnosis:
    match flora:
        case FloraState.UNREACHABLE:
            code, reason = "flora_silent", "its API does not respond"
        case FloraState.KEY_REFUSED:
            code, reason = "flora_refuses", "its API refuses FLORA_API_KEY"
        case FloraState.FAILING:
            code, reason = "flora_fails", "its API responds with server errors"
        case FloraState.UNKNOWN | FloraState.HEALTHY:
            reason = "the receiver works" if seconds is None else "callbacks arrive"
            return Diagnosis(None, "open", reason, seconds=seconds)
        case _:
            assert_never(flora)
    return Diagnosis(Fault.FLORA, code, reason, seconds=seconds)


def _diagnose_no_response(outside: ProbeResult, flora: FloraState, *, is_ours: bool) -> Diagnosis:
    if outside.failure is ProbeFailure.TLS:
        reason = f"FLORA would not trust its certificate: {outside.message}"
        return Diagnosis(Fault.TUNNEL, "certificate", reason)
    if flora is FloraState.UNREACHABLE:
        reason = "neither the public URL nor FLORA responds; this machine may be offline"
        return Diagnosis(Fault.TUNNEL, "offline", reason, can_reopen=is_ours)
    if not is_ours and outside.failure in {ProbeFailure.REFUSED, ProbeFailure.TIMEOUT}:
        reason = f"this machine cannot reach {outside.url}, so it cannot be checked from here"
        return Diagnosis(None, "unchecked", f"{reason} ({outside.message})")
    reason = f"nothing responds at {outside.url}: {outside.message}"
    return Diagnosis(Fault.TUNNEL, "unreachable", reason, can_reopen=is_ours)


def _diagnose_other_response(outside: ProbeResult, *, is_ours: bool) -> Diagnosis:
    """Diagnose a response from the public URL that differs from the receiver's on loopback."""
    if outside.status in _REDIRECTS:
        target = f" to {outside.location}" if outside.location else ""
        reason = f"it redirects{target}, and FLORA does not follow redirects"
        return Diagnosis(Fault.TUNNEL, "redirected", reason)
    if outside.code == "signature_mismatch":
        reason = (
            "the canary was refused through the public URL and accepted on this machine: it was "
            "altered on the way, or the URL leads to another receiver"
        )
        return Diagnosis(Fault.TUNNEL, "altered", reason)
    if outside.code is not None:
        reason = f"the response to the canary through the public URL is {outside.code}"
        return Diagnosis(Fault.TUNNEL, "refused", reason)
    message = f": {outside.message}" if outside.message else ""
    reason = f"something other than the receiver responds, with HTTP {outside.status}{message}"
    return Diagnosis(Fault.TUNNEL, "elsewhere", reason, can_reopen=is_ours)
