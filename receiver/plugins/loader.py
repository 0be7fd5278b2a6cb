"""Finds and builds the configured handlers. Called by the service and by `flora-receiver check`."""

import asyncio
import contextlib
import importlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from importlib.metadata import entry_points
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from receiver.config import HandlerEntry, Setting, Settings, describe_model
from receiver.config.sections import Pauses
from receiver.decide import Backoff
from receiver.errors import ConfigError, HandlerLoadError, Problem, TargetUnreachableError
from receiver.handler import Checks, Closes, DescribesSchema, Handler
from receiver.model import Event, Subscription, When
from receiver.plugins.attempt import Registration
from receiver.plugins.functions import FunctionHandler, to_factory
from receiver.plugins.threads import use_threads_of

GROUP = "flora_receiver.handlers"

_CONCURRENCY = 8
_CHECK_SECONDS = 10.0
_CLOSE_SECONDS = 5.0
_ANYTHING = (Exception, SystemExit)
"""What code that is not ours may raise: a script that is named as a module ends with `sys.exit`, without a word."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """A handler ready to work, and what it listens to."""

    registration: Registration
    subscription: Subscription


def load_handlers(settings: Settings, environ: Mapping[str, str] | None = None) -> tuple[Loaded, ...]:
    """Build every configured handler, or raise ConfigError with the problems of all of them.

    `environ` is what secrets of the form `env:NAME` refer to; default: the process's own environment.
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
        except _ANYTHING as error:  # a plug-in's constructor may raise anything; the operator must see which
            problems.append(
                Problem(f"handlers.{index}", f"{entry.use} cannot be built: {type(error).__name__}: {error}")
            )
    if problems:
        raise ConfigError(problems)
    return tuple(loaded)


async def check_handlers(loaded: tuple[Loaded, ...]) -> tuple[list[Problem], list[Problem]]:
    """Return what keeps handlers from working, and what may pass by itself, as their own checks tell."""
    found = await asyncio.gather(*(_checked(each) for each in loaded))
    problems = [problem for problem, passing in found if problem is not None and not passing]
    return problems, [problem for problem, passing in found if problem is not None and passing]


async def close_handlers(loaded: tuple[Loaded, ...]) -> None:
    """Have every handler let go of what it holds; one that does not come to an end is left behind."""
    registered = [each.registration for each in loaded]
    closing = {
        asyncio.create_task(_closed(each.name, each.handler)) for each in registered if isinstance(each.handler, Closes)
    }
    if closing:
        _, left = await asyncio.wait(closing, timeout=_CLOSE_SECONDS)
        for task in left:
            task.cancel()


async def _closed(name: str, handler: Closes) -> None:
    use_threads_of(name)
    with contextlib.suppress(*_ANYTHING):
        await handler.close()


async def _checked(loaded: Loaded) -> tuple[Problem | None, bool]:
    """Return what is wrong with one handler, and whether that may pass."""
    name, handler = loaded.registration.name, loaded.registration.handler
    if not isinstance(handler, Checks):
        return None, False
    # A task of its own, so that one which swallows its cancellation is left behind, not waited for.
    task = asyncio.create_task(_trouble(name, handler))
    try:
        await asyncio.wait({task}, timeout=_CHECK_SECONDS)
    finally:
        task.cancel()
    if not task.done() or task.cancelled():
        return Problem(name, f"its check did not end within {_CHECK_SECONDS:g} s"), True
    error = task.result()
    if error is None:
        return None, False
    return Problem(name, str(error) or type(error).__name__), isinstance(error, TargetUnreachableError)


async def _trouble(name: str, handler: Checks) -> BaseException | None:
    """Return what a check raises: whatever that is, it is its answer."""
    use_threads_of(name)
    try:
        await handler.check()
    except _ANYTHING as error:
        return error
    return None


def installed_handlers() -> Sequence[str]:
    """Return the names of the installed handlers, without importing any."""
    return sorted({point.name for point in entry_points(group=GROUP)})


def options_of(use: str) -> list[Setting]:
    """Return the options of a handler, as its own `Config` describes them. Raises HandlerLoadError."""
    return describe_model(find_handler(use).Config)


