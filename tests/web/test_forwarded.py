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
        ("127.0.0.1", b"10.0.0.1", "127.0.0.1"),
        ("127.0.0.1", b"", "127.0.0.1"),
        ("127.0.0.1", b"unknown", "127.0.0.1"),
        ("127.0.0.1", b"198.51.100.9, <script>", "127.0.0.1"),
        ("127.0.0.1", b"\xff\xfe", "127.0.0.1"),
        ("testclient", b"198.51.100.9", "testclient"),
        (None, b"198.51.100.9", None),
    ],
)
def test_the_callers_address(peer: str | None, forwarded: bytes | None, remote: str | None) -> None:
    """Entries before the last untrusted address may be forged."""
    assert make_remote_finder(TRUSTED)(peer, forwarded) == remote


def test_without_trusted_proxies_the_peer_is_the_caller() -> None:
    assert make_remote_finder(())("127.0.0.1", b"198.51.100.9") == "127.0.0.1"
