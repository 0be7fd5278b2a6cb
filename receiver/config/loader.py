"""`load_settings`: read the settings, check them, and tell everything that is wrong at once. A leaf: imports no other room.

The model is in `settings.py` with its sections in `sections.py`; where values come from is in `environment.py`.
"""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, get_origin

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from receiver.config.callback_url import check_callback_url, split_http_url
from receiver.config.environment import Gathered, Variable, gather, nearest
from receiver.config.sections import HandlerEntry
from receiver.config.settings import LISTS, Settings, section_of
from receiver.errors import ConfigError, Problem
from receiver.net.addresses import is_loopback

_ALIASES = {
    "FLORA_API_KEY": Variable(("flora", "api_key")),
    "FLORA_WEBHOOK_SECRET": Variable(("flora", "webhook_secrets"), many=True),
    "FLORA_BASE_URL": Variable(("flora", "base_url")),
    "RECEIVER_OPS_TOKEN": Variable(("operations", "token")),
}


def load_settings(path: Path | None, environ: Mapping[str, str], *, need_secrets: bool = True) -> Settings:
    """Read the settings, or raise `ConfigError` with every problem found.

    `path` is the TOML file (default: `RECEIVER_CONFIG`, else `./receiver.toml` if there is one). Commands that do not
    talk to FLORA pass `need_secrets=False`.
    """
    names = environment_variables()
    found = gather(path, environ, names)
    _split_handlers(found.values)
    problems = list(found.problems)
    settings = _validated(found, environ, problems)
    wrong = [path for problem in problems for path in _paths(problem.path, names)]
    problems.extend(_across(settings, wrong, need_secrets=need_secrets))
    if problems:
        raise ConfigError(problems)
    return settings


def _validated(found: Gathered, environ: Mapping[str, str], problems: list[Problem]) -> Settings:
    """Add what is wrong to `problems` and return settings made of the rest."""
    first = True
    while True:
        try:
            return Settings.model_validate(found.values, context={"environ": environ})
        except ValidationError as error:
            details = error.errors(include_url=False, include_input=False, include_context=False)
        if first:  # later findings come of what was left out
            problems.extend(_problem(detail, found) for detail in details)
            first = False
        for detail in details:
            _drop(found.values, detail["loc"])


def environment_variables() -> dict[str, Variable]:
    """Return every environment name that sets something; each may be given as `<NAME>_FILE` instead."""
    found = dict(_ALIASES)
    for key in Settings.model_fields:
        section = section_of(key)
        if section is None or key in LISTS:
            found[f"RECEIVER_{key}".upper()] = Variable((key,), many=key in LISTS)
            continue
        for name, field in section.model_fields.items():
            many = get_origin(field.annotation) is tuple
            found[f"RECEIVER_{key}__{name}".upper()] = Variable((key, name), many)
    return found


def _across(settings: Settings, wrong: list[str], *, need_secrets: bool) -> Iterator[Problem]:
    """Check what no section can see alone; a rule is left out where something that it reads is wrong already."""
    for reads, rule in (*_RULES, *(_SECRET_RULES if need_secrets else ())):
        if not any(path == each or path.startswith(f"{each}.") for path in wrong for each in reads):
            problem = rule(settings)
            if problem:
                yield problem


def _has_webhook_secret(settings: Settings) -> Problem | None:
    if settings.flora.webhook_secrets or settings.workspaces:
        return None
    return Problem("flora.webhook_secrets", "is required: set FLORA_WEBHOOK_SECRET to the workspace's signing secret")


def _has_api_key(settings: Settings) -> Problem | None:
    each_has_its_own = settings.workspaces and all(workspace.api_key for workspace in settings.workspaces)
    if settings.flora.api_key or (each_has_its_own and not settings.flora.webhook_secrets):
        return None
    return Problem("flora.api_key", "is required: set FLORA_API_KEY, since outputs are read from FLORA's API")


def _public_url_is_public(settings: Settings) -> Problem | None:
    if settings.public_url is None or is_loopback(split_http_url(settings.flora.base_url).hostname or ""):
        return None
    problem = check_callback_url(settings.public_url)
    return Problem("public_url", problem) if problem else None


def check_operations(settings: Settings) -> Problem | None:
    """Return why the operations listener must not be opened as the settings have it."""
    operations = settings.operations
    if is_loopback(operations.host):
        return None
    if operations.token is None:
        return Problem("operations.token", "is required on a non-loopback address: set RECEIVER_OPS_TOKEN")
    if settings.tls.cert is None and not operations.allow_plaintext:
        message = "needs [tls] on a non-loopback address, or allow_plaintext = true behind a proxy that does TLS"
        return Problem("operations.host", message)
    return None


# Each rule with what it reads.
_Rules = tuple[tuple[tuple[str, ...], Callable[[Settings], Problem | None]], ...]
_RULES: _Rules = (
    (("public_url", "flora.base_url"), _public_url_is_public),
    (("operations", "tls"), check_operations),
)
_SECRET_RULES: _Rules = (
    (("flora.webhook_secrets", "workspaces"), _has_webhook_secret),
    (("flora.api_key", "flora.webhook_secrets", "workspaces"), _has_api_key),
)


def _paths(place: str, names: Mapping[str, Variable]) -> Iterator[str]:
    """Yield the dotted paths that a problem's place spoils: its own, or the one that a variable of this name sets."""
    yield place
    variable = names.get(place) or names.get(place.removesuffix("_FILE"))
    if variable:
        yield ".".join(variable.path)


def _split_handlers(values: dict[str, Any]) -> None:
    """Move the keys that are a handler's own into its `options`."""
    ours = HandlerEntry.model_fields.keys() - {"options"}
    entries = values.get("handlers")
    if isinstance(entries, list):
        values["handlers"] = [_split(entry, ours) if isinstance(entry, dict) else entry for entry in entries]


def _split(entry: dict[str, Any], ours: set[str]) -> dict[str, Any]:
    options = {key: value for key, value in entry.items() if key not in ours}
    return {key: value for key, value in entry.items() if key in ours} | {"options": options}


def _problem(detail: ErrorDetails, found: Gathered) -> Problem:
    """Put one of pydantic's findings into our words, without the value."""
    location = detail["loc"]
    path = ".".join(str(part) for part in location)
    message = _WORDS.get(detail["type"])
    if detail["type"] == "extra_forbidden":
        section = section_of(str(location[0])) if len(location) > 1 else Settings
        meant = nearest(str(location[-1]), section.model_fields if section else ())
        message = f"is no setting of ours{f'; did you mean {meant}?' if meant else ''}"
    elif message is None:
        message = detail["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
    origin = found.origins.get(path) or found.origins.get(".".join(str(part) for part in location[:2]))
    return Problem(path, f"{message} (set by {origin})" if origin else message)


_WORDS = {
    "missing": "is required",
    "model_type": "must be a table",
    "model_attributes_type": "must be a table",
    "dict_type": "must be a table",
    "tuple_type": "must be a list",
}


def _drop(values: dict[str, Any], location: tuple[int | str, ...]) -> None:
    """Forget what is wrong, so that the rest can be checked still: a key of a section, or a whole list."""
    key, *rest = (str(part) for part in location)
    section = values.get(key)
    if rest and isinstance(section, dict):
        section.pop(rest[0], None)
    else:
        values.pop(key, None)
