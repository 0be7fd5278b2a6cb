"""Which URLs may be an output's at all: https or http, a host, a port, no credentials. For `receiver.download`."""

import httpx

from receiver.errors import DownloadRefusedError


def parsed(text: str) -> httpx.URL:
    """Read an output's URL, or raise DownloadRefusedError."""
    try:
        url = httpx.URL(text)
    except (httpx.InvalidURL, UnicodeError, TypeError):
        raise DownloadRefusedError("the output's URL cannot be read") from None
    return _clean(url)


def redirected(response: httpx.Response) -> httpx.URL:
    """Return where an answer leads to, or raise DownloadRefusedError."""
    location = response.headers.get("location")
    try:
        target = response.url.join(location) if location else None
    except (httpx.InvalidURL, UnicodeError):
        target = None
    if target is None:
        raise DownloadRefusedError(f"{response.url.host} redirects to something that is not a URL")
    return _clean(target)


def _clean(url: httpx.URL) -> httpx.URL:
    if url.scheme not in {"http", "https"} or not url.host:
        raise DownloadRefusedError(f"{url.host or 'the output'}: outputs are fetched over https only")
    if not 0 <= (url.port or 0) < 65536:  # noqa: PLR2004
        raise DownloadRefusedError(f"{url.host}: there is no such port")
    if url.userinfo:
        raise DownloadRefusedError(f"{url.host}: the output's URL carries credentials")
    return url.copy_with(fragment=None)
