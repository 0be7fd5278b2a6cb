"""`flora-receiver trigger`: sends callbacks, signed or spoiled on purpose, to any receiver, and judges the answers."""

import asyncio
import os
import ssl
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx
import typer

from receiver.cli.output import WRONG, explained, fail, show
from receiver.cli.trigger_cases import CASES, Shot, Subject, again, kept
from receiver.config import load
from receiver.errors import ConfigError, Problem
from receiver.http import probe_client

_SHOWN = 2000
_AT_ONCE = 64
_GOOD = frozenset({"accepted", "duplicate", "ignored"})


@dataclass(frozen=True, slots=True)
class Hit:
    """What one request was answered with; `word` is the code of a refusal, else the receiver's word."""

    shot: Shot
    status: int
    text: str
    word: str | None
    seconds: float

    @property
    def as_expected(self) -> bool:
        wanted = self.shot.expected
        if wanted not in _GOOD:
            return self.word == wanted
        # A receiver that is not ours has other words for it; a delivery may have been sent before.
        return self.status == 200 and self.word in {None, wanted, *(("duplicate",) if wanted == "accepted" else ())}  # noqa: PLR2004


def run(
    url: str,
    case: str,
    *,
    run_id: str | None,
    delivery_id: str | None,
    secret: str | None,
    ca: Path | None,
    json: bool,
    count: int = 1,
    rate: float | None = None,
    record: Path | None = None,
    source: Path | None = None,
) -> None:
    with explained(as_json=json):
        if case not in CASES:
            raise ConfigError([Problem("--case", f"there is no case {case!r}; there are: {', '.join(CASES)}")])
        if not _is_web_url(url):
            raise ConfigError([Problem("URL", f"{url!r} is not an http or https URL")])
        if ca is not None:
            _check_ca(ca)
        if source is not None:
            shots = _recorded(source)
        else:
            subject = Subject(secret or _configured_secret(), run_id, delivery_id)
            shots = [shot for _ in range(count) for shot in CASES[case](subject)]
        if record is not None:
            record.write_text("".join(f"{kept(shot)}\n" for shot in shots), "utf-8")
        try:
            hits = asyncio.run(_fire(url, shots, ca, rate, at_once=1 if count == 1 else _AT_ONCE))
        except httpx.HTTPError as error:
            fail({"error": type(error).__name__, "url": url}, f"No answer from {url}: {_why(error)}", as_json=json)
            raise typer.Exit(WRONG) from error
        name = case if source is None else str(source)
        _show(name, hits, json=json)
        if not all(hit.as_expected for hit in hits):
            raise typer.Exit(WRONG)


async def _fire(url: str, shots: Sequence[Shot], ca: Path | None, rate: float | None, *, at_once: int) -> list[Hit]:
    """Send all, in order; with a rate by the clock, whether or not there are answers, else as many at a time as fit."""
    gate = asyncio.Semaphore(at_once if rate is None else max(at_once, round(rate * 20)))
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=at_once)
    async with probe_client(ca=ca, limits=limits) as client:
        began = time.perf_counter()

        async def one(shot: Shot, number: int) -> Hit:
            if rate is not None:
                await asyncio.sleep(max(0.0, began + number / rate - time.perf_counter()))
            async with gate:
                return await _send(client, url, shot)

        if at_once == 1 and rate is None:
            return [await one(shot, number) for number, shot in enumerate(shots)]
        return await asyncio.gather(*(one(shot, number) for number, shot in enumerate(shots)))


async def _send(client: httpx.AsyncClient, url: str, shot: Shot) -> Hit:
    target = httpx.URL(url)
    target = target.copy_with(path=target.path + shot.further) if shot.further else target
    headers = {"Content-Type": "application/json", **shot.headers}
    began = time.perf_counter()
    answer = await client.request(shot.method, target, content=shot.body, headers=headers)
    return Hit(shot, answer.status_code, answer.text, _word(answer), time.perf_counter() - began)


def _show(name: str, hits: Sequence[Hit], *, json: bool) -> None:
    wrong = [hit for hit in hits if not hit.as_expected]
    if len(hits) <= 2:  # noqa: PLR2004 -- a case by itself
        (*_, last) = hits
        lines = [f"{hit.status} {hit.text[:_SHOWN]}" for hit in hits]
        verdict = "as it should be" if not wrong else f"expected {_wish(wrong[0].shot)}"
        data = {"case": name, "status": last.status, "body": last.text[:_SHOWN], "as_expected": not wrong}
        show(data, "\n".join([*lines, f"{name}: {verdict}"]), as_json=json)
        return
    counts = Counter(f"{hit.status} {hit.word or 'no word of a receiver'}" for hit in hits)
    times = sorted(hit.seconds for hit in hits)
    at = {f"p{part}": times[min(len(times) - 1, len(times) * part // 100)] for part in (50, 95, 99)}
    lines = [f"{number:>6}  {told}" for told, number in counts.most_common()]
    lines.append("  ".join(f"{part} {seconds * 1000:.1f} ms" for part, seconds in at.items()))
    lines.append(f"{name}: {'as it should be' if not wrong else f'{len(wrong)} are not as they should be'}")
    data = {"case": name, "sent": len(hits), "answers": dict(counts), "seconds": at, "as_expected": not wrong}
    show(data, "\n".join(lines), as_json=json)


def _wish(shot: Shot) -> str:
    return f"200 {shot.expected}" if shot.expected in _GOOD else shot.expected


def _recorded(source: Path) -> list[Shot]:
    try:
        lines = source.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError([Problem("--from", f"{source} cannot be read")]) from error
    shots = []
    for number, line in enumerate(lines, 1):
        try:
            shots.append(again(line))
        except ValueError as error:
            raise ConfigError([Problem("--from", f"line {number} of {source} {error}")]) from error
    if not shots:
        raise ConfigError([Problem("--from", f"{source} is empty")])
    return shots


def _is_web_url(text: str) -> bool:
    try:
        url = httpx.URL(text)
    except httpx.InvalidURL:
        return False
    return url.scheme in {"http", "https"} and bool(url.host)


def _check_ca(ca: Path) -> None:
    try:
        ssl.create_default_context(cafile=ca)
    except (OSError, ssl.SSLError) as error:
        raise ConfigError([Problem("--ca", f"{ca} holds no certificate in PEM form")]) from error


def _why(error: httpx.HTTPError) -> str:
    """Say what went wrong on the way, and what to do about it."""
    if isinstance(error, httpx.TimeoutException):
        return "it took too long"
    if "CERTIFICATE_VERIFY_FAILED" in str(error):
        return "its certificate is not trusted here; give its CA with --ca"
    if isinstance(error, httpx.ConnectError):
        return f"{error}. Is it running, and is this its address (https or http)?"
    return str(error) or type(error).__name__


def _configured_secret() -> str:
    configured = load(None, os.environ, need_secrets=False).secrets_by_workspace()
    if not configured:
        raise ConfigError([Problem("FLORA_WEBHOOK_SECRET", "is not set: give the secret there, or by --secret")])
    return configured[0][0]


def _word(response: httpx.Response) -> str | None:
    try:
        document = response.json()
        word = document["error"]["code"] if "error" in document else document["status"]
    except (ValueError, KeyError, TypeError):
        return None
    return word if isinstance(word, str) else None
