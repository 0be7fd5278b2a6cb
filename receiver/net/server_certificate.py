"""What is wrong with the certificate and the key that a listener is configured to use.

Called by the service when it starts, by `check` and by `doctor`. Imports no other module of the
receiver but `addresses` and `errors`.
"""

import ssl
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

from cryptography import x509

from receiver.errors import Problem
from receiver.net.addresses import parse_address

__all__ = ["check_pair", "check_roots", "find_date_problems", "find_other_host"]

_CERT, _KEY = "tls.cert", "tls.key"


def check_pair(cert: Path, key: Path) -> Problem | None:
    """Return why no TLS connection can be made with a certificate and its key, or None."""
    try:
        _read_certificate(cert)
    except OSError as error:
        return Problem(_CERT, f"cannot be read: {error.strerror}")
    except ValueError:
        return Problem(_CERT, "holds no certificate in PEM form")
    try:
        # Without an answer to its question, OpenSSL would ask for the password on the terminal.
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(cert, key, password=_refuse_password)
    except _PasswordError:
        return Problem(_KEY, "has a password; store it without one, readable by the service alone")
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            return Problem(_KEY, f"does not fit the certificate in {_CERT}")
        return Problem(_KEY, "holds no private key in PEM form")
    except OSError as error:
        return Problem(_KEY, f"cannot be read: {error.strerror}")
    return None


def check_roots(path: Path, setting: str) -> Problem | None:
    """Return why the file of a `ca_file` setting cannot be used, or None."""
    try:
        ssl.create_default_context(cafile=path)
    except ssl.SSLError:
        return Problem(setting, "holds no certificate in PEM form")
    except OSError as error:
        return Problem(setting, f"cannot be read: {error.strerror}")
    return None


def find_date_problems(cert: Path, now: datetime) -> Iterator[Problem]:
    """Yield why FLORA would not trust a certificate now; its authority is left to `doctor`."""
    certificate = _read_certificate(cert)
    begins_at, ends_at = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    if now > ends_at:
        yield Problem(_CERT, f"has expired at {_to_text(ends_at)}; FLORA refuses it")
    if now < begins_at:
        message = f"is not valid before {_to_text(begins_at)}; FLORA refuses it, unless this clock is wrong"
        yield Problem(_CERT, message)


def find_other_host(cert: Path, host: str) -> Problem | None:
    """Return that a certificate is not for the host of `public_url`; a proxy may have its own."""
    names = _read_names(_read_certificate(cert))
    if not any(_matches(name, host) for name in names):
        listed = ", ".join(names) or "no host"
        message = (
            f"is for {listed}, and not for {host} of public_url; FLORA refuses it unless a proxy ends TLS"
        )
        return Problem(_CERT, message)
    return None


class _PasswordError(Exception):
    """OpenSSL has asked for a password."""


def _refuse_password() -> str:
    raise _PasswordError


def _read_certificate(path: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificates(path.read_bytes())[0]


def _read_names(certificate: x509.Certificate) -> list[str]:
    try:
        found = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return []
    addresses = (str(each) for each in found.get_values_for_type(x509.IPAddress))
    return [*found.get_values_for_type(x509.DNSName), *addresses]


def _matches(name: str, host: str) -> bool:
    """Return whether a certificate for `name` is one for `host`; `*` stands for one label."""
    address, host = parse_address(host), _to_ascii(host)
    if address is not None:
        return parse_address(name) == address
    name = name.lower().rstrip(".")
    return name == host or (name.startswith("*.") and name[2:] == host.partition(".")[2] != "")


def _to_ascii(host: str) -> str:
    try:
        return host.rstrip(".").encode("idna").decode().lower()
    except UnicodeError:
        return host.lower()


def _to_text(at: datetime) -> str:
    return f"{at:%Y-%m-%d %H:%M} UTC"
