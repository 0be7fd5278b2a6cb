"""Hosts as they appear in URLs and settings."""

import pytest

from receiver.net.addresses import http_origin, is_unspecified, local_host


@pytest.mark.parametrize(
    ("bound", "host"),
    [
        ("0.0.0.0", "127.0.0.1"),
        ("::", "::1"),
        ("127.0.0.1", "127.0.0.1"),
        ("192.0.2.1", "192.0.2.1"),
        ("receiver.internal", "receiver.internal"),
    ],
)
def test_a_listener_is_reached_from_its_own_machine(bound: str, host: str) -> None:
    """A listener on every address is reached through loopback, any other one where it is bound."""
    assert local_host(bound) == host
    assert is_unspecified(bound) is (bound != host)


def test_an_ipv6_address_has_brackets_in_a_url() -> None:
    assert http_origin("::1", 8080, tls=True) == "https://[::1]:8080"
    assert http_origin("127.0.0.1", 80, tls=False) == "http://127.0.0.1:80"
