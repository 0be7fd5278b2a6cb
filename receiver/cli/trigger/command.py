"""`flora-receiver trigger`: sends callbacks, signed or spoiled on purpose, to any receiver, and judges the answers."""

import asyncio
import os
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import typer

from receiver.cli.connection import check_ca
from receiver.cli.output import FAILED, print_error, print_result, report_errors
from receiver.cli.trigger.cases import CASES, MADE_UP_WORKSPACE, Shot, Subject, again, kept
from receiver.cli.trigger.simulator import GOOD, PATIENCE_SECONDS, Hit, send
from receiver.config import load_settings
from receiver.errors import ConfigError, Problem
from receiver.net.clients import probe_client

_SHOWN = 2000
_AT_ONCE = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """The options of the command."""

    url: str
    case: str
    run_id: str | None
    delivery_id: str | None
    secret: str | None
    workspace_id: str | None
    count: int
    rate: float | None
    record: Path | None
    source: Path | None
    ca: Path | None
    json: bool


def run(options: Options) -> None:
    with report_errors(as_json=options.json):
        _check(options)
        chains = _chains(options)
        if options.record is not None:
            _write_record(options.record, chains)
        at_once = 1 if options.count == 1 else _AT_ONCE
        hits = asyncio.run(_fire(options.url, chains, options.ca, options.rate, at_once=at_once))
        if all(hit.status is None for hit in hits):
            reason = hits[0].text
            data = {"error": "no_answer", "url": options.url, "message": reason}
            print_error(data, f"No answer from {options.url}: {reason}", as_json=options.json)
            raise typer.Exit(FAILED)
        name = options.case if options.source is None else str(options.source)
        _show(name, hits, json=options.json)
        if not all(hit.as_expected for hit in hits):
            raise typer.Exit(FAILED)


def _check(options: Options) -> None:
    if options.case not in CASES:
        message = f"there is no case {options.case!r}; there are: {', '.join(CASES)}"
        raise ConfigError([Problem("--case", message)])
    if not _is_web_url(options.url):
        raise ConfigError([Problem("URL", f"{options.url!r} is not an http or https URL")])
    check_ca(options.ca)


def _chains(options: Options) -> list[tuple[Shot, ...]]:
    """Return the requests to send, in groups that are sent in order."""
    if options.source is not None:
        shots = _recorded(options.source)
        groups: list[tuple[Shot, ...]]
        groups = [tuple(shots)] if options.rate is None else [(shot,) for shot in shots]
        return groups * options.count
    subject = replace(
        _subject(options.secret, options.workspace_id),
        run_id=options.run_id,
        delivery_id=options.delivery_id,
    )
    return [tuple(CASES[options.case](subject)) for _ in range(options.count)]


async def _fire(
    url: str, chains: Sequence[Sequence[Shot]], ca: Path | None, rate: float | None, *, at_once: int
) -> list[Hit]:
    """Send all, in order; with a rate by the clock, whether or not there are answers, else as many at a time as fit.

    What belongs together is one chain: each of its requests waits for the answer to the one before it, or is not sent.
    """
    gate = asyncio.Semaphore(at_once if rate is None else max(at_once, round(rate * PATIENCE_SECONDS)))
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=at_once)
    async with probe_client(ca=ca, limits=limits, timeout_seconds=PATIENCE_SECONDS) as client:
        began = time.perf_counter()

        async def chain(shots: Sequence[Shot], number: int) -> list[Hit]:
            if rate is not None:
                await asyncio.sleep(max(0.0, began + number * len(shots) / rate - time.perf_counter()))
            hits: list[Hit] = []
            async with gate:
                for shot in shots:
                    hits.append(await send(client, url, shot, ca=ca))
                    if hits[-1].status is None:
                        break
            return hits

        done = await asyncio.gather(*(chain(shots, number) for number, shots in enumerate(chains)))
        return [hit for hits in done for hit in hits]


def _show(name: str, hits: Sequence[Hit], *, json: bool) -> None:
    wrong = [hit for hit in hits if not hit.as_expected]
    if len(hits) <= 2:
        (*_, last) = hits
        lines = [f"{hit.status or 'no answer:'} {hit.text[:_SHOWN]}" for hit in hits]
        verdict = "as it should be" if not wrong else f"expected {_wish(wrong[0].shot)}"
        data: dict[str, Any] = {
            "case": name,
            "status": last.status,
            "body": last.text[:_SHOWN],
            "as_expected": not wrong,
        }
        print_result(data, "\n".join([*lines, f"{name}: {verdict}"]), as_json=json)
        return
    counts = Counter(_counted(hit) for hit in hits)
    times = sorted(hit.seconds for hit in hits)
    at = {f"p{part}": times[min(len(times) - 1, len(times) * part // 100)] for part in (50, 95, 99)}
    lines = [f"{number:>6}  {told}" for told, number in counts.most_common()]
    lines.append("  ".join(f"{part} {seconds * 1000:.1f} ms" for part, seconds in at.items()))
    lines.append(f"{name}: {'as it should be' if not wrong else f'{len(wrong)} are not as they should be'}")
    data = {"case": name, "sent": len(hits), "answers": dict(counts), "seconds": at, "as_expected": not wrong}
    print_result(data, "\n".join(lines), as_json=json)


def _counted(hit: Hit) -> str:
    return f"no answer: {hit.text}" if hit.status is None else f"{hit.status} {hit.word or 'no word of a receiver'}"


def _wish(shot: Shot) -> str:
    return f"200 {shot.expected}" if shot.expected in GOOD else shot.expected


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


def _write_record(record: Path, chains: Sequence[Sequence[Shot]]) -> None:
    try:
        record.write_text("".join(f"{kept(shot)}\n" for shots in chains for shot in shots), "utf-8")
    except OSError as error:
        raise ConfigError([Problem("--record", f"{record} cannot be written: {error.strerror}")]) from error


def _is_web_url(text: str) -> bool:
    try:
        url = httpx.URL(text)
    except httpx.InvalidURL:
        return False
    return url.scheme in {"http", "https"} and bool(url.host) and (url.port is None or 0 < url.port < 65536)


def _subject(secret: str | None, workspace_id: str | None) -> Subject:
    """Return who signs: with the given secret, or with a configured one, of that workspace where it is named."""
    if secret:
        return Subject(secret, workspace_id or MADE_UP_WORKSPACE)
    configured = load_settings(None, os.environ, need_secrets=False).secrets_by_workspace()
    if not configured:
        raise ConfigError([Problem("FLORA_WEBHOOK_SECRET", "is not set: give the secret there, or by --secret")])
    fitting = [(value, owner) for value, owner in configured if workspace_id is None or owner in {None, workspace_id}]
    if not fitting:
        raise ConfigError([Problem("--workspace-id", f"the settings have no secret of {workspace_id}")])
    value, owner = min(fitting, key=lambda each: each[1] is None) if workspace_id else fitting[0]
    return Subject(value, workspace_id or owner or MADE_UP_WORKSPACE)
