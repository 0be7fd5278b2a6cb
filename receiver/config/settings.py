"""`Settings`, the whole of what can be set, and two views of it: `describe` for documentation, `redact` for display.

Built by `load_settings`; the rooms get the sections they need from the composition root.
"""

import re
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, Field, SecretStr

from receiver.config.reference import Setting, describe_model, setting_of
from receiver.config.sections import (
    Database,
    Discover,
    Dispatching,
    Downloads,
    Flora,
    HandlerEntry,
    Logging,
    Operations,
    Public,
    Reconcile,
    Retention,
    Section,
    Tls,
    Workspace,
)
from receiver.config.values import HttpUrl
from receiver.errors import Problem
from receiver.model import OutputType

__all__ = ["LISTS", "Setting", "Settings", "describe", "redact", "section_of"]

LISTS: Mapping[str, type[BaseModel]] = MappingProxyType({"workspaces": Workspace, "handlers": HandlerEntry})
"""The settings that are lists of tables."""

_KNOWN = {"output_type": [each.value for each in OutputType], "run_type": ["generation", "technique", "action"]}
_LAST_RETRY_SECONDS = 400  # FLORA's last attempt: 10 s + 60 s + 300 s and three time-outs after the first
_SECRET_KEY = re.compile(
    r"secret|token|passw(or)?d|authorization|api_?key|access_?key|credential|private", re.IGNORECASE
)
_USERINFO = re.compile(r"(?<=://)[^/@\s]+(?=@)")


def _distinct(handlers: tuple[HandlerEntry, ...]) -> tuple[HandlerEntry, ...]:
    names = [handler.name for handler in handlers]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"two handlers are called {', '.join(twice)}: give each its own `name`")
    return handlers


def _own_secrets(workspaces: tuple[Workspace, ...]) -> tuple[Workspace, ...]:
    if len({workspace.id for workspace in workspaces}) < len(workspaces):
        raise ValueError("two workspaces have the same `id`")
    secrets = [secret.get_secret_value() for workspace in workspaces for secret in workspace.secrets]
    if len(set(secrets)) < len(secrets):
        raise ValueError("the same secret is given twice, so that callbacks could not be told apart")
    return workspaces


def _defaulted(handlers: object) -> object:
    return handlers or [{"use": "storage", "options": {"url": "outputs"}}, {"use": "log"}]


class Settings(Section):
    """Everything that can be set. Build it with `load_settings`, or in tests from nested dicts."""

    public_url: HttpUrl | None = Field(
        None, description="What FLORA is told to call; `/callbacks/flora` is added. Must be public HTTPS."
    )
    public: Public = Public()
    operations: Operations = Operations()
    tls: Tls = Tls()
    database: Database = Database()
    flora: Flora = Flora()
    reconcile: Reconcile = Reconcile()
    discover: Discover = Discover()
    dispatch: Dispatching = Dispatching()
    downloads: Downloads = Downloads()
    retention: Retention = Retention()
    log: Logging = Logging()
    workspaces: Annotated[tuple[Workspace, ...], AfterValidator(_own_secrets)] = ()
    handlers: Annotated[tuple[HandlerEntry, ...], AfterValidator(_distinct), BeforeValidator(_defaulted)] = Field(
        (), validate_default=True
    )

    def secrets_by_workspace(self) -> tuple[tuple[str, str | None], ...]:
        """Return every signing secret, in the order to try them, with the workspace that it belongs to (None: any)."""
        shared = {secret.get_secret_value(): None for secret in self.flora.webhook_secrets}
        owned = {secret.get_secret_value(): each.id for each in self.workspaces for secret in each.secrets}
        return tuple({**shared, **owned}.items())

    def api_key_for(self, workspace_id: str | None) -> str | None:
        """Return the API key to ask about a run of this workspace with."""
        own = next((each.api_key for each in self.workspaces if each.id == workspace_id), None)
        key = own or self.flora.api_key
        return key.get_secret_value() if key else None

    def warnings(self) -> list[Problem]:
        """Return what is odd without being wrong."""
        found = [
            Problem(path, f"does not start with {prefix}: is this the right value?")
            for path, prefix, secret in self._prefixed()
            if not secret.get_secret_value().startswith(prefix)
        ]
        past = self.flora.tolerance_past_seconds
        if past is not None and past < _LAST_RETRY_SECONDS:
            late = f"FLORA's last retry may come {_LAST_RETRY_SECONDS} s after signing: it would be refused"
            found.append(Problem("flora.tolerance_past_seconds", late))
        return [*found, *self._never()]

    def _never(self) -> Iterator[Problem]:
        """Find what a handler asks for and will never see: FLORA's words are open, so a slip is no error."""
        names = {entry.name for entry in self.handlers}
        for index, entry in enumerate(self.handlers):
            asked = {
                "output_type": entry.when and entry.when.output_type,
                "run_type": entry.when and entry.when.run_type,
            }
            for name, words in asked.items():
                for word in sorted(set(words or ()) - set(_KNOWN[name])):
                    known = ", ".join(_KNOWN[name])
                    yield Problem(f"handlers.{index}.when.{name}", f"{word!r} is not one that we know: {known}")
            awaited = entry.options.get("wait_for")
            for name in awaited if isinstance(awaited, list | tuple) else ():
                if name not in names - {entry.name}:
                    yield Problem(
                        f"handlers.{index}.wait_for", f"no other handler is called {name!r}: it would wait in vain"
                    )

    def _prefixed(self) -> Iterator[tuple[str, str, SecretStr]]:
        if self.flora.api_key:
            yield "flora.api_key", "sk_", self.flora.api_key
        for index, secret in enumerate(self.flora.webhook_secrets):
            yield f"flora.webhook_secrets.{index}", "whsec_", secret
        for index, workspace in enumerate(self.workspaces):
            for number, secret in enumerate(workspace.secrets):
                yield f"workspaces.{index}.secrets.{number}", "whsec_", secret
            if workspace.api_key:
                yield f"workspaces.{index}.api_key", "sk_", workspace.api_key


def section_of(key: str) -> type[BaseModel] | None:
    """Return the model of the table, or of each table in the list, called `key`; None for a plain value."""
    annotation: Any = LISTS.get(key) or Settings.model_fields[key].annotation
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None


def describe() -> list[Setting]:
    """Return every setting with its type, default and help."""
    return [setting for key in Settings.model_fields for setting in _describe_key(key)]


def _describe_key(key: str) -> Iterator[Setting]:
    section = section_of(key)
    if section is not None:
        yield from describe_model(section, f"{key}[]." if key in LISTS else f"{key}.")
    else:
        yield setting_of(key, Settings.model_fields[key])


def redact(settings: Settings) -> dict[str, Any]:
    """Return the settings as plain values for display, without a secret among them."""
    return {key: _masked(value, key) for key, value in settings.model_dump(mode="json").items()}


def _masked(value: object, key: str) -> object:
    if isinstance(value, dict):
        return {name: _masked(each, str(name)) for name, each in value.items()}
    if isinstance(value, list):
        return [_masked(each, key) for each in value]
    if isinstance(value, str):
        return "***" if _SECRET_KEY.search(key) else _USERINFO.sub("***", value)
    return value
