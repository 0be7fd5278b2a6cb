"""`flora-receiver doctor`: checks the whole set-up and prints every finding with a fix."""

import asyncio
import os
from collections.abc import Mapping
from pathlib import Path

import typer

from receiver.cli.connection import check_ca
from receiver.cli.doctor.database import check_database
from receiver.cli.doctor.findings import Finding, Severity
from receiver.cli.doctor.flora import check_flora
from receiver.cli.doctor.proxies import check_downloads_proxy, check_environment
from receiver.cli.doctor.public import check_public_url
from receiver.cli.doctor.settings import check_settings, findings_from_problems
from receiver.cli.output import FAILED, USAGE_ERROR, print_findings, report_errors
from receiver.config import Settings, load_settings
from receiver.errors import ConfigError, Problem
from receiver.plugins.loader import CheckWarning, Loaded, check_handlers, close_handlers, load_handlers
from receiver.service.wiring import find_unusable_files


def run(config: Path | None, *, ca: Path | None, json: bool) -> None:
    with report_errors(as_json=json):
        check_ca(ca)
        try:
            settings = load_settings(config, os.environ)
            findings = asyncio.run(examine(settings, ca=ca, environ=os.environ))
        except ConfigError as error:
            _print_findings(list(findings_from_problems(error.problems)), as_json=json)
            raise typer.Exit(USAGE_ERROR) from error
        _print_findings(findings, as_json=json)
        if _has_errors(findings):
            raise typer.Exit(FAILED)


def _print_findings(findings: list[Finding], *, as_json: bool) -> None:
    errors, warnings = (
        sum(each.kind.severity is severity for each in findings)
        for severity in (Severity.ERROR, Severity.WARNING)
    )
    verdict = f"Errors: {errors}, warnings: {warnings}." if errors or warnings else "No problems found."
    lines = [*(line for each in findings for line in _to_lines(each)), verdict]
    data = {"ok": not errors, "findings": [_to_json(each) for each in findings]}
    print_findings(data, "\n".join(lines), as_json=as_json)


def _has_errors(findings: list[Finding]) -> bool:
    return any(each.kind.severity is Severity.ERROR for each in findings)


async def examine(
    settings: Settings, *, ca: Path | None = None, environ: Mapping[str, str] | None = None
) -> list[Finding]:
    """Run every check; return the findings, errors first."""
    unusable: tuple[Problem, ...] = ()
    loaded: tuple[Loaded, ...] = ()
    try:
        loaded = load_handlers(settings)
    except ConfigError as error:  # the other checks still make sense
        unusable = error.problems
    try:
        flora, database, public, (problems, warnings), proxy = await asyncio.gather(
            check_flora(settings, environ=environ),
            check_database(settings),
            check_public_url(settings, ca=ca),
            check_handlers(loaded),
            check_downloads_proxy(settings),
        )
    finally:
        await close_handlers(loaded)
    findings = [*_check_files(settings), *check_settings(settings), *flora, *database, *public, *proxy]
    findings += check_environment(settings, environ or {})
    for each in (*unusable, *problems, *warnings):
        kind = each.event if isinstance(each, CheckWarning) else "handler.broken"
        findings.append(Finding(kind, f"{each.path}: {each.message}"))
    order = list(Severity)
    return sorted(findings, key=lambda each: -order.index(each.kind.severity))


def _check_files(settings: Settings) -> list[Finding]:
    """Find certificates and keys that cannot be used; `check_flora` reads its own file of CAs."""
    problems = [each for each in find_unusable_files(settings) if each.path != "flora.ca_file"]
    return [Finding("settings.unusable", f"{each.path}: {each.message}") for each in problems]


def _to_lines(finding: Finding) -> list[str]:
    kind = finding.kind
    return [
        f"{kind.severity.upper():<8} {finding.id}: {kind.summary}",
        f"         found: {finding.what}",
        f"         cause: {kind.cause}",
        f"         fix:   {kind.fix}",
    ]


def _to_json(finding: Finding) -> dict[str, str]:
    kind = finding.kind
    return {
        "id": finding.id,
        "severity": kind.severity.value,
        "means": kind.summary,
        "what": finding.what,
        "cause": kind.cause,
        "cure": kind.fix,
    }
