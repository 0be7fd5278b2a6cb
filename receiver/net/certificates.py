"""Throw-away certificates for `demo`, `dev-cert` and tests: a CA and the servers that it certifies.

Nothing is installed: a client that shall trust the CA is given its file. Imports `ownership` alone
of the receiver.
"""

import os
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from receiver.net.ownership import make_directory, match_owner

__all__ = [
    "LOCAL_HOSTS",
    "Authority",
    "ServerCertificate",
    "issue",
    "load_authority",
    "make_authority",
    "save_authority",
    "write",
]

LOCAL_HOSTS = ("localhost", "127.0.0.1", "::1")
_LIFE = timedelta(days=7)
_SKEW = timedelta(days=1)  # a clock that is behind must not find a certificate "not yet valid"


@dataclass(frozen=True, slots=True)
class Authority:
    """A certificate authority: its certificate, and the key that it signs with."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey = field(repr=False)

    @property
    def pem(self) -> bytes:
        """The certificate as PEM, for clients that shall trust this CA."""
        return self.certificate.public_bytes(serialization.Encoding.PEM)


@dataclass(frozen=True, slots=True)
class ServerCertificate:
    """A server certificate and its private key, both as PEM."""

    certificate: bytes
    key: bytes = field(repr=False)


def make_authority(name: str = "flora-receiver throw-away CA", *, life: timedelta = _LIFE) -> Authority:
    """Make a CA that signs server certificates and nothing else."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = _name(name)
    builder = (
        _builder(subject, subject, key.public_key(), life)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs_certificates=True), critical=True)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(key.public_key()), critical=False)
    )
    return Authority(builder.sign(key, hashes.SHA256()), key)


def issue(authority: Authority, *hosts: str, life: timedelta = _LIFE) -> ServerCertificate:
    """Issue a certificate for host names and IP addresses, by default `LOCAL_HOSTS`."""
    hosts = hosts or LOCAL_HOSTS
    key = ec.generate_private_key(ec.SECP256R1())
    issuer_key = authority.key.public_key()
    builder = (
        _builder(_name(hosts[0]), authority.certificate.subject, key.public_key(), life)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectAlternativeName([_alternative(host) for host in hosts]), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key), critical=False)
    )
    certificate = builder.sign(authority.key, hashes.SHA256())
    return ServerCertificate(certificate.public_bytes(serialization.Encoding.PEM), _private_pem(key))


def write(issued: ServerCertificate, directory: Path, name: str = "server") -> tuple[Path, Path]:
    """Write `<name>.pem` and `<name>.key`, which only its owner can read; return both paths."""
    make_directory(directory)
    certificate, key = directory / f"{name}.pem", directory / f"{name}.key"
    key.unlink(missing_ok=True)  # an older file would keep its wider mode
    with os.fdopen(os.open(key, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(issued.key)
    certificate.write_bytes(issued.certificate)
    for path in (key, certificate):
        match_owner(path, directory)
    return certificate, key


def save_authority(authority: Authority, directory: Path) -> Path:
    """Write `ca.pem` and `ca.key`, which only its owner can read; return the certificate's path."""
    return write(ServerCertificate(authority.pem, _private_pem(authority.key)), directory, "ca")[0]


def load_authority(directory: Path) -> Authority | None:
    """Return the CA that was saved there, or None.

    Raises ValueError where it is invalid or has expired.
    """
    files = (directory / "ca.pem", directory / "ca.key")
    missing = [path.name for path in files if not path.exists()]
    if len(missing) == len(files):
        return None
    if missing:  # not made anew: a client may trust the remaining certificate
        raise ValueError(f"{missing[0]} is missing")
    try:
        certificate = x509.load_pem_x509_certificate(files[0].read_bytes())
        key = serialization.load_pem_private_key(files[1].read_bytes(), None)
    except TypeError:
        raise ValueError("ca.key has a password") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey) or certificate.public_key() != key.public_key():
        raise ValueError("ca.pem and ca.key do not belong together")
    if certificate.not_valid_after_utc < datetime.now(UTC) + _SKEW:
        raise ValueError("the CA has expired")
    return Authority(certificate, key)


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, life: timedelta
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _SKEW)
        .not_valid_after(now + life)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text[:64])])


def _alternative(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _private_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
