"""Finds, builds, checks and closes the configured handlers.

Called by the service and by `flora-receiver check`, `doctor` and `handlers`.
"""

import asyncio
import contextlib
import importlib
import inspect
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from importlib.metadata import entry_points
from typing import Any, ClassVar, NoReturn

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from receiver.config import HandlerEntry, Setting, Settings, describe_model
from receiver.config.sections import Pauses
from receiver.decide import Backoff
from receiver.errors import (
    ConfigError,
    HandlerLoadError,
    Problem,
    TargetDegradedError,
    TargetUnreachableError,
)
from receiver.handler import Checks, Closes, DescribesSchema
from receiver.model import Event, Subscription, When
from receiver.plugins.attempt import Registration
from receiver.plugins.functions import FunctionHandler, NoOptions, to_factory
from receiver.plugins.threads import use_threads_of

GROUP = "flora_receiver.handlers"

_CONCURRENCY = 8
_CHECK_SECONDS = 10.0
_CLOSE_SECONDS = 5.0
_PLUGIN_ERRORS = (Exception, SystemExit)
"""What plug-in code may raise: a script that is imported as a module may end with `sys.exit`."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """A handler that is ready for use, and the events that it subscribes to."""

    registration: Registration
    subscription: Subscription


def load_handlers(settings: Settings, environ: Mapping[str, str] | None = None) -> tuple[Loaded, ...]:
    """Build every configured handler. Raises ConfigError with the problems of all of them.

    Secrets of the form `env:NAME` are read from `environ`, by default that of the process.
    """
    loaded: list[Loaded] = []
    problems: list[Problem] = []
    for index, entry in enumerate(settings.handlers):
        try:
            loaded.append(_load(entry, settings, os.environ if environ is None else environ))
        except HandlerLoadError as error:
            problems.append(Problem(f"handlers.{index}.use", str(error)))
        except ValidationError as error:
            problems += _problems(error, index)
        except _PLUGIN_ERRORS as error:
            reason = f"{type(error).__name__}: {error}"
            problems.append(Problem(f"handlers.{index}", f"{entry.use} cannot be built: {reason}"))
    if problems:
        raise ConfigError(problems)
    return tuple(loaded)


@dataclass(frozen=True, slots=True)
class CheckWarning(Problem):
    """A finding of a handler's check that does not keep the service from starting."""

    event: str
    """`handler.unreachable`, which may pass by itself, or `handler.degraded`."""


async def check_handlers(loaded: tuple[Loaded, ...]) -> tuple[list[Problem], list[CheckWarning]]:
    """Run the handlers' own checks; return their problems and their warnings."""
    found = [each for each in await asyncio.gather(*map(_check, loaded)) if each is not None]
    warnings = [each for each in found if isinstance(each, CheckWarning)]
    return [each for each in found if not isinstance(each, CheckWarning)], warnings


async def close_handlers(loaded: tuple[Loaded, ...]) -> None:
    """Close every handler; one that does not return within five seconds is abandoned."""
    registered = [each.registration for each in loaded]
    closing = {
        asyncio.create_task(_close(each.name, each.handler))
        for each in registered
        if isinstance(each.handler, Closes)
    }
    if closing:
        _, pending = await asyncio.wait(closing, timeout=_CLOSE_SECONDS)
        for task in pending:
            task.cancel()


async def _close(name: str, handler: Closes) -> None:
    use_threads_of(name)
    with contextlib.suppress(*_PLUGIN_ERRORS):
        await handler.close()


async def _check(loaded: Loaded) -> Problem | None:
    name, handler = loaded.registration.name, loaded.registration.handler
    if not isinstance(handler, Checks):
        return None
    # A task of its own: a check that ignores its cancellation is abandoned, not waited for.
    task = asyncio.create_task(_run_check(name, handler))
    try:
        await asyncio.wait({task}, timeout=_CHECK_SECONDS)
    finally:
        task.cancel()
    if not task.done() or task.cancelled():
        message = f"its check did not end within {_CHECK_SECONDS:g} s"
        return CheckWarning(name, message, "handler.unreachable")
    error = task.result()
    match error:
        case None:
            return None
        case TargetUnreachableError():
            return CheckWarning(name, _message(error), "handler.unreachable")
        case TargetDegradedError():
            return CheckWarning(name, _message(error), "handler.degraded")
        case _:
            return Problem(name, _message(error))


