"""Which URLs an output may have, and how they are concealed in texts. Pure.

For `receiver.net.download` and `receiver.plugins.attempt`.
"""

import re
from collections.abc import Iterable, Mapping

import httpx

from receiver.errors import DownloadFailedError, DownloadRefusedError


def parse_media_url(text: str) -> httpx.URL:
    """Parse an output's URL. Raises DownloadRefusedError: it will be no other later."""
    try:
        return _check(httpx.URL(text))
    except (httpx.InvalidURL, UnicodeError, TypeError):
        raise DownloadRefusedError("the output's URL cannot be read") from None
    except ValueError as error:
        raise DownloadRefusedError(str(error)) from None


def redirect_target(response: httpx.Response) -> httpx.URL:
    """Return the URL that a response redirects to. Raises DownloadFailedError: it may be another later."""
    location = response.headers.get("location")
    try:
        target = response.url.join(location) if location else None
    except (httpx.InvalidURL, UnicodeError):
        target = None
    if target is None:
        raise DownloadFailedError(f"{response.url.host} redirects to something that is not a URL")
    try:
        return _check(target)
    except ValueError as error:
        raise DownloadFailedError(
            f"{response.url.host} redirects to what is not fetched: {error}"
        ) from None


def _check(url: httpx.URL) -> httpx.URL:
    """Return a URL without its fragment: https or http, a host, a valid port, no credentials.

    Raises ValueError.
    """
    if url.scheme not in {"http", "https"} or not url.host:
        raise ValueError(f"{url.host or 'the output'}: outputs are fetched over https only")
    if not 0 <= (url.port or 0) < 65536:
        raise ValueError(f"{url.host}: there is no such port")
    if url.userinfo:
        raise ValueError(f"{url.host}: the output's URL carries credentials")
    return url.copy_with(fragment=None)


_ORIGIN = re.compile(r"[^:/?#]+://[^/?#]*")
_MIN_PATH = 6
"""Shorter paths are not concealed: they occur as ordinary words."""


def conceal_urls(text: str, urls: Iterable[str]) -> str:
    """Return a text in which these media URLs show no more than their host.

    A path is concealed also where it stands alone, as libraries quote it.
    """
    replacements = {spelling: short for url in urls for spelling, short in _spellings(url).items()}
    for spelling in sorted(replacements, key=len, reverse=True):
        text = text.replace(spelling, replacements[spelling])
    return text


def _spellings(text: str) -> Mapping[str, str]:
    """Return each spelling of a URL with its replacement.

    The spellings are the whole URL, and its path with and without its query.
    """
    origin = _ORIGIN.match(text)
    written = text[origin.end() :] if origin else text  # as FLORA wrote it; below, as it is sent
    paths = {written}
    try:
        url = httpx.URL(text)
        paths |= {url.raw_path.decode("ascii"), url.path}
    except (httpx.InvalidURL, UnicodeError):
        pass
    paths |= {path.partition("?")[0] for path in paths}
    whole = {text: f"{origin[0] if origin else ''}/…"} if len(written) > 1 else {}
    return whole | {path: "/…" for path in paths if len(path) >= _MIN_PATH}
