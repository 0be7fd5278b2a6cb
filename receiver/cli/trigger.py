"""`flora-receiver trigger`: sends callbacks, signed or spoiled on purpose, to any receiver, and judges the answers."""

import asyncio
import os
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import typer

from receiver.cli.output import WRONG, explained, fail, show
from receiver.cli.trigger_cases import CASES, Shot, Subject, again, kept
from receiver.cli.trust import check_ca
from receiver.config import load
from receiver.errors import ConfigError, Problem
from receiver.http import probe_client

_SHOWN = 2000
_AT_ONCE = 64
_PATIENCE_SECONDS = 20.0
_GOOD = frozenset({"accepted", "duplicate", "ignored"})


@dataclass(frozen=True, slots=True)
class Hit:
    """What one request was answered with; `word` is the code of a refusal, else the receiver's word.

    Where `status` is None there was no answer, and `text` says why.
    """

    shot: Shot
    status: int | None
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
        check_ca(ca)
        if source is not None:
            shots = _recorded(source)
            chains = ([tuple(shots)] if rate is None else [(shot,) for shot in shots]) * count
        else:
            subject = Subject(secret or _configured_secret(), run_id, delivery_id)
            chains = [tuple(CASES[case](subject)) for _ in range(count)]
        if record is not None:
            _keep(record, chains)
        hits = asyncio.run(_fire(url, chains, ca, rate, at_once=1 if count == 1 else _AT_ONCE))
        if all(hit.status is None for hit in hits):
            why = hits[0].text
            fail({"error": "no_answer", "url": url, "message": why}, f"No answer from {url}: {why}", as_json=json)
            raise typer.Exit(WRONG)
        name = case if source is None else str(source)
        _show(name, hits, json=json)
        if not all(hit.as_expected for hit in hits):
            raise typer.Exit(WRONG)


async def _fire(
    url: str, chains: Sequence[Sequence[Shot]], ca: Path | None, rate: float | None, *, at_once: int
) -> list[Hit]:
    """Send all, in order; with a rate by the clock, whether or not there are answers, else as many at a time as fit.

    What belongs together is one chain: each of its requests waits for the answer to the one before it, or is not sent.
    """
    gate = asyncio.Semaphore(at_once if rate is None else max(at_once, round(rate * _PATIENCE_SECONDS)))
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=at_once)
    async with probe_client(ca=ca, limits=limits, timeout_seconds=_PATIENCE_SECONDS) as client:
        began = time.perf_counter()

        async def chain(shots: Sequence[Shot], number: int) -> list[Hit]:
            if rate is not None:
                await asyncio.sleep(max(0.0, began + number * len(shots) / rate - time.perf_counter()))
            hits: list[Hit] = []
            async with gate:
                for shot in shots:
                    hits.append(await _send(client, url, shot))
                    if hits[-1].status is None:
                        break
            return hits

        done = await asyncio.gather(*(chain(shots, number) for number, shots in enumerate(chains)))
        return [hit for hits in done for hit in hits]


async def _send(client: httpx.AsyncClient, url: str, shot: Shot) -> Hit:
    target = httpx.URL(url)
    target = target.copy_with(path=target.path + shot.further) if shot.further else target
    headers = {"Content-Type": "application/json", **shot.headers}
    began = time.perf_counter()
    try:
        answer = await client.request(shot.method, target, content=shot.body, headers=headers)
    except httpx.HTTPError as error:
        return Hit(shot, None, _why(error), None, time.perf_counter() - began)
    return Hit(shot, answer.status_code, answer.text, _word(answer), time.perf_counter() - began)


def _show(name: str, hits: Sequence[Hit], *, json: bool) -> None:
    wrong = [hit for hit in hits if not hit.as_expected]
    if len(hits) <= 2:  # noqa: PLR2004 -- a case by itself
        (*_, last) = hits
        lines = [f"{hit.status or 'no answer:'} {hit.text[:_SHOWN]}" for hit in hits]
        verdict = "as it should be" if not wrong else f"expected {_wish(wrong[0].shot)}"
        data: dict[str, Any] = {
            "case": name,
            "status": last.status,
            "body": last.text[:_SHOWN],
            "as_expected": not wrong,
        }
        show(data, "\n".join([*lines, f"{name}: {verdict}"]), as_json=json)
        return
    counts = Counter(_counted(hit) for hit in hits)
    times = sorted(hit.seconds for hit in hits)
    at = {f"p{part}": times[min(len(times) - 1, len(times) * part // 100)] for part in (50, 95, 99)}
    lines = [f"{number:>6}  {told}" for told, number in counts.most_common()]
    lines.append("  ".join(f"{part} {seconds * 1000:.1f} ms" for part, seconds in at.items()))
    lines.append(f"{name}: {'as it should be' if not wrong else f'{len(wrong)} are not as they should be'}")
    data = {"case": name, "sent": len(hits), "answers": dict(counts), "seconds": at, "as_expected": not wrong}
    show(data, "\n".join(lines), as_json=json)


def _counted(hit: Hit) -> str:
    return f"no answer: {hit.text}" if hit.status is None else f"{hit.status} {hit.word or 'no word of a receiver'}"


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


def _keep(record: Path, chains: Sequence[Sequence[Shot]]) -> None:
    try:
        record.write_text("".join(f"{kept(shot)}\n" for shots in chains for shot in shots), "utf-8")
    except OSError as error:
        raise ConfigError([Problem("--record", f"{record} cannot be written: {error.strerror}")]) from error


def _is_web_url(text: str) -> bool:
    try:
        url = httpx.URL(text)
    except httpx.InvalidURL:
        return False
    return url.scheme in {"http", "https"} and bool(url.host) and (url.port is None or 0 < url.port < 65536)  # noqa: PLR2004


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
