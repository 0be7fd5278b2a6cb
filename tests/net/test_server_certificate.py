"""What is found out about a certificate and its key before FLORA finds it out."""

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from receiver.net import certificates
from receiver.net.server_certificate import check_pair, check_roots, find_date_problems, find_other_host

NOW = datetime.now(UTC)


def write(directory: Path, *hosts: str, name: str = "server") -> tuple[Path, Path]:
    issued = certificates.issue(certificates.make_authority(), *hosts, life=timedelta(days=30))
    return certificates.write(issued, directory, name)


def with_password(key: Path) -> None:
    made = ec.generate_private_key(ec.SECP256R1())
    form = serialization.PrivateFormat.PKCS8
    key.write_bytes(
        made.private_bytes(
            serialization.Encoding.PEM, form, serialization.BestAvailableEncryption(b"hunter2")
        )
    )


def test_a_pair_that_fits_is_usable(tmp_path: Path) -> None:
    cert, key = write(tmp_path, "hooks.example.com")
    assert check_pair(cert, key) is None
    assert list(find_date_problems(cert, NOW)) == []


@pytest.mark.parametrize(
    ("spoil", "path", "words"),
    [
        (lambda cert, _: cert.write_text("no"), "tls.cert", "holds no certificate"),
        (lambda cert, _: cert.write_bytes(b""), "tls.cert", "holds no certificate"),
        (lambda cert, _: cert.unlink(), "tls.cert", "cannot be read"),
        (lambda _, key: key.write_text("no"), "tls.key", "holds no private key"),
        (lambda cert, key: key.write_bytes(cert.read_bytes()), "tls.key", "holds no private key"),
        (lambda _, key: key.unlink(), "tls.key", "cannot be read"),
        (lambda _, key: with_password(key), "tls.key", "has a password"),
        (
            lambda _, key: key.write_bytes(write(key.parent, "x", name="other")[1].read_bytes()),
            "tls.key",
            "not fit",
        ),
    ],
)
def test_files_that_cannot_be_used(
    spoil: Callable[[Path, Path], object], path: str, words: str, tmp_path: Path
) -> None:
    cert, key = write(tmp_path, "hooks.example.com")
    spoil(cert, key)
    problem = check_pair(cert, key)
    assert problem is not None
    assert (problem.path, words in problem.message) == (path, True)


def test_dates_are_judged_by_the_clock(tmp_path: Path) -> None:
    cert, _ = write(tmp_path, "hooks.example.com")
    for at, words in (
        (NOW + timedelta(days=31), "has expired at"),
        (NOW - timedelta(days=9), "is not valid before"),
    ):
        [problem] = find_date_problems(cert, at)
        assert (problem.path, words in problem.message) == ("tls.cert", True)


@pytest.mark.parametrize(
    ("names", "host", "fits"),
    [
        (("hooks.example.com",), "hooks.example.com", True),
        (("hooks.example.com",), "HOOKS.example.com.", True),
        (("a.example.com", "hooks.example.com"), "hooks.example.com", True),
        (("*.example.com",), "hooks.example.com", True),
        (("*.example.com",), "a.hooks.example.com", False),
        (("*.example.com",), "example.com", False),
        (("example.com",), "hooks.example.com", False),
        (("8.8.8.8",), "8.8.8.8", True),
        (("8.8.8.8",), "8.8.4.4", False),
        (("2001:db8::1",), "2001:db8:0::1", True),
        (("xn--bcher-kva.example",), "bücher.example", True),
    ],
)
def test_the_host_is_one_of_its_names(
    names: tuple[str, ...], host: str, fits: bool, tmp_path: Path
) -> None:
    cert, _ = write(tmp_path, *names)
    problem = find_other_host(cert, host)
    assert (problem is None) == fits
    if problem is not None:
        assert host in problem.message
        assert names[0] in problem.message


def test_a_file_of_roots_has_a_certificate(tmp_path: Path) -> None:
    cert, key = write(tmp_path, "x")
    assert check_roots(cert, "flora.ca_file") is None
    for path, words in ((key, "holds no certificate"), (tmp_path / "gone", "cannot be read")):
        problem = check_roots(path, "flora.ca_file")
        assert problem is not None
        assert words in problem.message