def _message(error: BaseException) -> str:
    return str(error) or type(error).__name__


async def _run_check(name: str, handler: Checks) -> BaseException | None:
    """Return the exception that a check raises, or None."""
    use_threads_of(name)
    try:
        await handler.check()
    except _PLUGIN_ERRORS as error:
        return error
    return None


def installed_handlers() -> Sequence[str]:
    """Return the names of the installed handlers; none is imported."""
    return sorted({point.name for point in entry_points(group=GROUP)})


def find_broken_handlers() -> dict[str, str]:
    """Return why an installed handler cannot be imported, for each of which that is true."""
    broken = {}
    for name in installed_handlers():
        try:
            find_handler(name)
        except HandlerLoadError as error:
            broken[name] = str(error)
    return broken


def options_of(use: str) -> list[Setting]:
    """Return the options in a handler's `Config`. Raises HandlerLoadError."""
    return describe_model(find_handler(use).Config)


def describe_schema(settings: Settings, name: str, environ: Mapping[str, str]) -> str:
    """Return the SQL of a configured handler's tables; `name` is its name or its `use`.

    Raises ConfigError where its options are wrong, HandlerLoadError where there is no such handler
    or it has no tables.
    """
    named = [index for index, entry in enumerate(settings.handlers) if entry.name == name]
    found = named or [index for index, entry in enumerate(settings.handlers) if entry.use == name]
    if not found:
        raise HandlerLoadError(
            f"no configured handler is called {name!r}: its tables follow from its [[handlers]] entry"
        )
    if len(found) > 1:
        names = ", ".join(str(settings.handlers[index].name) for index in found)
        raise HandlerLoadError(f"several handlers use {name!r}: say which of {names}")
    (index,) = found
    entry = settings.handlers[index]
    handler_class = find_handler(entry.use)
    config_class = handler_class.Config
    if not isinstance(handler_class, DescribesSchema):
        raise HandlerLoadError(f"{entry.use} keeps no tables")
    try:
        config = config_class.model_validate(entry.options, context={"environ": environ})
    except ValidationError as error:
        raise ConfigError(_problems(error, index)) from error
    return handler_class.schema(config)


def mask_secrets(settings: Settings, environ: Mapping[str, str]) -> Settings:
    """Return settings for display: options of handlers that hold secrets are masked."""
    handlers = tuple(_mask_options(entry, environ) for entry in settings.handlers)
    return settings.model_copy(update={"handlers": handlers})


def _mask_options(entry: HandlerEntry, environ: Mapping[str, str]) -> HandlerEntry:
    config = find_handler(entry.use).Config.model_validate(entry.options, context={"environ": environ})
    plain = json.loads(json.dumps(config.model_dump(exclude_unset=True), default=str))
    return entry.model_copy(update={"options": plain})


def _load(entry: HandlerEntry, settings: Settings, environ: Mapping[str, str]) -> Loaded:
    handler_class = find_handler(entry.use)
    config = handler_class.Config.model_validate(entry.options, context={"environ": environ})
    handler = handler_class(config)
    if not _has_handle(handler):
        raise HandlerLoadError(f"{entry.use} has no `handle` method")
    on: tuple[Event, ...] = entry.on or getattr(handler_class, "on", None) or (Event.SETTLED,)
    when: When = entry.when or getattr(handler_class, "when", None) or When()
    general = settings.dispatch

    def limit(name: str, default: Any) -> Any:
        return getattr(entry, name) or getattr(handler_class, name, None) or default

    concurrency = min(limit("concurrency", _CONCURRENCY), general.concurrency)
    if isinstance(handler, FunctionHandler):
        handler.threads = concurrency
    return Loaded(
        Registration(
            entry.name,
            handler,
            max_attempts=limit("max_attempts", general.max_attempts),
            timeout_seconds=limit("timeout_seconds", general.timeout_seconds),
            concurrency=concurrency,
            backoff=_backoff(entry),
        ),
        Subscription(entry.name, on, when),
    )


