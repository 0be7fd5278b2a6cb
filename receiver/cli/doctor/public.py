"""Takes the way that FLORA takes: to the public URL, by a canary whose bytes are signed, and judges what it met."""

import asyncio
import contextlib
import socket
import ssl
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from urllib.parse import urlsplit

import httpx
from cryptography import x509

from receiver.cli.doctor.findings import Finding
from receiver.cli.doctor.machine import own_origin
from receiver.cli.doctor.probe import Obstacle, Probe, probe
from receiver.config import Settings
from receiver.net.clients import own_client, probe_client, tls_context
from receiver.web.public import CALLBACK_PATH

_SLOW_SECONDS = 5.0
_PATIENCE_SECONDS = 12.0
_SOON = timedelta(days=14)
_NOBODY_BEHIND = frozenset({502, 503, 504})
"""What proxies answer where they find nobody to hand a request to."""
_OBSTACLES = {
    Obstacle.NAME: "public.unresolved",
    Obstacle.REFUSED: "public.unreachable",
    Obstacle.TIMEOUT: "public.slow",
    Obstacle.TLS: "public.certificate",
    Obstacle.CUT: "public.someone_else",
}


async def of_public(
    settings: Settings, *, ca: Path | None = None, slow_seconds: float = _SLOW_SECONDS
) -> list[Finding]:
    """Send a canary through the public URL and one on loopback; look at the certificate besides."""
    secrets = settings.secrets_by_workspace()
    if settings.public_url is None or not secrets:
        return []
    (secret, _), *further = secrets
    async with (
        probe_client(ca=ca, timeout_seconds=_PATIENCE_SECONDS) as client,
        own_client(bound=settings.public.host) as own,
    ):
        outside = await probe(settings.public_url + CALLBACK_PATH, secret, client=client)
        inside = await probe(own_origin(settings) + CALLBACK_PATH, secret, client=own)
        unknown = await _unknown(settings.public_url, further, client) if outside.arrived else []
    ours = await asyncio.to_thread(_is_ours, urlsplit(settings.public_url).hostname or "")
    finding = judged(outside, inside, ours=ours, slow_seconds=slow_seconds)
    if finding is not None and finding.id == "public.certificate":
        return [finding]
    found = unknown if finding is None else [finding, *unknown]
    return found + await _of_certificate(settings.public_url, ca)


async def _unknown(
    public_url: str, further: Sequence[tuple[str, str | None]], client: httpx.AsyncClient
) -> list[Finding]:
    """Say which of the further secrets the receiver there does not know: each signs callbacks, or will."""
    found = []
    for number, (secret, workspace) in enumerate(further, 2):
        met = await probe(public_url + CALLBACK_PATH, secret, client=client)
        if met.answer == "signature_mismatch":
            whose = f"the one of {workspace}" if workspace else f"number {number} of FLORA_WEBHOOK_SECRET"
            found.append(Finding("public.wrong_secret", f"{met.status} for {whose}; it knows the first one"))
    return found


def judged(outside: Probe, inside: Probe, *, ours: bool = True, slow_seconds: float = _SLOW_SECONDS) -> Finding | None:
    """Return what two canaries say about the way between outside and here; None: it is clear. Pure.

    `ours`: the public address is this machine's. Of another one (a router's) it cannot be told from here whether nobody
    answers there, or whether it only does not lead back inside.
    """
    if outside.arrived:
        took = f"a canary took {outside.seconds:.1f} s"
        return None if outside.seconds < slow_seconds else Finding("public.slow", took)
    if inside.obstacle is Obstacle.REFUSED and (
        outside.obstacle is Obstacle.REFUSED or outside.status in _NOBODY_BEHIND
    ):
        return Finding("receiver.silent", f"{inside.url}: {inside.message}")
    if outside.obstacle is Obstacle.REFUSED and inside.arrived and not ours:
        return Finding("public.unchecked", f"{outside.url}: {outside.message}")
    if outside.obstacle is not None:
        return Finding(_OBSTACLES[outside.obstacle], outside.message)
    if outside.location is not None:
        return Finding("public.redirect", f"{outside.status} to {outside.location}")
    told = f"{outside.status} {outside.answer}"
    match outside.answer:
        case "signature_mismatch":
            return Finding("public.altered" if inside.arrived else "public.wrong_secret", told)
        case "not_found" | "method_not_allowed":
            return Finding("public.rewritten", told)
        case "unavailable":
            return Finding("public.unavailable", told)
        case _:
            who = f", from {outside.server}" if outside.server else ""
            return Finding("public.someone_else", f"{outside.status}{who}: {outside.message[:80]}")


def _is_ours(host: str) -> bool:
    """Tell whether one of the host's addresses is this machine's own: only then can it be bound here."""
    try:
        found = socket.getaddrinfo(host, 0, type=socket.SOCK_DGRAM)
    except OSError:
        return False
    for family, kind, protocol, _, place in found:
        with contextlib.suppress(OSError), socket.socket(family, kind, protocol) as tried:
            tried.bind(place)
            return True
    return False


async def _of_certificate(public_url: str, ca: Path | None) -> list[Finding]:
    """Say when the certificate ends soon. What is wrong with it already the canary has told."""
    parts = urlsplit(public_url)
    if parts.scheme != "https":
        return []
    try:
        async with asyncio.timeout(10):
            _, writer = await asyncio.open_connection(parts.hostname, parts.port or 443, ssl=tls_context(ca))
    except (OSError, TimeoutError, ssl.SSLError):
        return []
    raw = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
    writer.transport.abort()
    ends = x509.load_der_x509_certificate(raw).not_valid_after_utc
    soon = ends - datetime.now(UTC) < _SOON
    return [Finding("public.certificate_ends", f"at {ends:%Y-%m-%d %H:%M} UTC")] if soon else []
