"""`flora-receiver trigger`: sends valid and invalid callbacks and checks the responses."""

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
from receiver.cli.trigger.cases import (
    CASES,
    DEFAULT_WORKSPACE,
    CallbackFactory,
    CallbackRequest,
    from_record,
    to_record,
)  # fmt: skip
from receiver.cli.trigger.sender import SUCCESSES, TIMEOUT_SECONDS, Result, send
from receiver.config import load_settings
from receiver.errors import ConfigError, Problem
from receiver.net.clients import probe_client
from receiver.net.credentials import find_fault
from receiver.net.ownership import match_owner

_MAX_TEXT = 2000
"""Characters of a response that are printed."""
_CONCURRENCY = 64

Group = tuple[CallbackRequest, ...]
"""Requests that are sent one after the other: each waits for the response to the one before."""


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
        groups = _make_groups(options)
        if options.record is not None:
            _write_record(options.record, groups)
        results = asyncio.run(_send_groups(options, groups))
        if all(result.status is None for result in results):
            reason = results[0].text
            data = {"error": "no_answer", "url": options.url, "message": reason}
            print_error(data, f"No response from {options.url}: {reason}", as_json=options.json)
            raise typer.Exit(FAILED)
        name = options.case if options.source is None else str(options.source)
        if len(results) <= 2:
            _print_results(name, results, as_json=options.json)
        else:
            _print_summary(name, results, as_json=options.json)
        if not all(result.is_expected for result in results):
            raise typer.Exit(FAILED)


def _check(options: Options) -> None:
    if options.case not in CASES:
        message = f"there is no case {options.case!r}; the cases are {', '.join(CASES)}"
        raise ConfigError([Problem("--case", message)])
    if not _is_web_url(options.url):
        raise ConfigError([Problem("URL", f"{options.url!r} is not an http or https URL")])
    check_ca(options.ca)


def _make_groups(options: Options) -> list[Group]:
    if options.source is not None:
        requests = _read_record(options.source)
        groups: list[Group] = [requests]
        if options.rate is not None:
            groups = [(request,) for request in requests]
        return groups * options.count
    factory = replace(
        _find_factory(options.secret, options.workspace_id),
        run_id=options.run_id,
        delivery_id=options.delivery_id,
    )
    return [tuple(CASES[options.case](factory)) for _ in range(options.count)]


async def _send_groups(options: Options, groups: Sequence[Group]) -> list[Result]:
    """Send all requests and return their results in order.

    With a rate, groups start by the clock, whether or not there are responses; without one, as many
    at a time as the receiver takes. The rest of a group is not sent after a missing response.
    """
    url, ca, rate = options.url, options.ca, options.rate
    concurrency = 1 if options.count == 1 else _CONCURRENCY
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=concurrency)
    if rate is not None:
        concurrency = max(concurrency, round(rate * TIMEOUT_SECONDS))
    slots = asyncio.Semaphore(concurrency)
    async with probe_client(ca=ca, limits=limits, timeout_seconds=TIMEOUT_SECONDS) as client:
        began = time.perf_counter()

        async def send_group(group: Group, number: int) -> list[Result]:
            if rate is not None:
                starts_at = began + number * len(group) / rate
                await asyncio.sleep(max(0.0, starts_at - time.perf_counter()))
            results: list[Result] = []
            async with slots:
                for request in group:
                    results.append(await send(client, url, request, ca=ca))
                    if results[-1].status is None:
                        break
            return results

        sent = await asyncio.gather(*(send_group(each, place) for place, each in enumerate(groups)))
        return [result for results in sent for result in results]


def _print_results(name: str, results: Sequence[Result], *, as_json: bool) -> None:
    wrong = [result for result in results if not result.is_expected]
    last = results[-1]
    lines = [f"{result.status or 'no response:'} {result.text[:_MAX_TEXT]}" for result in results]
    lines.append(f"{name}: {_describe_expected(wrong[0].request) if wrong else 'as expected'}")
    data: dict[str, Any] = {
        "case": name,
        "status": last.status,
        "body": last.text[:_MAX_TEXT],
        "as_expected": not wrong,
    }
    print_result(data, "\n".join(lines), as_json=as_json)


def _print_summary(name: str, results: Sequence[Result], *, as_json: bool) -> None:
    wrong = sum(not result.is_expected for result in results)
    counts = Counter(_describe_result(result) for result in results)
    times = sorted(result.seconds for result in results)
    seconds = {
        f"p{percent}": times[min(len(times) - 1, len(times) * percent // 100)] for percent in (50, 95, 99)
    }
    lines = [f"{count:>6}  {text}" for text, count in counts.most_common()]
    lines.append("  ".join(f"{percentile} {value * 1000:.1f} ms" for percentile, value in seconds.items()))
    lines.append(f"{name}: {f'{wrong} responses not as expected' if wrong else 'as expected'}")
    data = {
        "case": name,
        "sent": len(results),
        "answers": dict(counts),
        "seconds": seconds,
        "as_expected": not wrong,
    }
    print_result(data, "\n".join(lines), as_json=as_json)


def _describe_result(result: Result) -> str:
    if result.status is None:
        return f"no response: {result.text}"
    return f"{result.status} {result.code or 'not from a receiver'}"


def _describe_expected(request: CallbackRequest) -> str:
    status = "200 " if request.expected in SUCCESSES else ""
    return f"expected {status}{request.expected}"


def _read_record(source: Path) -> Group:
    try:
        lines = source.read_text("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError([Problem("--from", f"{source} cannot be read")]) from error
    requests = []
    for number, line in enumerate(lines, 1):
        try:
            requests.append(from_record(line))
        except ValueError as error:
            raise ConfigError([Problem("--from", f"line {number} of {source} {error}")]) from error
    if not requests:
        raise ConfigError([Problem("--from", f"{source} is empty")])
    return tuple(requests)


def _write_record(record: Path, groups: Sequence[Group]) -> None:
    lines = "".join(f"{to_record(request)}\n" for group in groups for request in group)
    try:
        record.write_text(lines, "utf-8")
        match_owner(record, record.parent)
    except OSError as error:
        message = f"{record} cannot be written: {error.strerror}"
        raise ConfigError([Problem("--record", message)]) from error


def _is_web_url(text: str) -> bool:
    try:
        url = httpx.URL(text)
    except httpx.InvalidURL:
        return False
    has_port = url.port is None or 0 < url.port < 65536
    return url.scheme in {"http", "https"} and bool(url.host) and has_port


def _find_factory(secret: str | None, workspace_id: str | None) -> CallbackFactory:
    """Return a factory with the given secret, or with a configured one of the workspace."""
    if secret:
        if (fault := find_fault(secret)) is not None:
            raise ConfigError([Problem("--secret", fault)])
        return CallbackFactory(secret, workspace_id or DEFAULT_WORKSPACE)
    configured = load_settings(None, os.environ, need_secrets=False).secrets_by_workspace()
    if not configured:
        message = "is not set: set it, or pass the secret with --secret"
        raise ConfigError([Problem("FLORA_WEBHOOK_SECRET", message)])
    candidates = [
        (value, owner)
        for value, owner in configured
        if workspace_id is None or owner in {None, workspace_id}
    ]
    if not candidates:
        message = f"the settings have no secret of {workspace_id}"
        raise ConfigError([Problem("--workspace-id", message)])
    value, owner = candidates[0]
    if workspace_id is not None:  # its own secret goes before one of every workspace
        value, owner = min(candidates, key=lambda each: each[1] is None)
    return CallbackFactory(value, workspace_id or owner or DEFAULT_WORKSPACE)
