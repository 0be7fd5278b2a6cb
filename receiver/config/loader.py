"""Loads the settings: reads the sources, validates them, and reports every mistake at once.

`settings.py` and `sections.py` have the model, `environment.py` reads the sources.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_origin

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from receiver.config.callback_url import check_callback_url, split_http_url
from receiver.config.environment import Sources, TextReader, Variable, find_similar, read_sources, read_text
from receiver.config.sections import HandlerEntry
from receiver.config.settings import LISTS, Settings, section_of
from receiver.errors import ConfigError, Problem
from receiver.net.addresses import is_loopback

_ALIASES = {
    "FLORA_API_KEY": Variable(("flora", "api_key")),
    "FLORA_WEBHOOK_SECRET": Variable(("flora", "webhook_secrets"), is_list=True),
    "FLORA_BASE_URL": Variable(("flora", "base_url")),
    "RECEIVER_OPS_TOKEN": Variable(("operations", "token")),
}


def load_settings(
    path: Path | None,
    environ: Mapping[str, str],
    *,
    need_secrets: bool = True,
    read: TextReader = read_text,
) -> Settings:
    """Return the settings. Raises ConfigError with every problem.

    `path` is the TOML file; by default `RECEIVER_CONFIG`, else `./receiver.toml` if it exists.
    Commands that do not use FLORA pass `need_secrets=False`. `read` returns the text of the file.
    """
    variables = environment_variables()
    sources = read_sources(path, environ, variables, read=read)
    _separate_options(sources.values)
    problems = list(sources.problems)
    settings = _validate(sources, environ, problems)
    wrong = [path for problem in problems for path in _affected_paths(problem.path, variables)]
    if sources.is_complete:
        problems.extend(_check_rules(settings, wrong, need_secrets=need_secrets))
    if problems:
        raise ConfigError(problems)
    return settings


def environment_variables() -> dict[str, Variable]:
    """Return every variable that sets something; each can be given as `<NAME>_FILE` instead."""
    variables = dict(_ALIASES)
    for key in Settings.model_fields:
        section = section_of(key)
        if section is None or key in LISTS:
            variables[f"RECEIVER_{key}".upper()] = Variable((key,), is_list=key in LISTS)
            continue
        for name, field in section.model_fields.items():
            is_list = get_origin(field.annotation) is tuple
            variables[f"RECEIVER_{key}__{name}".upper()] = Variable((key, name), is_list)
    return variables


def check_operations(settings: Settings, hosts: Sequence[str] | None = None) -> Problem | None:
    """Return why the operations listener must not be opened with these settings, or None.

    `hosts` are those that it is bound to, by default the one in the settings.
    """
    operations = settings.operations
    if all(is_loopback(host) for host in hosts or (operations.host,)):
        return None
    if operations.token is None:
        message = "is required on an address that is not loopback: set RECEIVER_OPS_TOKEN"
        return Problem("operations.token", message)
    if settings.tls.cert is None and not operations.allow_plaintext:
        message = "requires [tls] unless it is loopback, or allow_plaintext = true behind a proxy"
        return Problem("operations.host", message)
    return None


def _check_webhook_secret(settings: Settings) -> Problem | None:
    if settings.flora.webhook_secrets or settings.workspaces:
        return None
    message = "is required: set FLORA_WEBHOOK_SECRET to the signing secret of the workspace"
    return Problem("flora.webhook_secrets", message)


def _check_api_key(settings: Settings) -> Problem | None:
    has_own_keys = settings.workspaces and all(each.api_key for each in settings.workspaces)
    if settings.flora.api_key or (has_own_keys and not settings.flora.webhook_secrets):
        return None
    message = "is required to read runs from FLORA's API: set FLORA_API_KEY"
    return Problem("flora.api_key", message)


def _check_public_url(settings: Settings) -> Problem | None:
    if settings.public_url is None:
        return None
    if is_loopback(split_http_url(settings.flora.base_url).hostname or ""):
        return None  # an emulator on this machine calls any URL
    problem = check_callback_url(settings.public_url)
    return Problem("public_url", problem) if problem else None


# Rules between sections, each with the settings that it reads.
_Rules = tuple[tuple[tuple[str, ...], Callable[[Settings], Problem | None]], ...]
_RULES: _Rules = (
    (("public_url", "flora.base_url"), _check_public_url),
    (("operations", "tls"), check_operations),
)
_SECRET_RULES: _Rules = (
    (("flora.webhook_secrets", "workspaces"), _check_webhook_secret),
    (("flora.api_key", "flora.webhook_secrets", "workspaces"), _check_api_key),
)


def _check_rules(settings: Settings, wrong: list[str], *, need_secrets: bool) -> Iterator[Problem]:
    """Check the rules between sections, except those that read a setting which is wrong already."""
    for reads, check in (*_RULES, *(_SECRET_RULES if need_secrets else ())):
        if any(path == each or path.startswith(f"{each}.") for path in wrong for each in reads):
            continue
        if (problem := check(settings)) is not None:
            yield problem


def _affected_paths(place: str, variables: Mapping[str, Variable]) -> Iterator[str]:
    """Yield the dotted paths that a problem affects: its own, or that of the variable so named."""
    yield place
    variable = variables.get(place) or variables.get(place.removesuffix("_FILE"))
    if variable:
        yield ".".join(variable.path)


def _separate_options(values: dict[str, Any]) -> None:
    """Move the keys of each handler that are not ours into its `options`."""
    entries = values.get("handlers")
    if not isinstance(entries, list):
        return
    ours = HandlerEntry.model_fields.keys() - {"options"}
    values["handlers"] = [
        {key: value for key, value in entry.items() if key in ours}
        | {"options": {key: value for key, value in entry.items() if key not in ours}}
        if isinstance(entry, dict)
        else entry
        for entry in entries
    ]


def _validate(sources: Sources, environ: Mapping[str, str], problems: list[Problem]) -> Settings:
    """Return settings made of the valid values; add a problem for each of the others."""
    is_first = True
    while True:
        try:
            return Settings.model_validate(sources.values, context={"environ": environ})
        except ValidationError as error:
            details = error.errors(include_url=False, include_input=False, include_context=False)
        if is_first:  # later errors follow from what was removed
            problems.extend(_to_problem(detail, sources) for detail in details)
            is_first = False
        for detail in details:
            _remove(sources.values, detail["loc"])


_MESSAGES = {
    "missing": "is required",
    "model_type": "must be a table",
    "model_attributes_type": "must be a table",
    "dict_type": "must be a table",
    "tuple_type": "must be a list",
}
"""Our messages in place of pydantic's, by its error types."""


def _to_problem(detail: ErrorDetails, sources: Sources) -> Problem:
    """Return one of pydantic's errors as a problem, whose message never contains the value."""
    location = detail["loc"]
    path = ".".join(str(part) for part in location)
    message = _MESSAGES.get(detail["type"])
    if detail["type"] == "extra_forbidden":
        section = section_of(str(location[0])) if len(location) > 1 else Settings
        similar = find_similar(str(location[-1]), section.model_fields if section else ())
        message = f"is not a setting{f'; did you mean {similar}?' if similar else ''}"
    elif message is None:
        message = detail["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
    section_path = ".".join(str(part) for part in location[:2])
    origin = sources.origins.get(path) or sources.origins.get(section_path)
    return Problem(path, f"{message} (set by {origin})" if origin else message)


def _remove(values: dict[str, Any], location: tuple[int | str, ...]) -> None:
    """Remove a wrong value, which is a key of a section or a whole list."""
    key, *rest = (str(part) for part in location)
    section = values.get(key)
    if rest and isinstance(section, dict):
        section.pop(rest[0], None)
    else:
        values.pop(key, None)
