"""Who is said to have called: only a trusted proxy is believed, and only as far as it can know."""

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
def test_who_called(peer: str | None, forwarded: bytes | None, remote: str | None) -> None:
    """What stands left of the last untrusted address is anybody's invention."""
    assert make_remote_finder(TRUSTED)(peer, forwarded) == remote


def test_nobody_is_believed_where_nobody_is_trusted() -> None:
    assert make_remote_finder(())("127.0.0.1", b"198.51.100.9") == "127.0.0.1"