def _backoff(entry: HandlerEntry) -> Backoff:
    pauses = entry.backoff or Pauses()
    return Backoff(
        timedelta(seconds=pauses.first_seconds), pauses.factor, timedelta(seconds=pauses.longest_seconds)
    )


def _problems(error: ValidationError, index: int) -> list[Problem]:
    return [
        Problem(
            ".".join(["handlers", str(index), *(str(part) for part in detail["loc"])]),
            _to_message(detail),
        )
        for detail in error.errors(include_url=False, include_input=False, include_context=False)
    ]


def _to_message(detail: ErrorDetails) -> str:
    """Return a validation error in the words that problems of other settings use."""
    if detail["type"] == "extra_forbidden":
        return "is no option of this handler"
    return detail["msg"].removeprefix("Value error, ").replace("Input should be", "must be")


def find_handler(use: str) -> Any:
    """Return the handler class, or a function's factory, for `use`.

    `use` is the name of an entry point, `package.module:Class` or `package.module:function`. Raises
    HandlerLoadError.
    """
    points = [point for point in entry_points(group=GROUP) if point.name == use]
    if ":" not in use and not points:
        raise HandlerLoadError(
            f"there is no handler {use!r}; installed: {', '.join(installed_handlers()) or 'none'}; "
            "name your own as package.module:Class or package.module:function"
        )
    try:
        if points:
            found = points[0].load()
        else:
            module_name, _, attribute = use.partition(":")
            found = getattr(importlib.import_module(module_name), attribute)
    except _PLUGIN_ERRORS as error:
        raise HandlerLoadError(
            f"{use} cannot be imported: {type(error).__name__}: {error}{_hint(use, error)}"
        ) from error
    return _to_handler_class(found, use)


def _to_handler_class(found: Any, use: str) -> Any:
    """Return what stands for a handler class: it has a `Config`, and calling it makes a handler."""
    config = getattr(found, "Config", None)
    if config is not None:
        if inspect.isclass(config) and issubclass(config, BaseModel):
            return found if inspect.isclass(found) or not _has_handle(found) else _refuse_instance(use)
        raise HandlerLoadError(
            f"{use} has a Config that is no pydantic model: derive it from pydantic.BaseModel"
        )
    if inspect.isclass(found):
        if not _has_handle(found):
            raise HandlerLoadError(f"{use} is a class without a `handle` method")
        return OptionlessClass(found)
    return _refuse_instance(use) if _has_handle(found) else to_factory(found, use)


def _has_handle(found: object) -> bool:
    return callable(getattr(found, "handle", None))


def _refuse_instance(use: str) -> NoReturn:
    raise HandlerLoadError(
        f"{use} is a handler that is built already: name its class, so that each entry gets its own"
    )


class OptionlessClass:
    """Stands in for a handler class without a `Config`: it has no options."""

    Config: ClassVar[type[BaseModel]] = NoOptions

    def __init__(self, handler_class: Any) -> None:
        self._handler_class = handler_class
        self.__doc__ = inspect.getdoc(handler_class)

    def __getattr__(self, name: str) -> Any:
        """Return an attribute of the class: its `on`, its `when`, its limits."""
        return getattr(self._handler_class, name)

    def __call__(self, config: BaseModel) -> Any:
        """Build the handler, with the empty options if it takes any."""
        try:
            inspect.signature(self._handler_class).bind(config)
        except (TypeError, ValueError):
            return self._handler_class()
        return self._handler_class(config)


def _hint(use: str, error: BaseException) -> str:
    if isinstance(error, ModuleNotFoundError) and error.name == use.partition(":")[0].partition(".")[0]:
        return (
            "; `python -m receiver` finds a module in the working directory, any other has to be installed"
        )
    return ""
