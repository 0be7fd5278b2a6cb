"""Finds and builds the configured handlers. Called by the service and by `flora-receiver check`."""

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from receiver.attempt import Registration
from receiver.config import HandlerEntry, Settings
from receiver.errors import ConfigError, HandlerLoadError, Problem
from receiver.handler import Handler
from receiver.model import Event, Subscription, When

GROUP = "flora_receiver.handlers"


@dataclass(frozen=True, slots=True)
class Loaded:
    """A handler ready to work, and what it listens to."""

    registration: Registration
    subscription: Subscription


def load_handlers(settings: Settings) -> tuple[Loaded, ...]:
    """Build every configured handler, or raise ConfigError with the problems of all of them."""
    loaded: list[Loaded] = []
    problems: list[Problem] = []
    for index, entry in enumerate(settings.handlers):
        try:
            loaded.append(_load(entry, settings))
        except HandlerLoadError as error:
            problems.append(Problem(f"handlers.{index}.use", str(error)))
        except ValidationError as error:
            problems += [
                Problem(".".join(["handlers", str(index), *(str(part) for part in detail["loc"])]), _words(detail))
                for detail in error.errors(include_url=False, include_input=False, include_context=False)
            ]
        except Exception as error:  # noqa: BLE001 -- a plug-in's constructor may raise anything; the operator must see which
            problems.append(
                Problem(f"handlers.{index}", f"{entry.use} cannot be built: {type(error).__name__}: {error}")
            )
    if problems:
        raise ConfigError(problems)
    return tuple(loaded)


def available() -> Sequence[str]:
    """Return the names of the installed handlers, without importing any."""
    return sorted({point.name for point in entry_points(group=GROUP)})


def _load(entry: HandlerEntry, settings: Settings) -> Loaded:
    handler_class = _find(entry.use)
    config = handler_class.Config.model_validate(entry.options)
    handler = handler_class(config)
    if not isinstance(handler, Handler):
        raise HandlerLoadError(f"{entry.use} has no `handle` method")
    on: tuple[Event, ...] = entry.on or getattr(handler_class, "on", None) or (Event.SETTLED,)
    when: When = entry.when or getattr(handler_class, "when", None) or When()
    return Loaded(
        Registration(
            entry.name,
            handler,
            max_attempts=entry.max_attempts or settings.dispatch.max_attempts,
            timeout_seconds=entry.timeout_seconds or settings.dispatch.timeout_seconds,
            concurrency=min(entry.concurrency, settings.dispatch.concurrency),
        ),
        Subscription(entry.name, on, when),
    )


def _words(detail: ErrorDetails) -> str:
    """Put pydantic's finding into the words that the settings use."""
    if detail["type"] == "extra_forbidden":
        return "is no option of this handler"
    return detail["msg"].removeprefix("Value error, ").replace("Input should be", "must be")


def _find(use: str) -> Any:
    """Return the class behind an entry point's name or a `package.module:Class`."""
    points = [point for point in entry_points(group=GROUP) if point.name == use]
    if ":" not in use and not points:
        raise HandlerLoadError(
            f"there is no handler {use!r}; installed: {', '.join(available()) or 'none'}; "
            "your own goes as package.module:Class"
        )
    try:
        if points:
            found = points[0].load()
        else:
            module_name, _, attribute = use.partition(":")
            found = getattr(importlib.import_module(module_name), attribute)
    except Exception as error:
        raise HandlerLoadError(f"{use} cannot be imported: {type(error).__name__}: {error}") from error
    if not hasattr(found, "Config"):
        raise HandlerLoadError(f"{use} is not a handler: it has no Config (see receiver.handler)")
    return found
