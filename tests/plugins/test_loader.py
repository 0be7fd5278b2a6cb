"""Loading handlers: every problem at once, each with its path, and no handler runs unconfigured."""

import asyncio
import contextlib
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any, ClassVar

import pytest
from pydantic import BaseModel, ConfigDict, ValidationError

from receiver.config import Settings
from receiver.decide import Backoff
from receiver.errors import ConfigError, Problem
from receiver.handler import (
    Answer,
    Context,
    Done,
    Secret,
    SettledRun,
    TargetDegradedError,
    TargetUnreachableError,
    needs,
)
from receiver.model import Event, When
from receiver.plugins import loader as plugins
from receiver.plugins.loader import (
    CheckWarning,
    check_handlers,
    close_handlers,
    installed_handlers,
    load_handlers,
)

HERE = __name__


class Options(BaseModel):
    model_config = ConfigDict(extra="forbid")
    size: int = 1


class Plain:
    """A handler without defaults of its own."""

    Config: ClassVar[type[BaseModel]] = Options

    def __init__(self, config: Options) -> None:
        self.config = config

    async def handle(self, run: SettledRun, context: Context) -> Answer:
        return Done()


class Opinionated(Plain):
    on: ClassVar[tuple[Event, ...]] = (Event.LOST, Event.DEAD)
    when: ClassVar[When] = When(status=("failed",))


class Extravagant(Plain):
    """Needs a library that is not installed."""

    def __init__(self, config: Options) -> None:
        super().__init__(config)
        with needs("some-plugin[extra]"):
            __import__("a_library_that_does_not_exist")


class Modest(Plain):
    """Sets its own limits, and checks a target that does not respond."""

    max_attempts = 3
    timeout_seconds = 5.0
    concurrency = 1

    async def check(self) -> None:
        raise TargetUnreachableError("no response from 127.0.0.1:9")


class Broken(Plain):
    async def check(self) -> None:
        raise PermissionError("no right to write")


class Flawed(Plain):
    async def check(self) -> None:
        raise TargetDegradedError("an object is left there")


class Secretive(Plain):
    class Config(BaseModel):
        token: Secret


class NoConfig:
    """A handler without options."""

    on: ClassVar[tuple[Event, ...]] = (Event.LOST,)
    max_attempts = 3

    async def handle(self, run: SettledRun, context: Context) -> Answer:
        return Done()


class EmptyOptions(NoConfig):
    """One that takes the empty options all the same."""

    def __init__(self, config: BaseModel) -> None:
        self.config = config


class Nothing:
    """Has neither a Config nor a handle."""


class OtherConfig(NoConfig):
    class Config:
        """Is no pydantic model."""


BUILT = NoConfig()
NUMBER = 5


class NoHandle:
    Config: ClassVar[type[BaseModel]] = Options

    def __init__(self, config: Options) -> None:
        pass


class Explosive(Plain):
    def __init__(self, config: Options) -> None:
        raise RuntimeError("boom")


class Exiting(Plain):
    def __init__(self, config: Options) -> None:
        sys.exit("bye")


class Leaving(Plain):
    async def check(self) -> None:
        sys.exit("gone")


def settings(*handlers: dict[str, Any], **more: Any) -> Settings:
    return Settings.model_validate({"handlers": list(handlers), **more})


def entry(name: str, **more: Any) -> dict[str, Any]:
    return {"use": f"{HERE}:{name}", "name": name.lower(), **more}


def test_loads_by_entry_point_and_by_path() -> None:
    """The shipped ones by name, your own as package.module:Class; each gets its own options."""
    log, plain = load_handlers(settings({"use": "log"}, entry("Plain", options={"size": 3})))
    assert (log.registration.name, log.subscription.handler) == ("log", "log")
    assert isinstance(plain.registration.handler, Plain)
    assert plain.registration.handler.config.size == 3
    assert plain.subscription.on == (Event.SETTLED,)
    assert plain.subscription.when == When()


def test_names_of_the_installed_handlers() -> None:
    assert {"log", "storage"} <= set(installed_handlers())


def test_a_class_sets_defaults_and_the_settings_override_them() -> None:
    own, changed = load_handlers(
        settings(
            entry("Opinionated"),
            {**entry("Opinionated", on=["settled"], when={"status": ["completed"]}), "name": "b"},
        )
    )
    assert (own.subscription.on, own.subscription.when.status) == ((Event.LOST, Event.DEAD), ("failed",))
    assert (changed.subscription.on, changed.subscription.when.status) == ((Event.SETTLED,), ("completed",))