def describe_schema(settings: Settings, name: str, environ: Mapping[str, str]) -> str:
    """Return the SQL of the tables that a configured handler keeps, found by its name or by its `use`.

    Raises ConfigError when its options are wrong, HandlerLoadError when there is no such handler or it has no tables.
    """
    named = [index for index, entry in enumerate(settings.handlers) if entry.name == name]
    found = named or [index for index, entry in enumerate(settings.handlers) if entry.use == name]
    if not found:
        raise HandlerLoadError(f"no configured handler is called {name!r}: its [[handlers]] entry says what to print")
    if len(found) > 1:
        names = ", ".join(str(settings.handlers[index].name) for index in found)
        raise HandlerLoadError(f"several handlers use {name!r}: say which of {names}")
    (index,) = found
    entry = settings.handlers[index]
    handler_class = find_handler(entry.use)
    if not isinstance(handler_class, DescribesSchema):
        raise HandlerLoadError(f"{entry.use} keeps no tables")
    try:
        config = handler_class.Config.model_validate(entry.options, context={"environ": environ})  # type: ignore[attr-defined]
    except ValidationError as error:
        raise ConfigError(_problems(error, index)) from error
    return handler_class.schema(config)


def mask_secrets(settings: Settings, environ: Mapping[str, str]) -> Settings:
    """Return settings for display, in which whatever a handler's `Config` types as a secret is masked, by any name."""
    return settings.model_copy(update={"handlers": tuple(_shown(entry, environ) for entry in settings.handlers)})


def _shown(entry: HandlerEntry, environ: Mapping[str, str]) -> HandlerEntry:
    config = find_handler(entry.use).Config.model_validate(entry.options, context={"environ": environ})
    plain = json.loads(json.dumps(config.model_dump(exclude_unset=True), default=str))
    return entry.model_copy(update={"options": plain})


def _load(entry: HandlerEntry, settings: Settings, environ: Mapping[str, str]) -> Loaded:
    handler_class = find_handler(entry.use)
    config = handler_class.Config.model_validate(entry.options, context={"environ": environ})
    handler = handler_class(config)
    if not isinstance(handler, Handler):
        raise HandlerLoadError(f"{entry.use} has no `handle` method")
    on: tuple[Event, ...] = entry.on or getattr(handler_class, "on", None) or (Event.SETTLED,)
    when: When = entry.when or getattr(handler_class, "when", None) or When()
    general = settings.dispatch

    def limit(name: str, otherwise: Any) -> Any:
        return getattr(entry, name) or getattr(handler_class, name, None) or otherwise

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
    return Backoff(timedelta(seconds=pauses.first_seconds), pauses.factor, timedelta(seconds=pauses.longest_seconds))


def _problems(error: ValidationError, index: int) -> list[Problem]:
    return [
        Problem(".".join(["handlers", str(index), *(str(part) for part in detail["loc"])]), _words(detail))
        for detail in error.errors(include_url=False, include_input=False, include_context=False)
    ]


def _words(detail: ErrorDetails) -> str:
    """Put pydantic's finding into the words that the settings use."""
    if detail["type"] == "extra_forbidden":
        return "is no option of this handler"
    return detail["msg"].removeprefix("Value error, ").replace("Input should be", "must be")


def find_handler(use: str) -> Any:
    """Return the class behind an entry point's name or a `package.module:Class`; for a function what makes its handler."""
    points = [point for point in entry_points(group=GROUP) if point.name == use]
    if ":" not in use and not points:
        raise HandlerLoadError(
            f"there is no handler {use!r}; installed: {', '.join(installed_handlers()) or 'none'}; "
            "your own goes as package.module:Class, or package.module:function"
        )
    try:
        if points:
            found = points[0].load()
        else:
            module_name, _, attribute = use.partition(":")
            found = getattr(importlib.import_module(module_name), attribute)
    except _ANYTHING as error:
        raise HandlerLoadError(
            f"{use} cannot be imported: {type(error).__name__}: {error}{_hint(use, error)}"
        ) from error
    return found if hasattr(found, "Config") else to_factory(found, use)


def _hint(use: str, error: BaseException) -> str:
    if isinstance(error, ModuleNotFoundError) and error.name == use.partition(":")[0].partition(".")[0]:
        return "; a module in the working directory is found by `python -m receiver`, any other has to be installed"
    return ""
