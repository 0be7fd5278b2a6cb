"""The diagnosis, as a table of what happened to the two canaries."""

import pytest

from receiver.cli.dev.tunnel.diagnosis import Fault, FloraState, compare_request_counts, diagnose
from receiver.cli.doctor.probe import ProbeFailure, ProbeResult

URL = "https://hooks.example.com/callbacks/flora"
HOME = "http://127.0.0.1:8080/callbacks/flora"


def result(
    status: int | None = 200, code: str | None = None, failure: ProbeFailure | None = None, **more: str
) -> ProbeResult:
    return ProbeResult(URL, 0.1, status=status, code=code, failure=failure, **more)


ARRIVED, WELL = result(code="canary"), FloraState.HEALTHY
HOME_FINE = ProbeResult(HOME, 0.001, status=200, code="canary")
LOST = {failure: result(None, failure=failure, message="why") for failure in ProbeFailure}


@pytest.mark.parametrize(
    ("outside", "inside", "flora", "is_ours", "fault", "code", "can_reopen"),
    [
        (ARRIVED, HOME_FINE, WELL, True, None, "open", False),
        (ARRIVED, HOME_FINE, FloraState.UNKNOWN, True, None, "open", False),
        (None, HOME_FINE, WELL, True, None, "open", False),
        # The receiver: faults outside follow from it.
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
        (
            result(503, "unavailable"),
            result(503, "unavailable"),
            WELL,
            True,
            Fault.RECEIVER,
            "receiver_unavailable",
            False,
        ),
        (ARRIVED, result(401, "signature_mismatch"), WELL, True, Fault.RECEIVER, "receiver_refuses", False),
        (None, result(404), WELL, True, Fault.RECEIVER, "receiver_refuses", False),
        # FLORA: only if the route works.
        (ARRIVED, HOME_FINE, FloraState.UNREACHABLE, True, Fault.FLORA, "flora_silent", False),
        (ARRIVED, HOME_FINE, FloraState.KEY_REFUSED, True, Fault.FLORA, "flora_refuses", False),
        (None, HOME_FINE, FloraState.FAILING, True, Fault.FLORA, "flora_fails", False),
        # The tunnel: with and without a chance that reopening helps.
        (LOST[ProbeFailure.TIMEOUT], HOME_FINE, WELL, True, Fault.TUNNEL, "unreachable", True),
        (LOST[ProbeFailure.REFUSED], HOME_FINE, WELL, True, Fault.TUNNEL, "unreachable", True),
        (LOST[ProbeFailure.NAME], HOME_FINE, WELL, True, Fault.TUNNEL, "unreachable", True),
        (LOST[ProbeFailure.CUT], HOME_FINE, WELL, True, Fault.TUNNEL, "unreachable", True),
        (LOST[ProbeFailure.NAME], HOME_FINE, FloraState.UNREACHABLE, True, Fault.TUNNEL, "offline", True),
        (LOST[ProbeFailure.TLS], HOME_FINE, WELL, True, Fault.TUNNEL, "certificate", False),
        (result(502), HOME_FINE, WELL, True, Fault.TUNNEL, "elsewhere", True),
        (result(200), HOME_FINE, WELL, True, Fault.TUNNEL, "elsewhere", True),
        (result(301, location="https://x"), HOME_FINE, WELL, True, Fault.TUNNEL, "redirected", False),
        (result(401, "signature_mismatch"), HOME_FINE, WELL, True, Fault.TUNNEL, "altered", False),
        (result(404, "not_found"), HOME_FINE, WELL, True, Fault.TUNNEL, "refused", False),
        # A fixed URL: this machine may not reach its own public address.
        (LOST[ProbeFailure.TIMEOUT], HOME_FINE, WELL, False, None, "unchecked", False),
        (LOST[ProbeFailure.REFUSED], HOME_FINE, WELL, False, None, "unchecked", False),
        (LOST[ProbeFailure.NAME], HOME_FINE, WELL, False, Fault.TUNNEL, "unreachable", False),
        (LOST[ProbeFailure.CUT], HOME_FINE, WELL, False, Fault.TUNNEL, "unreachable", False),
        (
            LOST[ProbeFailure.TIMEOUT],
            HOME_FINE,
            FloraState.UNREACHABLE,
            False,
            Fault.TUNNEL,
            "offline",
            False,
        ),
        (result(401, "signature_mismatch"), HOME_FINE, WELL, False, Fault.TUNNEL, "altered", False),
    ],
)
def test_diagnosis(
    outside: ProbeResult | None,
    inside: ProbeResult,
    flora: FloraState,
    is_ours: bool,
    fault: Fault | None,
    code: str,
    can_reopen: bool,
) -> None:
    """Outside, inside and FLORA's state give the fault, its code and whether to reopen."""
    found = diagnose(outside, inside, flora, is_ours=is_ours)
    assert (found.fault, found.code, found.can_reopen) == (fault, code, can_reopen)
    assert found.reason
    assert found.is_open is (fault in {None, Fault.FLORA})


def test_a_diagnosis_has_the_duration_of_the_outside_canary() -> None:
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
def test_compare_request_counts(
    before: dict[str, float], after: dict[str, float], found: FloraState
) -> None:
    """Only new responses count; 404 and 429 show that the API works."""
    assert compare_request_counts(before, after) is found
