"""`Settings`, the model of everything that can be set, with `describe` for documents and `redact`.

Built by `load_settings`; each part of the service gets the sections that it needs.
"""

from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Annotated, Any, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    Field,
    PrivateAttr,
    SecretStr,
    model_validator,
)

from receiver.config.callback_url import CALLBACK_PATH, remove_callback_path
from receiver.config.reference import Setting, describe_field, describe_model
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
from receiver.net.database_url import show_database_url
from receiver.net.scrubber import MASK, is_secret_name, mask

__all__ = ["LISTS", "Setting", "Settings", "describe", "redact", "section_of"]

LISTS: Mapping[str, type[BaseModel]] = MappingProxyType({"workspaces": Workspace, "handlers": HandlerEntry})
"""The settings that are lists of tables."""

_KNOWN_WORDS = {
    "output_type": [each.value for each in OutputType],
    "run_type": ["generation", "technique", "action"],
}
_LAST_RETRY_SECONDS = 400
"""From signing to FLORA's last retry: pauses of 10 s, 60 s and 300 s, and three time-outs."""


def _check_names(handlers: tuple[HandlerEntry, ...]) -> tuple[HandlerEntry, ...]:
    names = [handler.name for handler in handlers]
    if duplicates := sorted({name for name in names if names.count(name) > 1}):
        listed = ", ".join(duplicates)
        raise ValueError(f"two handlers are called {listed}; give each a `name` of its own")
    return handlers


def _check_workspaces(workspaces: tuple[Workspace, ...]) -> tuple[Workspace, ...]:
    if len({workspace.id for workspace in workspaces}) < len(workspaces):
        raise ValueError("two workspaces have the same `id`")
    secrets = [each.get_secret_value() for workspace in workspaces for each in workspace.secrets]
    if len(set(secrets)) < len(secrets):
        raise ValueError("two workspaces have the same secret, so their callbacks look alike")
    return workspaces


def _default_handlers(handlers: object) -> object:
    return handlers or [{"use": "storage", "options": {"url": "outputs"}}, {"use": "log"}]


