"""Checks the public URL the way FLORA calls it, with canaries, and its certificate."""

import asyncio
import contextlib
import socket
import ssl
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from http import HTTPStatus
from pathlib import Path
from urllib.parse import urlsplit

import httpx
from cryptography import x509

from receiver.cli.doctor.database import own_origin
from receiver.cli.doctor.findings import Finding
from receiver.cli.doctor.probe import ProbeFailure, ProbeResult, probe
from receiver.config import Settings
from receiver.config.callback_url import CALLBACK_PATH
from receiver.net.clients import own_client, probe_client, tls_context

_SLOW_SECONDS = 5.0
_TIMEOUT_SECONDS = 12.0
_MIN_CERTIFICATE_LIFE = timedelta(days=14)
_MAX_MESSAGE = 80
_PROXY_ERRORS = frozenset(
    {HTTPStatus.BAD_GATEWAY, HTTPStatus.SERVICE_UNAVAILABLE, HTTPStatus.GATEWAY_TIMEOUT}
)
"""What a proxy responds when the server behind it does not."""
_KINDS_BY_FAILURE = {
    ProbeFailure.NAME: "public.unresolved",
    ProbeFailure.REFUSED: "public.unreachable",
    ProbeFailure.TIMEOUT: "public.slow",
    ProbeFailure.TLS: "public.certificate",
    ProbeFailure.CUT: "public.someone_else",
}


async def check_public_url(
    settings: Settings, *, ca: Path | None = None, slow_seconds: float = _SLOW_SECONDS
) -> list[Finding]:
    """Send a canary through the public URL and one on this machine; then check the certificate."""
    secrets = settings.secrets_by_workspace()
    if settings.public_url is None or not secrets:
        return []
    (secret, _), *further = secrets
    async with (
        probe_client(ca=ca, timeout_seconds=_TIMEOUT_SECONDS) as client,
        own_client(bound=settings.public.host) as own,
    ):
        outside = await probe(settings.public_url + CALLBACK_PATH, secret, client=client)
        inside = await probe(own_origin(settings) + CALLBACK_PATH, secret, client=own)
        unknown: list[Finding] = []
        if outside.has_arrived:
            unknown = await _check_further_secrets(settings.public_url, further, client)
    host = urlsplit(settings.public_url).hostname or ""
    is_ours = await asyncio.to_thread(_is_own_address, host)
    finding = diagnose_route(outside, inside, is_ours=is_ours, slow_seconds=slow_seconds)
    if finding is not None and finding.id == "public.certificate":
        return [finding]
    findings = unknown if finding is None else [finding, *unknown]
    return findings + await _check_expiry(settings.public_url, ca)


async def _check_further_secrets(
    public_url: str, further: Sequence[tuple[str, str | None]], client: httpx.AsyncClient
) -> list[Finding]:
    """Send a canary with each further secret: the receiver must have all of them."""
    findings = []
    for number, (secret, workspace) in enumerate(further, 2):
        result = await probe(public_url + CALLBACK_PATH, secret, client=client)
        if result.code == "signature_mismatch":
            number_of = f"secret number {number} of FLORA_WEBHOOK_SECRET"
            whose = f"the secret of {workspace}" if workspace else number_of
            what = f"{result.status} for {whose}; the first secret is accepted"
            findings.append(Finding("public.wrong_secret", what))
    return findings


def diagnose_route(
    outside: ProbeResult,
    inside: ProbeResult,
    *,
    is_ours: bool = True,
    slow_seconds: float = _SLOW_SECONDS,
) -> Finding | None:
    """Return what is wrong between the public URL and the receiver, or None. Pure.

    `is_ours` says that the public address belongs to this machine. A router's address may refuse
    connections from inside its own network only, so that a refusal proves nothing.
    """
    if outside.has_arrived:
        what = f"a canary took {outside.seconds:.1f} s"
        return None if outside.seconds < slow_seconds else Finding("public.slow", what)
    is_refused = outside.failure is ProbeFailure.REFUSED
    if inside.failure is ProbeFailure.REFUSED and (is_refused or outside.status in _PROXY_ERRORS):
        return Finding("receiver.silent", f"{inside.url}: {inside.message}")
    if is_refused and inside.has_arrived and not is_ours:
        return Finding("public.unchecked", f"{outside.url}: {outside.message}")
    if outside.failure is not None:
        return Finding(_KINDS_BY_FAILURE[outside.failure], outside.message)
    if outside.location is not None:
        return Finding("public.redirect", f"{outside.status} to {outside.location}")
    what = f"{outside.status} {outside.code}"
    match outside.code:
        case "signature_mismatch":
            return Finding("public.altered" if inside.has_arrived else "public.wrong_secret", what)
        case "not_found" | "method_not_allowed":
            return Finding("public.rewritten", what)
        case "unavailable":
            return Finding("public.unavailable", what)
        case _:
            server = f" from {outside.server}" if outside.server else ""
            what = f"{outside.status}{server}: {outside.message[:_MAX_MESSAGE]}"
            return Finding("public.someone_else", what)


def _is_own_address(host: str) -> bool:
    """Return whether an address of `host` belongs to this machine: only then can it be bound."""
    try:
        addresses = socket.getaddrinfo(host, 0, type=socket.SOCK_DGRAM)
    except OSError:
        return False
    for family, kind, protocol, _, address in addresses:
        with contextlib.suppress(OSError), socket.socket(family, kind, protocol) as bound:
            bound.bind(address)
            return True
    return False


async def _check_expiry(public_url: str, ca: Path | None) -> list[Finding]:
    """Return a finding if the certificate expires soon; canaries find its other faults."""
    parts = urlsplit(public_url)
    if parts.scheme != "https":
        return []
    port = parts.port or 443
    try:
        async with asyncio.timeout(10):
            _, writer = await asyncio.open_connection(parts.hostname, port, ssl=tls_context(ca))
    except (OSError, TimeoutError, ssl.SSLError):
        return []
    raw = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
    writer.transport.abort()
    expires_at = x509.load_der_x509_certificate(raw).not_valid_after_utc
    if expires_at - datetime.now(UTC) >= _MIN_CERTIFICATE_LIFE:
        return []
    return [Finding("public.certificate_ends", f"it expires at {expires_at:%Y-%m-%d %H:%M} UTC")]
