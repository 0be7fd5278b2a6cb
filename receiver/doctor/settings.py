"""What the settings themselves give away. Pure."""

from collections import Counter
from collections.abc import Iterator
from urllib.parse import urlsplit

from receiver.addresses import is_loopback
from receiver.config import Settings
from receiver.config.callback_url import callback_url_problem
from receiver.doctor.findings import Finding


def of_settings(settings: Settings) -> Iterator[Finding]:
    """Say what is odd, swapped or shared, and whether FLORA would call the public URL at all."""
    for problem in settings.warnings():
        yield Finding("settings.odd", f"{problem.path}: {problem.message}")
    secrets = [value for value, _ in settings.secrets_by_workspace()]
    keys = [settings.api_key_for(each.id) for each in settings.workspaces] + [settings.api_key_for(None)]
    if any(value.startswith("sk_") for value in secrets) or any(key and key.startswith("whsec_") for key in keys):
        yield Finding("secrets.swapped", "a key or a secret has the other one's beginning")
    owned = Counter(secret.get_secret_value() for each in settings.workspaces for secret in each.secrets)
    if any(times > 1 for times in owned.values()):
        yield Finding("secrets.shared", "the same secret stands in several of [[workspaces]]")
    if settings.public_url is None:
        yield Finding("public.missing", "public_url is not set")
        return
    emulated = is_loopback(urlsplit(settings.flora.base_url).hostname or "")
    refusal = None if emulated else callback_url_problem(settings.public_url)
    if refusal is not None:
        yield Finding("public.refused_by_flora", f"{settings.public_url}: {refusal}")
