"""Checks the settings themselves. Pure."""

from collections.abc import Iterator, Sequence
from urllib.parse import urlsplit

from receiver.cli.doctor.findings import Finding
from receiver.config import Settings
from receiver.config.callback_url import check_callback_url
from receiver.errors import Problem
from receiver.net.addresses import is_loopback

_KINDS_BY_WORDS = {
    "white space around": "secrets.white_space",
    "a quotation mark": "secrets.character",
    "a byte order mark": "secrets.character",
    "a line break": "secrets.character",
    "white space (": "secrets.character",
    "a control character": "secrets.character",
    "an invisible character": "secrets.character",
    "not ASCII": "secrets.character",
    "more than one key": "secrets.character",
    "same secret": "secrets.shared",
    "does not start": "secrets.prefix",
}
"""Words in a problem's message, and the finding they stand for. The tests keep the two in step."""


def findings_from_problems(problems: Sequence[Problem]) -> Iterator[Finding]:
    """Return a finding for each problem that makes the settings unusable."""
    for problem in problems:
        is_public_url = problem.path == "public_url"
        kind = "public.refused_by_flora" if is_public_url else "settings.unusable"
        yield _to_finding(problem, default=kind)


def check_settings(settings: Settings) -> Iterator[Finding]:
    """Find odd values, swapped keys and secrets, and a public URL that FLORA would refuse."""
    for problem in settings.find_warnings():
        yield _to_finding(problem, default="settings.odd")
    secrets = [value for value, _ in settings.secrets_by_workspace()]
    keys = [settings.api_key_for(each.id) for each in settings.workspaces]
    keys.append(settings.api_key_for(None))
    if any(value.startswith("sk_") for value in secrets):
        yield Finding("secrets.swapped", "a signing secret begins with sk_")
    elif any(key and key.startswith("whsec_") for key in keys):
        yield Finding("secrets.swapped", "an API key begins with whsec_")
    if settings.public_url is None:
        yield Finding("public.missing", "public_url is not set")
        return
    is_emulated = is_loopback(urlsplit(settings.flora.base_url).hostname or "")
    refusal = None if is_emulated else check_callback_url(settings.public_url)
    if refusal is not None:
        yield Finding("public.refused_by_flora", f"{settings.public_url}: {refusal}")


def _to_finding(problem: Problem, *, default: str) -> Finding:
    kinds = (kind for words, kind in _KINDS_BY_WORDS.items() if words in problem.message)
    return Finding(next(kinds, default), f"{problem.path}: {problem.message}")