def test_limits_come_from_the_entry_then_from_the_section() -> None:
    own, general = load_handlers(
        settings(
            entry("Plain", max_attempts=2, timeout_seconds=5, concurrency=3),
            {**entry("Plain"), "name": "b"},
            dispatch={"max_attempts": 7, "timeout_seconds": 70},
        )
    )
    first, second = own.registration, general.registration
    assert (first.max_attempts, first.timeout_seconds, first.concurrency) == (2, 5, 3)
    assert (second.max_attempts, second.timeout_seconds) == (7, 70)


@pytest.mark.parametrize(
    ("handler", "path", "words"),
    [
        ({"use": "nonsense"}, "handlers.0.use", "no handler 'nonsense'"),
        ({"use": "no.such.module:Class", "name": "x"}, "handlers.0.use", "cannot be imported"),
        ({"use": f"{HERE}:Absent", "name": "x"}, "handlers.0.use", "cannot be imported"),
        (entry("Nothing"), "handlers.0.use", "is a class without a `handle` method"),
        (entry("OtherConfig"), "handlers.0.use", "has a Config that is no pydantic model"),
        (entry("BUILT"), "handlers.0.use", "is a handler that is built already: name its class"),
        (entry("NUMBER"), "handlers.0.use", "is of type int, and no handler"),
        (entry("sys"), "handlers.0.use", "is a module, and no handler"),
        (entry("NoConfig", options={"size": 1}), "handlers.0.size", "no option"),
        (entry("NoHandle"), "handlers.0.use", "no `handle` method"),
        (entry("Explosive"), "handlers.0", "boom"),
        (entry("Plain", options={"size": "big"}), "handlers.0.size", "integer"),
        (entry("Plain", options={"sise": 1}), "handlers.0.sise", "no option"),
    ],
)
def test_a_problem_has_the_path_of_its_entry(handler: dict[str, Any], path: str, words: str) -> None:
    """Whatever a plug-in does, the problem names the entry in the file."""
    with pytest.raises(ConfigError) as caught:
        load_handlers(settings(handler))
    (problem,) = caught.value.problems
    assert problem.path == path
    assert words in problem.message


def test_a_class_without_options_needs_no_config() -> None:
    """Its `on` and its limits hold as those of any other class."""
    first, second = load_handlers(settings(entry("NoConfig"), entry("EmptyOptions")))
    assert isinstance(first.registration.handler, NoConfig)
    assert isinstance(second.registration.handler, EmptyOptions)
    assert (first.subscription.on, first.registration.max_attempts) == ((Event.LOST,), 3)
    assert plugins.options_of(f"{HERE}:NoConfig") == []


def test_every_problem_is_reported_at_once() -> None:
    """All problems of a file are reported at once."""
    with pytest.raises(ConfigError) as caught:
        load_handlers(settings({"use": "nonsense"}, entry("Plain"), entry("Explosive"), entry("Nothing")))
    assert [problem.path for problem in caught.value.problems] == [
        "handlers.0.use",
        "handlers.2",
        "handlers.3.use",
    ]


def test_a_value_is_never_repeated_in_a_problem() -> None:
    """An option may be a secret."""
    with pytest.raises(ConfigError) as caught:
        load_handlers(settings(entry("Plain", options={"size": "whsec_very_secret"})))
    assert "whsec_very_secret" not in str(caught.value)


