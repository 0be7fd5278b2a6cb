"""Where settings come from: one TOML file, and environment variables over it. Called by `config.py` only.

Nothing here knows what a setting means; it knows names. Everything wrong is collected, nothing is raised.
"""

import difflib
import json
import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from receiver.config.values import read_secret
from receiver.errors import Problem

__all__ = ["OTHER_NAMES", "Gathered", "Variable", "gather", "nearest"]

DEFAULT_PATH = Path("receiver.toml")
OTHER_NAMES = frozenset({"RECEIVER_CONFIG", "RECEIVER_OPS_URL"})
"""Names that are ours without being settings."""

# What Kubernetes puts into every pod beside a service called "receiver" or "receiver-public".
_INJECTED = re.compile(r"_(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT(_[0-9]+_(TCP|UDP|SCTP)(_(ADDR|PORT|PROTO))?)?)$")
_NEAR = 0.9


@dataclass(frozen=True, slots=True)
class Variable:
    """One environment variable: the setting it sets, and whether that takes several values."""

    path: tuple[str, ...]
    many: bool = False


@dataclass(slots=True)
class Gathered:
    """What was found: nested values, which variable set which dotted path, and what was wrong."""

    values: dict[str, Any] = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)


def gather(path: Path | None, environ: Mapping[str, str], variables: Mapping[str, Variable]) -> Gathered:
    """Read the file, lay the environment over it, and complain about names that look like ours and are not."""
    found = Gathered()
    _read_file(path, environ, found)
    for name, variable in variables.items():
        text = _value_of(name, environ, found)
        if text is not None:
            _lay(found, name, variable, text)
    found.problems.extend(_strangers(environ, variables))
    return found


def nearest(name: str, known: Iterable[str], cutoff: float = 0.7) -> str | None:
    """Return the known name that `name` was most likely meant to be."""
    return next(iter(difflib.get_close_matches(name, list(known), n=1, cutoff=cutoff)), None)


def _read_file(path: Path | None, environ: Mapping[str, str], found: Gathered) -> None:
    chosen = path or (Path(environ["RECEIVER_CONFIG"]) if environ.get("RECEIVER_CONFIG") else None)
    if chosen is None and not DEFAULT_PATH.exists():
        return
    file = chosen or DEFAULT_PATH
    try:
        found.values = tomllib.loads(file.read_text("utf-8"))
    except OSError as error:
        found.problems.append(Problem(str(file), f"cannot be read: {error.strerror}"))
    except UnicodeDecodeError:
        found.problems.append(Problem(str(file), "is not UTF-8 text"))
    except tomllib.TOMLDecodeError as error:
        # Only the place: the parser's words may quote the line, and the line may be a secret.
        place = re.search(r"\((at [^()]*)\)$", str(error))
        found.problems.append(Problem(str(file), f"is not valid TOML ({place[1] if place else 'somewhere'})"))


def _value_of(name: str, environ: Mapping[str, str], found: Gathered) -> str | None:
    """Return a variable's text, directly or out of the file that `<name>_FILE` names; empty counts as not set."""
    text, file = environ.get(name) or None, environ.get(f"{name}_FILE")
    if not file:
        return text
    if text is not None:
        found.problems.append(Problem(name, f"is set twice: unset either {name} or {name}_FILE"))
        return None
    try:
        return read_secret(Path(file))
    except ValueError as error:
        found.problems.append(Problem(f"{name}_FILE", str(error)))
        return None


def _lay(found: Gathered, name: str, variable: Variable, text: str) -> None:
    dotted = ".".join(variable.path)
    if dotted in found.origins:
        found.problems.append(Problem(dotted, f"is set twice: unset either {found.origins[dotted]} or {name}"))
        return
    table = found.values
    for part in variable.path[:-1]:
        table = table.setdefault(part, {})
        if not isinstance(table, dict):  # the file is wrong there, and will be told so
            return
    table[variable.path[-1]] = _several(text) if variable.many else text
    found.origins[dotted] = name


def _several(text: str) -> object:
    """Take a JSON list, or values between commas; blanks are dropped at the commas only."""
    if text.lstrip().startswith("["):
        try:
            return json.loads(text)
        except ValueError:
            return text
    return [part for part in re.split(r"\s*,\s*", text) if part]


def _strangers(environ: Mapping[str, str], variables: Mapping[str, Variable]) -> Iterable[Problem]:
    known = {*OTHER_NAMES, *variables, *(f"{name}_FILE" for name in variables)}
    for name in sorted(environ.keys() - known):
        if re.match(r"RECEIVER_[A-Z0-9_]+?__", name):
            meant = nearest(name, known)
            yield Problem(name, f"is no setting of ours{f'; did you mean {meant}?' if meant else ''}")
        elif name.startswith(("RECEIVER_", "FLORA_")) and not _is_foreign(name, environ[name], known):
            meant = nearest(name, known, _NEAR)
            if meant:
                yield Problem(name, f"is not read by anyone; did you mean {meant}?")


def _is_foreign(name: str, value: str, known: Iterable[str]) -> bool:
    """Tell names that others give: Kubernetes' services, and secrets that `env:NAME` points to (FLORA_API_KEY_ABC)."""
    if _INJECTED.search(name) and (not name.endswith("_PORT") or "://" in value):
        return True
    return any(name.startswith(f"{each}_") for each in known if each.startswith("FLORA_"))
