"""The caller's address: only what trusted proxies wrote counts."""

import pytest

from receiver.web.forwarded import make_remote_finder

TRUSTED = ("127.0.0.1", "10.0.0.0/8", "::1")


@pytest.mark.parametrize(
    ("peer", "forwarded", "remote"),
    [
        ("192.0.2.1", None, "192.0.2.1"),
        ("192.0.2.1", b"198.51.100.9", "192.0.2.1"),
        ("127.0.0.1", None, "127.0.0.1"),
        ("127.0.0.1", b"198.51.100.9", "198.51.100.9"),
        ("10.1.2.3", b"198.51.100.9, 10.9.9.9", "198.51.100.9"),
        ("10.1.2.3", b"203.0.113.7, 198.51.100.9", "198.51.100.9"),
        ("10.1.2.3", b"203.0.113.7, 198.51.100.9, 10.0.0.1,10.0.0.2", "198.51.100.9"),
        ("::1", b"2001:db8::1", "2001:db8::1"),
        ("127.0.0.1", b"10.0.0.1", "10.0.0.1"),
        ("127.0.0.1", b"10.0.0.2, 10.0.0.1", "10.0.0.2"),
        ("127.0.0.1", b"unknown, 10.0.0.1", "10.0.0.1"),
        ("127.0.0.1", b"", "127.0.0.1"),
        ("127.0.0.1", b"unknown", "127.0.0.1"),
        ("127.0.0.1", b"198.51.100.9, <script>", "127.0.0.1"),
        ("127.0.0.1", b"\xff\xfe", "127.0.0.1"),
        ("testclient", b"198.51.100.9", "testclient"),
        (None, b"198.51.100.9", None),
        # Azure and ALB write ports
        ("127.0.0.1", b"203.0.113.7:51234", "203.0.113.7"),
        ("127.0.0.1", b"[2001:db8::7]:51234", "2001:db8::7"),
        ("127.0.0.1", b"[2001:db8::7]", "2001:db8::7"),
        ("127.0.0.1", b"2001:db8::7", "2001:db8::7"),
        ("127.0.0.1", b"203.0.113.7:51234, 10.0.0.1:443", "203.0.113.7"),
        ("127.0.0.1", b"203.0.113.7:http", "127.0.0.1"),
        # a socket on "::" names IPv4 peers like this
        ("::ffff:127.0.0.1", b"198.51.100.9", "198.51.100.9"),
        ("::ffff:10.1.2.3", b"::ffff:198.51.100.9, ::ffff:10.0.0.1", "198.51.100.9"),
        ("::ffff:192.0.2.1", b"198.51.100.9", "192.0.2.1"),
        ("::ffff:192.0.2.1", None, "192.0.2.1"),
        ("2001:DB8:0::7", None, "2001:db8::7"),
        # a Unix socket leads to this machine alone
        ("unix", b"198.51.100.9", "198.51.100.9"),
        ("unix", None, "unix"),
        ("127.0.0.1", b"198.51.100.9, unix", "127.0.0.1"),
    ],
)
def test_the_callers_address(peer: str | None, forwarded: bytes | None, remote: str | None) -> None:
    """Entries before the last untrusted address may be forged."""
    assert make_remote_finder(TRUSTED)(peer, forwarded) == remote


@pytest.mark.parametrize(
    "trusted", ["::ffff:10.0.0.0/104", "10.0.0.0/8", "10.1.2.3", "::ffff:10.1.2.3", "0.0.0.0/0"]
)
@pytest.mark.parametrize("peer", ["10.1.2.3", "::ffff:10.1.2.3", "::ffff:a01:203"])
def test_a_proxy_is_trusted_however_its_address_is_written(trusted: str, peer: str) -> None:
    find_remote = make_remote_finder([trusted, "2001:db8::/32"])
    assert find_remote(peer, b"2001:db9::1") == "2001:db9::1"


def test_without_trusted_proxies_the_peer_is_the_caller() -> None:
    assert make_remote_finder(())("127.0.0.1", b"198.51.100.9") == "127.0.0.1"
