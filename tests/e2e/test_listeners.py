"""Where the service listens, and whom it takes its callers for: real sockets."""

import pytest

from tests.support.stage import Stage

FORGED = {"Flora-Signature": "t=1,v1=" + "0" * 64}


@pytest.mark.parametrize(
    ("host", "forwarded", "remote"),
    [
        ("127.0.0.1", None, "127.0.0.1"),
        ("127.0.0.1", "203.0.113.7:51234", "203.0.113.7"),
        ("127.0.0.1", "192.0.2.9, [2001:db8::7]:51234", "2001:db8::7"),
        ("[::1]", "203.0.113.7", "203.0.113.7"),
    ],
)
async def test_callers_of_a_listener_on_every_address(
    stage: Stage, host: str, forwarded: str | None, remote: str
) -> None:
    """On `::` an IPv4 proxy is `::ffff:127.0.0.1`: the same proxy, and trusted as much."""
    headers = FORGED if forwarded is None else {**FORGED, "X-Forwarded-For": forwarded}
    async with stage.service(public={"host": "::"}) as service, stage.client() as client:
        url = f"https://{host}:{stage.port}/callbacks/flora"
        assert (await client.post(url, content=b"{}", headers=headers)).status_code == 401
        assert [refused.remote for refused in service.intake.rejections] == [remote]
