"""Hosts as they appear in URLs and settings."""

import ast
from pathlib import Path

import pytest

from receiver.net.addresses import (
    http_origin,
    is_loopback,
    is_unspecified,
    local_host,
    local_origin,
    parse_address,
    parse_host_and_port,
    parse_network,
    parse_peer,
    to_unix_path,
)


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


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("192.0.2.1", "192.0.2.1"),
        ("::ffff:192.0.2.1", "192.0.2.1"),
        ("[::FFFF:192.0.2.1]", "192.0.2.1"),
        ("[2001:DB8::0:7]", "2001:db8::7"),
        ("[192.0.2.1", None),
        ("192.0.2.1:80", None),
        ("receiver", None),
        ("", None),
    ],
)
def test_an_address_has_one_form(text: str, address: str | None) -> None:
    """Whether it is written in brackets, in capitals or as IPv6."""
    found = parse_address(text)
    assert (found and str(found)) == address


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("192.0.2.1", "192.0.2.1"),
        ("192.0.2.1:51234", "192.0.2.1"),
        ("[2001:db8::7]:51234", "2001:db8::7"),
        ("[2001:db8::7]", "2001:db8::7"),
        ("2001:db8::7", "2001:db8::7"),
        ("2001:db8::51234", None),
        ("::ffff:192.0.2.1", "192.0.2.1"),
        ("[::ffff:192.0.2.1]:80", "192.0.2.1"),
        ("192.0.2.1:", None),
        ("192.0.2.1:x", None),
        ("[2001:db8::7]x", None),
        (":80", None),
        ("unknown", None),
        ("_hidden:80", None),
    ],
)
def test_a_caller_may_have_a_port(text: str, address: str | None) -> None:
    """Azure and AWS write it, nginx and Caddy do not. The digits of an IPv6 address are none."""
    found = parse_peer(text)
    assert (found and str(found)) == address


def test_a_network_of_ipv4_addresses_is_ipv4() -> None:
    assert str(parse_network("::ffff:10.0.0.0/104")) == "10.0.0.0/8"
    assert str(parse_network("::ffff:10.0.0.1")) == "10.0.0.1/32"
    assert str(parse_network("[::1]")) == "::1/128"
    assert str(parse_network("10.1.2.3/8")) == "10.0.0.0/8"
    assert str(parse_network("::/0")) == "::/0"
    for wrong in ("unix", "10.0.0.0/33", "", "10.0.0.1:80"):
        with pytest.raises(ValueError):
            parse_network(wrong)


def test_a_unix_socket_is_this_machine() -> None:
    assert (
        to_unix_path("unix:/run/public.sock")
        == to_unix_path("unix:///run/public.sock")
        == "/run/public.sock"
    )
    assert to_unix_path("127.0.0.1") is None
    assert is_loopback("unix:/run/public.sock")
    assert not is_unspecified("unix:/run/public.sock")
    assert local_origin("unix:/run/public.sock", 443, tls=True) == "http://localhost"
    assert local_origin("::", 443, tls=True) == "https://[::1]:443"


_OWN_READERS = {
    "receiver/net/addresses.py",
    "receiver/net/clients.py",  # which addresses are public: mapped ones are refused as they are written
    "receiver/net/certificates.py",  # an address in a certificate is what the caller wrote
    "receiver/emulator/addresses.py",  # FLORA's rule, written independently of ours
}


def test_one_module_reads_addresses() -> None:
    """Another reader would compare texts again, and miss that `::ffff:127.0.0.1` is `127.0.0.1`."""
    root = Path(__file__).parents[2]
    readers = set()
    for path in (root / "receiver").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if "ipaddress" in modules or (isinstance(node, ast.ImportFrom) and node.module == "ipaddress"):
                readers.add(str(path.relative_to(root)))
    assert readers == _OWN_READERS


@pytest.mark.parametrize(
    "text", ["", "host", "host:", ":80", "host:0", "host:65536", "host:x", "http://h:80", "a@b:1", "::1:80"]
)
def test_exceptions_must_be_exact_host_and_port(text: str) -> None:
    """A wildcard by mistake would open the network."""
    with pytest.raises(ValueError, match="is not host:port"):
        parse_host_and_port(text)


def test_exceptions_are_read_as_urls_write_them() -> None:
    """Names are compared in lower case, IPv6 comes in brackets."""
    assert parse_host_and_port("LocalHost:9100") == ("localhost", 9100)
    assert parse_host_and_port("[::1]:9100") == ("::1", 9100)