def test_a_module_that_exits_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module that calls `sys.exit` when it is imported is a reported problem."""
    (tmp_path / "a_script_that_exits.py").write_text("import sys\nsys.exit(3)\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError) as caught:
        load_handlers(settings({"use": "a_script_that_exits:main"}, entry("Exiting")))
    assert [problem.message for problem in caught.value.problems] == [
        "a_script_that_exits:main cannot be imported: SystemExit: 3",
        f"{HERE}:Exiting cannot be built: SystemExit: bye",
    ]


def test_a_module_that_is_not_found_gets_a_hint() -> None:
    """A module that is not found gets a hint at the working directory.

    A missing import inside a module does not.
    """
    with pytest.raises(ConfigError) as caught:
        load_handlers(settings({"use": "my_sums:announce"}))
    assert "`python -m receiver` finds a module" in str(caught.value)
    with pytest.raises(ConfigError) as caught:
        load_handlers(settings({"use": "tests.no_such_module:announce"}))
    assert "`python -m receiver` finds" not in str(caught.value)


def test_a_missing_extra_is_reported_with_its_fix() -> None:
    """Before the first run: which library is missing, and what to install."""
    with pytest.raises(ConfigError) as caught:
        load_handlers(settings(entry("Extravagant")))
    [problem] = caught.value.problems
    assert problem.path == "handlers.0.use"
    assert "a_library_that_does_not_exist" in problem.message
    assert "pip install 'some-plugin[extra]'" in problem.message


def test_a_class_may_set_its_own_limits() -> None:
    """The settings of its entry come first, then its own, then those of [dispatch]."""
    own, changed = load_handlers(
        settings(entry("Modest"), {**entry("Modest", max_attempts=7), "name": "b"})
    )
    first, second = own.registration, changed.registration
    assert (first.max_attempts, first.timeout_seconds, first.concurrency) == (3, 5.0, 1)
    assert (second.max_attempts, second.timeout_seconds) == (7, 5.0)


def test_pauses_between_attempts_are_set_for_each_handler() -> None:
    """A value that is not set keeps its default."""
    usual, own = load_handlers(
        settings(
            entry("Plain"), {**entry("Plain", backoff={"first_seconds": 60, "factor": 1}), "name": "b"}
        )
    )
    assert usual.registration.backoff == Backoff(timedelta(seconds=1), 2.0, timedelta(minutes=30))
    assert own.registration.backoff == Backoff(timedelta(seconds=60), 1.0, timedelta(minutes=30))
    with pytest.raises(ValidationError, match="must not be greater"):
        settings(entry("Plain", backoff={"first_seconds": 7200}))


async def test_checks_separate_problems_from_warnings() -> None:
    """A target that does not respond is a warning: it may recover before it is needed."""
    entries = (entry(name) for name in ("Plain", "Modest", "Broken", "Leaving", "Flawed"))
    problems, warnings = await check_handlers(load_handlers(settings(*entries)))
    assert problems == [Problem("broken", "no right to write"), Problem("leaving", "gone")]
    assert warnings == [
        CheckWarning("modest", "no response from 127.0.0.1:9", "handler.unreachable"),
        CheckWarning("flawed", "an object is left there", "handler.degraded"),
    ]


class Stubborn(Plain):
    """Its check ignores its cancellation once, and ends when it is released."""

    free: ClassVar[asyncio.Event]

    async def check(self) -> None:
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.Event().wait()
        await self.free.wait()


async def test_a_check_that_does_not_end_delays_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A check that hangs is a warning, even if it ignores its cancellation."""
    monkeypatch.setattr(plugins, "_CHECK_SECONDS", 0.01)
    Stubborn.free = asyncio.Event()
    problems, warnings = await check_handlers(load_handlers(settings(entry("Stubborn"), entry("Broken"))))
    assert problems == [Problem("broken", "no right to write")]
    assert warnings == [
        CheckWarning("stubborn", "its check did not end within 0.01 s", "handler.unreachable")
    ]
    Stubborn.free.set()


class Closing(Plain):
    """Closes as configured: in order, with an error, by ending the process, or never."""

    closed: ClassVar[list[str]] = []

    async def close(self) -> None:
        match self.config.size:
            case 1:
                raise RuntimeError("boom")
            case 2:
                sys.exit(1)
            case 3:
                await asyncio.Event().wait()
            case _:
                pass
        self.closed.append(f"{self.config.size}")


async def test_closing_ends_whatever_a_handler_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """A handler that does not close delays the service only briefly; all others are closed."""
    monkeypatch.setattr(plugins, "_CLOSE_SECONDS", 0.01)
    names = ("a", "b", "c", "d", "e")
    entries = [
        entry("Closing", options={"size": size}) | {"name": name} for size, name in enumerate(names, 1)
    ]
    Closing.closed.clear()
    await close_handlers(load_handlers(settings(*entries, entry("Plain"))))
    assert sorted(Closing.closed) == ["4", "5"]
    await close_handlers(())


def test_a_secret_may_stand_in_the_environment(tmp_path: Path) -> None:
    """As in all settings: `env:NAME` or `file:/path`; it is never shown."""
    kept = tmp_path / "token"
    kept.write_text("from a file\n")
    first, second = load_handlers(
        settings(
            entry("Secretive", options={"token": "env:TOKEN"}),
            {**entry("Secretive", options={"token": f"file:{kept}"}), "name": "b"},
        ),
        {"TOKEN": "from the environment"},
    )
    handlers: list[Any] = [each.registration.handler for each in (first, second)]
    tokens = [handler.config.token for handler in handlers]
    assert [token.get_secret_value() for token in tokens] == ["from the environment", "from a file"]
    assert "from" not in repr(tokens)
    with pytest.raises(ConfigError, match="TOKEN is not set"):
        load_handlers(settings(entry("Secretive", options={"token": "env:TOKEN"})), {})
