"""Checks the proxy for downloads, and finds proxies in the environment that are not used."""

import asyncio
import ssl
from collections.abc import Iterator, Mapping
from http import HTTPStatus

import httpcore
import httpx

from receiver.cli.doctor.findings import Finding
from receiver.config import Settings
from receiver.net.clients import GuardedBackend, tls_context
from receiver.net.tunnel import ProxyRefusedError, route_through

_VARIABLES = ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")
_SECONDS = 10.0


def find_proxy_variables(environ: Mapping[str, str]) -> list[str]:
    """Return the variables by which other programs find a proxy for HTTPS."""
    return [name for name in _VARIABLES if environ.get(name)]


def check_environment(settings: Settings, environ: Mapping[str, str]) -> Iterator[Finding]:
    """Find a proxy of the environment that FLORA's API or downloads do not use."""
    names = find_proxy_variables(environ)
    unset = [f"[{name}] proxy" for name in ("flora", "downloads") if getattr(settings, name).proxy is None]
    if names and unset:
        yield Finding(
            "proxy.not_used", f"{', '.join(names)} in the environment; not set: {', '.join(unset)}"
        )


async def check_downloads_proxy(settings: Settings) -> list[Finding]:
    """Ask the proxy for a connection to FLORA's API.

    It may allow other hosts than that one, so it fails only if it is unreachable or wants a password.
    """
    downloads = settings.downloads
    try:
        tls = tls_context(downloads.ca_file)
    except (OSError, ssl.SSLError):
        message = f"[downloads] ca_file: {downloads.ca_file} holds no certificate in PEM form"
        return [Finding("downloads.proxy_failed", message)] if downloads.proxy else []
    route = route_through(downloads.proxy, tls, resolves_names=downloads.proxy_resolves_names)
    if route is None:
        return []
    url = httpx.URL(settings.flora.base_url)
    try:
        async with asyncio.timeout(_SECONDS):
            stream = await GuardedBackend(route=route).connect_tcp(url.host, url.port or 443, _SECONDS)
            await stream.aclose()
    except ProxyRefusedError as error:
        if error.status != HTTPStatus.PROXY_AUTHENTICATION_REQUIRED:
            return []
        return [Finding("downloads.proxy_failed", str(error))]
    except (httpcore.ProxyError, httpcore.ConnectTimeout, TimeoutError) as error:
        reason = str(error) or f"no answer within {_SECONDS:g} s"
        return [Finding("downloads.proxy_failed", reason)]
    except httpcore.ConnectError:
        return []  # FLORA's name does not resolve here, or is private: that says nothing of the proxy
    return []
