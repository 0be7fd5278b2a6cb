"""Who is at fault: a table of what two canaries met."""

import pytest

from receiver.cli.dev.tunnel.diagnosis import Fault, FloraState, compare_request_counts, diagnose
from receiver.cli.doctor.probe import ProbeFailure, ProbeResult

URL = "https://hooks.example.com/callbacks/flora"
HOME = "http://127.0.0.1:8080/callbacks/flora"


def met(
    status: int | None = 200, code: str | None = None, failure: ProbeFailure | None = None, **more: str
) -> ProbeResult:
    return ProbeResult(URL, 0.1, status=status, code=code, failure=failure, **more)


ARRIVED, WELL = met(code="canary"), FloraState.HEALTHY
HOME_FINE = ProbeResult(HOME, 0.001, status=200, code="canary")
LOST = {failure: met(None, failure=failure, message="why") for failure in ProbeFailure}


@pytest.mark.parametrize(
    ("outside", "inside", "flora", "is_ours", "fault", "code", "can_reopen"),
    [
        (ARRIVED, HOME_FINE, WELL, True, None, "open", False),
        (ARRIVED, HOME_FINE, FloraState.UNKNOWN, True, None, "open", False),
        (None, HOME_FINE, WELL, True, None, "open", False),
        # The receiver: whatever is seen from outside follows from it.
        (ARRIVED, LOST[ProbeFailure.REFUSED], WELL, True, Fault.RECEIVER, "receiver_silent", False),
        (
            LOST[ProbeFailure.TIMEOUT],
            LOST[ProbeFailure.TIMEOUT],
            FloraState.UNREACHABLE,
            True,
            Fault.RECEIVER,
            "receiver_silent",
            False,
        ),
        (met(503, "unavailable"), met(503, "unavailable"), WELL, True, Fault.RECEIVER, "receiver_unavailable", False),
        (ARRIVED, met(401, "signature_mismatch"), WELL, True, Fault.RECEIVER, "receiver_refuses", False),
        (None, met(404), WELL, True, Fault.RECEIVER, "receiver_refuses", False),
        # FLORA: only once the way is open.
        (ARRIVED, HOME_FINE, FloraState.UNREACHABLE, True, Fault.FLORA, "flora_silent", False),
        (ARRIVED, HOME_FINE, FloraState.KEY_REFUSED, True, Fault.FLORA, "flora_refuses", False),
        (None, HOME_FINE, FloraState.FAILING, True, Fault.FLORA, "flora_fails", False),
        # The tunnel: what opening it again may heal, and what not.
        (LOST[ProbeFailure.TIMEOUT], HOME_FINE, WELL, True, Fault.TUNNEL, "unreachable", True),
        (LOST[ProbeFailure.REFUSED], HOME_FINE, WELL, True, Fault.TUNNEL, "unreachable", True),
        (LOST[ProbeFailure.NAME], HOME_FINE, WELL, True, Fault.TUNNEL, "unreachable", True),
        (LOST[ProbeFailure.CUT], HOME_FINE, WELL, True, Fault.TUNNEL, "unreachable", True),
        (LOST[ProbeFailure.NAME], HOME_FINE, FloraState.UNREACHABLE, True, Fault.TUNNEL, "offline", True),
        (LOST[ProbeFailure.TLS], HOME_FINE, WELL, True, Fault.TUNNEL, "certificate", False),
        (met(502), HOME_FINE, WELL, True, Fault.TUNNEL, "elsewhere", True),
        (met(200), HOME_FINE, WELL, True, Fault.TUNNEL, "elsewhere", True),
        (met(301, location="https://x"), HOME_FINE, WELL, True, Fault.TUNNEL, "redirected", False),
        (met(401, "signature_mismatch"), HOME_FINE, WELL, True, Fault.TUNNEL, "altered", False),
        (met(404, "not_found"), HOME_FINE, WELL, True, Fault.TUNNEL, "refused", False),
        # A URL that somebody else leads here: this machine may not reach its own public address.
        (LOST[ProbeFailure.TIMEOUT], HOME_FINE, WELL, False, None, "unchecked", False),
        (LOST[ProbeFailure.REFUSED], HOME_FINE, WELL, False, None, "unchecked", False),
        (LOST[ProbeFailure.NAME], HOME_FINE, WELL, False, Fault.TUNNEL, "unreachable", False),
        (LOST[ProbeFailure.CUT], HOME_FINE, WELL, False, Fault.TUNNEL, "unreachable", False),
        (LOST[ProbeFailure.TIMEOUT], HOME_FINE, FloraState.UNREACHABLE, False, Fault.TUNNEL, "offline", False),
        (met(401, "signature_mismatch"), HOME_FINE, WELL, False, Fault.TUNNEL, "altered", False),
    ],
)
def test_who_is_at_fault(
    outside: ProbeResult | None,
    inside: ProbeResult,
    flora: FloraState,
    is_ours: bool,
    fault: Fault | None,
    code: str,
    can_reopen: bool,
) -> None:
    """Each row: what was met outside and inside, and how FLORA answers; who, why, and whether opening again may help."""
    found = diagnose(outside, inside, flora, is_ours=is_ours)
    assert (found.fault, found.code, found.can_reopen) == (fault, code, can_reopen)
    assert found.reason
    assert found.is_open is (fault in {None, Fault.FLORA})


def test_the_way_is_told_with_its_time() -> None:
    assert diagnose(ARRIVED, HOME_FINE).seconds == 0.1
    assert diagnose(None, HOME_FINE).seconds is None


@pytest.mark.parametrize(
    ("before", "after", "found"),
    [
        ({}, {}, FloraState.UNKNOWN),
        ({"200": 3, "none": 9}, {"200": 3, "none": 9}, FloraState.UNKNOWN),
        ({"none": 9}, {"200": 1, "none": 9}, FloraState.HEALTHY),
        ({}, {"200": 1, "none": 5, "500": 5}, FloraState.HEALTHY),
        ({}, {"429": 1}, FloraState.HEALTHY),
        ({}, {"404": 2}, FloraState.HEALTHY),
        ({"200": 3}, {"200": 3, "none": 1}, FloraState.UNREACHABLE),
        ({}, {"none": 1, "503": 1}, FloraState.UNREACHABLE),
        ({}, {"503": 1}, FloraState.FAILING),
        ({}, {"401": 1, "200": 2}, FloraState.KEY_REFUSED),
        ({}, {"403": 1}, FloraState.KEY_REFUSED),
    ],
)
def test_how_flora_answers(before: dict[str, float], after: dict[str, float], found: FloraState) -> None:
    """What was counted since the last look; that a run is not found, or the rate is limited, is a good answer."""
    assert compare_request_counts(before, after) is found
