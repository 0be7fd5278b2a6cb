"""The certificate of a listener as its files hold it now, and a context that serves it.

Called by the service, which looks again while it runs. `net.server_certificate` knows what is wrong
with one.
"""

import hashlib
import ssl
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

from cryptography import x509

from receiver.errors import ConfigError, Problem
from receiver.net.server_certificate import check_pair


@dataclass(frozen=True, slots=True)
class Certificate:
    """What identifies a certificate and its key, and when it is valid if that can be read."""

    fingerprint: bytes
    not_before: datetime | None = None
    not_after: datetime | None = None

    def is_valid_at(self, now: datetime) -> bool:
        if self.not_before is None or self.not_after is None:
            return True
        return self.not_before <= now <= self.not_after

    def time_left(self, now: datetime) -> timedelta | None:
        """Return the time until it expires, negative once it has; None if that cannot be read."""
        return None if self.not_after is None else self.not_after - now


def read_certificate(cert: Path, key: Path) -> Certificate:
    """Return what the two files hold now, usable or not. Raises ConfigError if they cannot be read."""
    chain, private = _read("tls.cert", cert), _read("tls.key", key)
    fingerprint = hashlib.sha256(hashlib.sha256(chain).digest() + hashlib.sha256(private).digest()).digest()
    try:
        leaf = x509.load_pem_x509_certificate(chain)
        return Certificate(fingerprint, leaf.not_valid_before_utc, leaf.not_valid_after_utc)
    except ValueError:
        return Certificate(fingerprint)


def load_context(cert: Path, key: Path, *, ciphers: str) -> ssl.SSLContext:
    """Return a context for new connections. Raises ConfigError if the pair cannot be used.

    A context that is in use is never loaded again: OpenSSL drops its old key before it finds the
    new one to be wrong, and keeps the old certificate beside a new one of another type.
    """
    if (problem := check_pair(cert, key)) is not None:
        raise ConfigError([problem])
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.set_ciphers(ciphers)
    try:
        context.load_cert_chain(cert, key, password="")
    except OSError:
        raise ConfigError([Problem("tls.cert", "or tls.key is being replaced")]) from None
    return context


def _read(setting: str, path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError([Problem(setting, f"cannot be read: {error.strerror}")]) from None
