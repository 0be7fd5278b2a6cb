"""Who is at fault when callbacks do not come: the tunnel, the receiver or FLORA. Pure: canaries in, a judgement out.

Two canaries are sent at the same time: one through the public URL, one to the receiver on loopback. What only the first
one misses lies between; what both miss lies with the receiver.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from receiver.cli.doctor.probe import Obstacle, Probe

__all__ = ["Fault", "Judgement", "Upstream", "judge", "upstream"]

_REDIRECTS = range(300, 400)


class Fault(StrEnum):
    """Who."""

    TUNNEL = "tunnel"
    """The way from outside to this machine, whoever runs it."""
    RECEIVER = "receiver"
    FLORA = "flora"


class Upstream(StrEnum):
    """How FLORA's API has answered since the last look."""

    UNKNOWN = "unknown"
    """It was not asked."""
    WELL = "well"
    SILENT = "silent"
    """No answer at all."""
    REFUSING = "refusing"
    """It does not take the API key."""
    FAILING = "failing"
    """5xx."""


@dataclass(frozen=True, slots=True)
class Judgement:
    """What two canaries and FLORA's last answers say. `code` is stable, `reason` is for people."""

    fault: Fault | None
    code: str
    reason: str
    reopen: bool = False
    """Whether opening the tunnel again may help."""
    seconds: float | None = None
    """How long the canary took from outside, where it arrived."""

    @property
    def open(self) -> bool:
        """Whether callbacks come through, as far as can be seen from here."""
        return self.fault in {None, Fault.FLORA}


def judge(outside: Probe | None, inside: Probe, flora: Upstream = Upstream.UNKNOWN, *, ours: bool = True) -> Judgement:
    """Return who is at fault. `outside` None: there is no public URL to try. `ours`: the tunnel is run by us.

    Where it is not, an address that does not answer may be our own router's, which seldom leads back inside: then the
    outside cannot be judged from here.
    """
    if not inside.arrived:
        return _receiver(inside)
    if outside is None or outside.arrived:
        seconds = None if outside is None else outside.seconds
        return _flora(flora, seconds)
    if outside.status is None:
        return _unanswered(outside, flora, ours=ours)
    return _misled(outside, ours=ours)


def upstream(before: Mapping[str, float], after: Mapping[str, float]) -> Upstream:
    """Return how FLORA has answered between two counts of its answers by status (`none`: there was no answer)."""
    new = {status: count - before.get(status, 0) for status, count in after.items()}
    seen = {status for status, count in new.items() if count > 0}
    if not seen:
        return Upstream.UNKNOWN
    if seen & {"401", "403"}:
        return Upstream.REFUSING
    if any(status.isdecimal() and int(status) < 500 for status in seen):
        return Upstream.WELL
    return Upstream.SILENT if "none" in seen else Upstream.FAILING


def _receiver(inside: Probe) -> Judgement:
    if inside.status is None:
        return Judgement(Fault.RECEIVER, "receiver_silent", f"it does not answer on this machine: {inside.message}")
    if inside.answer == "unavailable":
        return Judgement(Fault.RECEIVER, "receiver_unavailable", "it cannot commit: look at its database and disk")
    answer = inside.answer or f"HTTP {inside.status}"
    return Judgement(Fault.RECEIVER, "receiver_refuses", f"on this machine the canary was answered with {answer}")


def _flora(flora: Upstream, seconds: float | None) -> Judgement:
    match flora:
        case Upstream.SILENT:
            return Judgement(Fault.FLORA, "flora_silent", "its API does not answer", seconds=seconds)
        case Upstream.REFUSING:
            return Judgement(Fault.FLORA, "flora_refuses", "its API does not take FLORA_API_KEY", seconds=seconds)
        case Upstream.FAILING:
            return Judgement(Fault.FLORA, "flora_fails", "its API answers with errors of its own", seconds=seconds)
        case Upstream.UNKNOWN | Upstream.WELL:
            return Judgement(
                None, "open", "callbacks come through" if seconds else "the receiver works", seconds=seconds
            )


def _unanswered(outside: Probe, flora: Upstream, *, ours: bool) -> Judgement:
    if outside.obstacle is Obstacle.TLS:
        reason = f"its certificate would not be trusted: {outside.message}"
        return Judgement(Fault.TUNNEL, "certificate", reason)
    if flora is Upstream.SILENT:
        reason = "neither the public URL nor FLORA answers: is this machine offline?"
        return Judgement(Fault.TUNNEL, "offline", reason, reopen=ours)
    if not ours and outside.obstacle in {Obstacle.REFUSED, Obstacle.TIMEOUT}:
        reason = f"cannot be checked from here: this machine does not reach {outside.url} ({outside.message})"
        return Judgement(None, "unchecked", reason)
    return Judgement(Fault.TUNNEL, "unreachable", f"nobody answers at {outside.url}: {outside.message}", reopen=ours)


def _misled(outside: Probe, *, ours: bool) -> Judgement:
    """Something answered from outside, and it was not what the receiver answers on loopback."""
    if outside.status in _REDIRECTS:
        where = f" to {outside.location}" if outside.location else ""
        return Judgement(Fault.TUNNEL, "redirected", f"it redirects{where}, and FLORA follows no redirect")
    if outside.answer == "signature_mismatch":
        reason = (
            "altered on the way, or another receiver's: the canary was refused outside and is taken on this machine"
        )
        return Judgement(Fault.TUNNEL, "altered", reason)
    if outside.answer is not None:
        return Judgement(Fault.TUNNEL, "refused", f"from outside the canary is answered with {outside.answer}")
    shown = f": {outside.message}" if outside.message else ""
    reason = f"something else answers from outside, with HTTP {outside.status}{shown}"
    return Judgement(Fault.TUNNEL, "elsewhere", reason, reopen=ours)
