"""Who is at fault: a table of what two canaries met."""

import pytest

from receiver.cli.dev.tunnel.diagnosis import Fault, Upstream, judge, upstream
from receiver.cli.doctor.probe import Obstacle, Probe

URL = "https://hooks.example.com/callbacks/flora"
HOME = "http://127.0.0.1:8080/callbacks/flora"


def met(status: int | None = 200, answer: str | None = None, obstacle: Obstacle | None = None, **more: str) -> Probe:
    return Probe(URL, 0.1, status=status, answer=answer, obstacle=obstacle, **more)


ARRIVED, WELL = met(answer="canary"), Upstream.WELL
HOME_FINE = Probe(HOME, 0.001, status=200, answer="canary")
LOST = {obstacle: met(None, obstacle=obstacle, message="why") for obstacle in Obstacle}


@pytest.mark.parametrize(
    ("outside", "inside", "flora", "ours", "fault", "code", "reopen"),
    [
        (ARRIVED, HOME_FINE, WELL, True, None, "open", False),
        (ARRIVED, HOME_FINE, Upstream.UNKNOWN, True, None, "open", False),
        (None, HOME_FINE, WELL, True, None, "open", False),
        # The receiver: whatever is seen from outside follows from it.
        (ARRIVED, LOST[Obstacle.REFUSED], WELL, True, Fault.RECEIVER, "receiver_silent", False),
        (
            LOST[Obstacle.TIMEOUT],
            LOST[Obstacle.TIMEOUT],
            Upstream.SILENT,
            True,
            Fault.RECEIVER,
            "receiver_silent",
            False,
        ),
        (met(503, "unavailable"), met(503, "unavailable"), WELL, True, Fault.RECEIVER, "receiver_unavailable", False),
        (ARRIVED, met(401, "signature_mismatch"), WELL, True, Fault.RECEIVER, "receiver_refuses", False),
        (None, met(404), WELL, True, Fault.RECEIVER, "receiver_refuses", False),
        # FLORA: only once the way is open.
        (ARRIVED, HOME_FINE, Upstream.SILENT, True, Fault.FLORA, "flora_silent", False),
        (ARRIVED, HOME_FINE, Upstream.REFUSING, True, Fault.FLORA, "flora_refuses", False),
        (None, HOME_FINE, Upstream.FAILING, True, Fault.FLORA, "flora_fails", False),
        # The tunnel: what opening it again may heal, and what not.
        (LOST[Obstacle.TIMEOUT], HOME_FINE, WELL, True, Fault.TUNNEL, "unreachable", True),
        (LOST[Obstacle.REFUSED], HOME_FINE, WELL, True, Fault.TUNNEL, "unreachable", True),
        (LOST[Obstacle.NAME], HOME_FINE, WELL, True, Fault.TUNNEL, "unreachable", True),
        (LOST[Obstacle.CUT], HOME_FINE, WELL, True, Fault.TUNNEL, "unreachable", True),
        (LOST[Obstacle.NAME], HOME_FINE, Upstream.SILENT, True, Fault.TUNNEL, "offline", True),
        (LOST[Obstacle.TLS], HOME_FINE, WELL, True, Fault.TUNNEL, "certificate", False),
        (met(502), HOME_FINE, WELL, True, Fault.TUNNEL, "elsewhere", True),
        (met(200), HOME_FINE, WELL, True, Fault.TUNNEL, "elsewhere", True),
        (met(301, location="https://x"), HOME_FINE, WELL, True, Fault.TUNNEL, "redirected", False),
        (met(401, "signature_mismatch"), HOME_FINE, WELL, True, Fault.TUNNEL, "altered", False),
        (met(404, "not_found"), HOME_FINE, WELL, True, Fault.TUNNEL, "refused", False),
        # A URL that somebody else leads here: this machine may not reach its own public address.
        (LOST[Obstacle.TIMEOUT], HOME_FINE, WELL, False, None, "unchecked", False),
        (LOST[Obstacle.REFUSED], HOME_FINE, WELL, False, None, "unchecked", False),
        (LOST[Obstacle.NAME], HOME_FINE, WELL, False, Fault.TUNNEL, "unreachable", False),
        (LOST[Obstacle.CUT], HOME_FINE, WELL, False, Fault.TUNNEL, "unreachable", False),
        (LOST[Obstacle.TIMEOUT], HOME_FINE, Upstream.SILENT, False, Fault.TUNNEL, "offline", False),
        (met(401, "signature_mismatch"), HOME_FINE, WELL, False, Fault.TUNNEL, "altered", False),
    ],
)
def test_who_is_at_fault(
    outside: Probe | None, inside: Probe, flora: Upstream, ours: bool, fault: Fault | None, code: str, reopen: bool
) -> None:
    """Each row: what was met outside and inside, and how FLORA answers; who, why, and whether opening again may help."""
    found = judge(outside, inside, flora, ours=ours)
    assert (found.fault, found.code, found.reopen) == (fault, code, reopen)
    assert found.reason
    assert found.open is (fault in {None, Fault.FLORA})


def test_the_way_is_told_with_its_time() -> None:
    assert judge(ARRIVED, HOME_FINE).seconds == 0.1
    assert judge(None, HOME_FINE).seconds is None


@pytest.mark.parametrize(
    ("before", "after", "found"),
    [
        ({}, {}, Upstream.UNKNOWN),
        ({"200": 3, "none": 9}, {"200": 3, "none": 9}, Upstream.UNKNOWN),
        ({"none": 9}, {"200": 1, "none": 9}, Upstream.WELL),
        ({}, {"200": 1, "none": 5, "500": 5}, Upstream.WELL),
        ({}, {"429": 1}, Upstream.WELL),
        ({}, {"404": 2}, Upstream.WELL),
        ({"200": 3}, {"200": 3, "none": 1}, Upstream.SILENT),
        ({}, {"none": 1, "503": 1}, Upstream.SILENT),
        ({}, {"503": 1}, Upstream.FAILING),
        ({}, {"401": 1, "200": 2}, Upstream.REFUSING),
        ({}, {"403": 1}, Upstream.REFUSING),
    ],
)
def test_how_flora_answers(before: dict[str, float], after: dict[str, float], found: Upstream) -> None:
    """What was counted since the last look; that a run is not found, or the rate is limited, is a good answer."""
    assert upstream(before, after) is found
