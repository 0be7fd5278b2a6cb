"""Loads the settings of a running process again, and says which changes need a restart.

Called by the service. `loader.py` has the rules; a load that fails changes nothing.
"""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from receiver.config.environment import find_file, read_text
from receiver.config.loader import load_settings
from receiver.config.settings import LISTS, Settings

__all__ = ["RELOADABLE", "SettingsSource", "find_changes", "take_over"]

RELOADABLE = (
    "flora.api_key",
    "flora.webhook_secrets",
    "workspaces",
    "operations.token",
    "tls.cert",
    "tls.key",
    "log.level",
)
"""The settings that a running service takes over; all others need a restart."""


class SettingsSource:
    """Where the settings of a running process come from: they can be loaded again.

    The files of single values (`*_FILE`, `file:…`) are read at each load. The TOML file is edited
    by hand, in several steps: it is read again on request only.
    """

    def __init__(
        self,
        path: Path | None,
        environ: Mapping[str, str],
        *,
        adjust: Callable[[Settings], Settings] = lambda settings: settings,
    ) -> None:
        """`adjust` applies what the command line sets. A file that is found now must be there later."""
        self._path = find_file(path, environ)
        self._environ = dict(environ)
        self._adjust = adjust
        self._text: str | None = None

    def load(self, *, reread: bool = True) -> Settings:
        """Return the settings as they are now. Raises ConfigError, and then remembers nothing.

        `reread=False` takes the TOML file as it was at the last load that succeeded.
        """
        text = self._text

        def read(path: Path) -> str:
            nonlocal text
            if text is None or reread:
                text = read_text(path)
            return text

        settings = self._adjust(load_settings(self._path, self._environ, read=read))
        self._text = text
        return settings


def take_over(running: Settings, new: Settings) -> Settings:
    """Return the running settings with what may change while the service runs taken from `new`.

    Neither has TLS turned on or off: listeners keep the protocol that they were opened with.
    """
    flora = {name: getattr(new.flora, name) for name in ("api_key", "webhook_secrets")}
    has_tls = running.tls.cert is not None and new.tls.cert is not None
    return running.model_copy(
        update={
            "flora": running.flora.model_copy(update=flora),
            "workspaces": new.workspaces,
            "operations": running.operations.model_copy(update={"token": new.operations.token}),
            "tls": new.tls if has_tls else running.tls,
            "log": running.log.model_copy(update={"level": new.log.level}),
        }
    )


def find_changes(old: Settings, new: Settings) -> tuple[str, ...]:
    """Return the dotted paths of the settings that differ, never their values.

    Of lists of tables the path ends with the number of the table if there are as many as before.
    """
    return tuple(_differences("", old.model_dump(), new.model_dump()))


def _differences(path: str, old: Any, new: Any) -> Iterator[str]:
    if old == new:
        return
    if isinstance(old, dict) and isinstance(new, dict):
        for name in sorted({*old, *new}):
            # Options stand in the table of their handler.
            deeper = path if name == "options" else f"{path}.{name}".removeprefix(".")
            yield from _differences(deeper, old.get(name), new.get(name))
    elif path in LISTS and len(old) == len(new):
        for index, (before, after) in enumerate(zip(old, new, strict=True)):
            yield from _differences(f"{path}.{index}", before, after)
    else:
        yield path
