"""What the settings themselves give away. Pure."""

from collections.abc import Iterator, Sequence
from urllib.parse import urlsplit

from receiver.cli.doctor.findings import Finding
from receiver.config import Settings
from receiver.config.callback_url import check_callback_url
from receiver.errors import Problem
from receiver.net.addresses import is_loopback

_TELLING = {
    "white space around": "secrets.white_space",
    "same secret": "secrets.shared",
    "does not start": "secrets.prefix",
}
"""Words of the settings' own checks, and what they mean to the doctor; the tests hold them together."""


def of_problems(problems: Sequence[Problem]) -> Iterator[Finding]:
    """Say what keeps the settings from being used at all."""
    for problem in problems:
        kind = "public.refused_by_flora" if problem.path == "public_url" else "settings.unusable"
        yield _told(problem, kind)


def of_settings(settings: Settings) -> Iterator[Finding]:
    """Say what is odd or swapped, and whether FLORA would call the public URL at all."""
    for problem in settings.warnings():
        yield _told(problem, "settings.odd")
    secrets = [value for value, _ in settings.secrets_by_workspace()]
    keys = [settings.api_key_for(each.id) for each in settings.workspaces] + [settings.api_key_for(None)]
    if any(value.startswith("sk_") for value in secrets) or any(key and key.startswith("whsec_") for key in keys):
        yield Finding("secrets.swapped", "a key or a secret has the other one's beginning")
    if settings.public_url is None:
        yield Finding("public.missing", "public_url is not set")
        return
    emulated = is_loopback(urlsplit(settings.flora.base_url).hostname or "")
    refusal = None if emulated else check_callback_url(settings.public_url)
    if refusal is not None:
        yield Finding("public.refused_by_flora", f"{settings.public_url}: {refusal}")


def _told(problem: Problem, otherwise: str) -> Finding:
    kind = next((kind for words, kind in _TELLING.items() if words in problem.message), otherwise)
    return Finding(kind, f"{problem.path}: {problem.message}")
