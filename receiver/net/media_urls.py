"""Which URLs may be an output's at all: https or http, a host, a port, no credentials; and how they are kept unseen. Pure.

For `receiver.download` and `receiver.attempt`.
"""

import re
from collections.abc import Iterable, Mapping

import httpx

from receiver.errors import DownloadRefusedError


def parse_media_url(text: str) -> httpx.URL:
    """Read an output's URL, or raise DownloadRefusedError."""
    try:
        url = httpx.URL(text)
    except (httpx.InvalidURL, UnicodeError, TypeError):
        raise DownloadRefusedError("the output's URL cannot be read") from None
    return _clean(url)


def redirect_target(response: httpx.Response) -> httpx.URL:
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
    if not 0 <= (url.port or 0) < 65536:
        raise DownloadRefusedError(f"{url.host}: there is no such port")
    if url.userinfo:
        raise DownloadRefusedError(f"{url.host}: the output's URL carries credentials")
    return url.copy_with(fragment=None)


_ORIGIN = re.compile(r"[^:/?#]+://[^/?#]*")
_SHORTEST_PATH = 6
"""Shorter paths are words like any other."""


def conceal_urls(text: str, urls: Iterable[str]) -> str:
    """Return a text in which media URLs show no more than their host, also where a library quotes the path alone."""
    shown = {quoted: instead for url in urls for quoted, instead in _spellings(url).items()}
    for quoted in sorted(shown, key=len, reverse=True):
        text = text.replace(quoted, shown[quoted])
    return text


def _spellings(text: str) -> Mapping[str, str]:
    """Return what gives a URL away, and what is shown instead: the whole of it, and its path with and without query."""
    origin = _ORIGIN.match(text)
    written = text[origin.end() :] if origin else text  # as FLORA spelled it; below, as it travels
    paths = {written}
    try:
        url = httpx.URL(text)
        paths |= {url.raw_path.decode("ascii"), url.path}
    except (httpx.InvalidURL, UnicodeError):
        pass
    paths |= {path.partition("?")[0] for path in paths}
    whole = {text: f"{origin[0] if origin else ''}/…"} if len(written) > 1 else {}
    return whole | {path: "/…" for path in paths if len(path) >= _SHORTEST_PATH}