class Settings(Section):
    """Everything that can be set."""

    public_url: HttpUrl | None = Field(
        None,
        description="The URL that FLORA calls; `/callbacks/flora` is added if it lacks it. Public HTTPS.",
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
    workspaces: Annotated[tuple[Workspace, ...], AfterValidator(_check_workspaces)] = ()
    handlers: Annotated[
        tuple[HandlerEntry, ...], AfterValidator(_check_names), BeforeValidator(_default_handlers)
    ] = Field((), validate_default=True)

    _has_callback_path: bool = PrivateAttr(default=False)
    """Whether `public_url` was given with the callback path, which is taken off."""

    @model_validator(mode="after")
    def _remove_callback_path(self) -> Self:
        given = self.public_url
        if given is not None and (url := remove_callback_path(given)) != given:
            object.__setattr__(self, "public_url", url)  # frozen, but not handed out yet
            self._has_callback_path = True
        return self

    def secrets_by_workspace(self) -> tuple[tuple[str, str | None], ...]:
        """Return every signing secret with its workspace (None: any), in the order to try them."""
        shared = {secret.get_secret_value(): None for secret in self.flora.webhook_secrets}
        owned = {
            secret.get_secret_value(): workspace.id
            for workspace in self.workspaces
            for secret in workspace.secrets
        }
        return tuple({**shared, **owned}.items())

    def api_key_for(self, workspace_id: str | None) -> str | None:
        """Return the API key that reads runs of this workspace, if there is one."""
        own = next((each.api_key for each in self.workspaces if each.id == workspace_id), None)
        key = own or self.flora.api_key
        return key.get_secret_value() if key else None

    def find_warnings(self) -> list[Problem]:
        """Return what is allowed but probably a mistake."""
        found = [
            Problem(path, f"does not start with {prefix}; check that this is the right value")
            for path, prefix, secret in self._prefixed_secrets()
            if not secret.get_secret_value().startswith(prefix)
        ]
        tolerance = self.flora.tolerance_past_seconds
        if tolerance is not None and tolerance < _LAST_RETRY_SECONDS:
            message = f"refuses FLORA's last retry, up to {_LAST_RETRY_SECONDS} s after signing"
            found.append(Problem("flora.tolerance_past_seconds", message))
        if self._has_callback_path:
            message = f"ends with {CALLBACK_PATH}, which is added by itself: FLORA is given {self.public_url}{CALLBACK_PATH}"
            found.append(Problem("public_url", message))
        return [*found, *self._filter_warnings(), *self._wait_warnings()]

    def _prefixed_secrets(self) -> Iterator[tuple[str, str, SecretStr]]:
        """Yield each key and secret with its path and the prefix that FLORA gives it."""
        if self.flora.api_key:
            yield "flora.api_key", "sk_", self.flora.api_key
        for index, secret in enumerate(self.flora.webhook_secrets):
            yield f"flora.webhook_secrets.{index}", "whsec_", secret
        for index, workspace in enumerate(self.workspaces):
            for number, secret in enumerate(workspace.secrets):
                yield f"workspaces.{index}.secrets.{number}", "whsec_", secret
            if workspace.api_key:
                yield f"workspaces.{index}.api_key", "sk_", workspace.api_key

    def _filter_warnings(self) -> Iterator[Problem]:
        """Find filters that match nothing. FLORA may add words, so an unknown one is no error."""
        for index, entry in enumerate(self.handlers):
            if entry.when is None:
                continue
            filters = {"output_type": entry.when.output_type, "run_type": entry.when.run_type}
            for name, words in filters.items():
                for word in sorted(set(words or ()) - set(_KNOWN_WORDS[name])):
                    known = ", ".join(_KNOWN_WORDS[name])
                    path = f"handlers.{index}.when.{name}"
                    yield Problem(path, f"{word!r} is not a known value; known are {known}")

    def _wait_warnings(self) -> Iterator[Problem]:
        """Find handlers that wait for a handler which does not exist."""
        names = {entry.name for entry in self.handlers}
        for index, entry in enumerate(self.handlers):
            wait_for = entry.options.get("wait_for")
            for name in wait_for if isinstance(wait_for, list | tuple) else ():
                if name not in names - {entry.name}:
                    message = f"no other handler is called {name!r}, so this one would wait forever"
                    yield Problem(f"handlers.{index}.wait_for", message)


def section_of(key: str) -> type[BaseModel] | None:
    """Return the model of a table, or of the tables in a list; None if `key` is a plain value."""
    annotation: Any = LISTS.get(key) or Settings.model_fields[key].annotation
    is_model = isinstance(annotation, type) and issubclass(annotation, BaseModel)
    return annotation if is_model else None


def describe() -> list[Setting]:
    """Return every setting with its type, default and help."""
    return [setting for key in Settings.model_fields for setting in _describe_key(key)]


def _describe_key(key: str) -> Iterator[Setting]:
    section = section_of(key)
    if section is not None:
        yield from describe_model(section, f"{key}[]." if key in LISTS else f"{key}.")
    else:
        yield describe_field(key, Settings.model_fields[key])


def redact(settings: Settings) -> dict[str, Any]:
    """Return the settings as plain values for display, with secrets replaced by `***`."""
    shown: dict[str, Any] = {
        key: _mask(value, key) for key, value in settings.model_dump(mode="json").items()
    }
    for name in ("url", "listen_url"):
        url = getattr(settings.database, name)
        shown["database"][name] = None if url is None else show_database_url(url)
    return shown


def _mask(value: object, key: str) -> object:
    if isinstance(value, dict):
        return {name: _mask(each, str(name)) for name, each in value.items()}
    if isinstance(value, list):
        return [_mask(each, key) for each in value]
    if isinstance(value, str):
        return MASK if is_secret_name(key) else mask(value)
    return value
