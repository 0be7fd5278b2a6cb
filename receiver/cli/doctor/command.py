"""`flora-receiver doctor`: everything that can be looked at from here, each finding with its cause and its cure."""

import asyncio
import os
from pathlib import Path

import typer

from receiver.cli.connection import check_ca
from receiver.cli.doctor.findings import Finding, Severity
from receiver.cli.doctor.flora import of_flora
from receiver.cli.doctor.machine import of_ledger
from receiver.cli.doctor.public import of_public
from receiver.cli.doctor.settings import of_problems, of_settings
from receiver.cli.output import FAILED, USAGE_ERROR, print_result, report_errors
from receiver.config import Settings, load_settings
from receiver.errors import ConfigError, Problem
from receiver.plugins.loader import Loaded, check_handlers, close_handlers, load_handlers


def run(config: Path | None, *, ca: Path | None, json: bool) -> None:
    with report_errors(as_json=json):
        check_ca(ca)
        try:
            settings = load_settings(config, os.environ)
            found = asyncio.run(examine(settings, ca=ca))
        except ConfigError as error:
            _show(list(of_problems(error.problems)), as_json=json)
            raise typer.Exit(USAGE_ERROR) from error
        _show(found, as_json=json)
        if _bad(found):
            raise typer.Exit(FAILED)


def _show(found: list[Finding], *, as_json: bool) -> None:
    warnings = sum(each.illness.severity is Severity.WARNING for each in found)
    verdict = "Nothing is wrong."
    if _bad(found):
        verdict = "Something is wrong."
    elif warnings:
        verdict = f"Nothing is wrong for certain; warnings: {warnings}."
    lines = [*(line for each in found for line in _told(each)), verdict]
    print_result(
        {"ok": not _bad(found), "findings": [_json(each) for each in found]}, "\n".join(lines), as_json=as_json
    )


def _bad(found: list[Finding]) -> bool:
    return any(each.illness.severity is Severity.ERROR for each in found)


async def examine(settings: Settings, *, ca: Path | None = None) -> list[Finding]:
    """Return every finding, the worst first."""
    unusable: tuple[Problem, ...] = ()
    loaded: tuple[Loaded, ...] = ()
    try:
        loaded = load_handlers(settings)
    except ConfigError as error:  # no reason not to look at the rest
        unusable = error.problems
    try:
        flora, ledger, public, (problems, unreachable) = await asyncio.gather(
            of_flora(settings), of_ledger(settings), of_public(settings, ca=ca), check_handlers(loaded)
        )
    finally:
        await close_handlers(loaded)
    found = [*of_settings(settings), *flora, *ledger, *public]
    found += [Finding("handler.broken", f"{each.path}: {each.message}") for each in (*unusable, *problems)]
    found += [Finding("handler.unreachable", f"{each.path}: {each.message}") for each in unreachable]
    order = list(Severity)
    return sorted(found, key=lambda each: -order.index(each.illness.severity))


def _told(finding: Finding) -> list[str]:
    illness = finding.illness
    return [
        f"{illness.severity.upper():<8} {finding.id}: {illness.means}: {finding.what}",
        f"         cause: {illness.cause}",
        f"         cure:  {illness.cure}",
    ]


def _json(finding: Finding) -> dict[str, str]:
    illness = finding.illness
    return {
        "id": finding.id,
        "severity": illness.severity.value,
        "means": illness.means,
        "what": finding.what,
        "cause": illness.cause,
        "cure": illness.cure,
    }
