"""Reads the sources of the settings: one TOML file, and environment variables that override it.

This module knows the names of settings, not their meaning. It collects problems and raises nothing.
Called by `loader.py`.
"""

import difflib
import json
import re
import tomllib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from receiver.config.values import read_secret
from receiver.errors import Problem

__all__ = [
    "OTHER_NAMES",
    "Sources",
    "TextReader",
    "Variable",
    "find_file",
    "find_similar",
    "read_sources",
    "read_text",
]

TextReader = Callable[[Path], str]
"""Returns the text of `receiver.toml`. Raises OSError, UnicodeDecodeError."""

DEFAULT_PATH = Path("receiver.toml")
OTHER_NAMES = frozenset({"RECEIVER_CONFIG", "RECEIVER_OPS_URL"})
"""Environment variables of this program that are not settings."""

# Kubernetes sets these in every pod beside a service named "receiver" or "receiver-public".
_KUBERNETES = re.compile(
    r"_(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT(_[0-9]+_(TCP|UDP|SCTP)(_(ADDR|PORT|PROTO))?)?)$"
)
_SIMILAR = 0.7
_VERY_SIMILAR = 0.9


@dataclass(frozen=True, slots=True)
class Variable:
    """An environment variable: the path of the setting it sets, and whether that is a list."""

    path: tuple[str, ...]
    is_list: bool = False


@dataclass(slots=True)
class Sources:
    """Nested values, the variable that set each dotted path, and problems.

    `is_complete` is False where the file could not be read, so that what it would set is unknown.
    """

    values: dict[str, Any] = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    is_complete: bool = True


def find_file(path: Path | None, environ: Mapping[str, str]) -> Path | None:
    """Return the file that has the settings, or None if none is named and the usual one is absent."""
    named = path or (Path(environ["RECEIVER_CONFIG"]) if environ.get("RECEIVER_CONFIG") else None)
    return named or (DEFAULT_PATH if DEFAULT_PATH.exists() else None)


def read_text(path: Path) -> str:
    """Return the text of `receiver.toml` as it is now. Raises OSError, UnicodeDecodeError."""
    return path.read_text("utf-8-sig")


def read_sources(
    path: Path | None,
    environ: Mapping[str, str],
    variables: Mapping[str, Variable],
    *,
    read: TextReader = read_text,
) -> Sources:
    """Read the file and then the environment; report names that look like settings but are none."""
    sources = Sources()
    if (file := find_file(path, environ)) is not None:
        _read_file(file, read, sources)
    for name, variable in variables.items():
        text = _read_variable(name, environ, sources)
        if text is not None:
            _set_value(sources, name, variable, text)
    sources.problems.extend(_check_names(environ, variables))
    return sources


def find_similar(name: str, known: Iterable[str], cutoff: float = _SIMILAR) -> str | None:
    """Return the known name that `name` is most likely a misspelling of, if any."""
    return next(iter(difflib.get_close_matches(name, list(known), n=1, cutoff=cutoff)), None)


def _read_file(file: Path, read: TextReader, sources: Sources) -> None:
    message = None
    try:
        sources.values = tomllib.loads(read(file))
    except OSError as error:
        message = f"cannot be read: {error.strerror}"
    except UnicodeDecodeError:
        message = "is not UTF-8 text; save it as UTF-8"
    except tomllib.TOMLDecodeError as error:
        # Only the position: the parser's message may quote the line, which may contain a secret.
        match = re.search(r"\((at [^()]*)\)$", str(error))
        message = f"is not valid TOML{f' ({match[1]})' if match else ''}"
    if message is not None:
        sources.problems.append(Problem(str(file), message))
        sources.is_complete = False


def _read_variable(name: str, environ: Mapping[str, str], sources: Sources) -> str | None:
    """Return the text of a variable or of its `<name>_FILE`; an empty one counts as not set."""
    text, file = environ.get(name) or None, environ.get(f"{name}_FILE")
    if not file:
        return text
    if text is not None:
        sources.problems.append(Problem(name, f"is set twice; unset either {name} or {name}_FILE"))
        return None
    try:
        return read_secret(Path(file))
    except ValueError as error:
        sources.problems.append(Problem(f"{name}_FILE", str(error)))
        return None


def _set_value(sources: Sources, name: str, variable: Variable, text: str) -> None:
    dotted = ".".join(variable.path)
    if dotted in sources.origins:
        other = sources.origins[dotted]
        sources.problems.append(Problem(dotted, f"is set twice; unset either {other} or {name}"))
        return
    table = sources.values
    for part in variable.path[:-1]:
        table = table.setdefault(part, {})
        if not isinstance(table, dict):  # a mistake in the file, which validation reports
            return
    table[variable.path[-1]] = _parse_list(text) if variable.is_list else text
    sources.origins[dotted] = name


def _parse_list(text: str) -> object:
    """Parse a JSON list, or values between commas, without the white space around commas."""
    if text.lstrip().startswith("["):
        try:
            return json.loads(text)
        except ValueError:
            return text
    return [part for part in re.split(r"\s*,\s*", text) if part]


def _check_names(environ: Mapping[str, str], variables: Mapping[str, Variable]) -> Iterable[Problem]:
    known = {*OTHER_NAMES, *variables, *(f"{name}_FILE" for name in variables)}
    for name in sorted(environ.keys() - known):
        if re.match(r"RECEIVER_[A-Z0-9_]+?__", name):
            similar = find_similar(name, known)
            hint = f"; did you mean {similar}?" if similar else ""
            yield Problem(name, f"is not a setting{hint}")
        elif name.startswith(("RECEIVER_", "FLORA_")) and not _is_foreign(name, environ[name], known):
            similar = find_similar(name, known, _VERY_SIMILAR)
            if similar:
                yield Problem(name, f"is not used; did you mean {similar}?")


def _is_foreign(name: str, value: str, known: Iterable[str]) -> bool:
    """Return whether Kubernetes set it, or a setting may refer to it (`env:FLORA_API_KEY_2`)."""
    if _KUBERNETES.search(name) and (not name.endswith("_PORT") or "://" in value):
        return True
    return any(name.startswith(f"{each}_") for each in known if each.startswith("FLORA_"))
