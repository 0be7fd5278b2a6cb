"""The URL of the ledger's database: parsed here once, and shown by one function. Pure.

Settings check it, the store opens what it names, and commands ask it for the file of a SQLite ledger.
It has the form that SQLAlchemy reads, `dialect://user:password@host:port/name?option=value`, without
what SQLAlchemy would take in a way that few expect. No message contains a part of the URL.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import parse_qsl, unquote

__all__ = ["DatabaseUrl", "parse_database_url", "show_database_url"]

_FORM = "must be sqlite:///path/to/file.db or postgresql://user:password@host/database"
_SQLITE_EXAMPLE = "for example sqlite:///var/receiver.db; an absolute path has four slashes"
_SERVER = re.compile(
    r"""
    (?: (?P<username>[^:/]*) (?: :(?P<password>[^@]*) )? @ )?
    (?: \[(?P<ipv6>[^/?\]]+)\] | (?P<host>[^/:?\[\]]*) )
    (?: :(?P<port>[^/?]*) )?
    (?: /(?P<name>[^?]*) )?
    (?: \?(?P<query>.*) )?
    """,
    re.VERBOSE | re.DOTALL,
)
_MAX_PORT = 65535


@dataclass(frozen=True, slots=True)
class DatabaseUrl:
    """The parts of a URL, without its escapes. `path` is the file of a SQLite ledger, else None."""

    path: Path | None = None
    username: str | None = field(default=None, repr=False)
    password: str | None = field(default=None, repr=False)
    host: str | None = None
    port: int | None = None
    name: str | None = None
    options: Mapping[str, tuple[str, ...]] = field(default_factory=dict, repr=False)

    def __str__(self) -> str:
        """Return the URL as it may be shown: without user, password and options."""
        if self.path is not None:
            return f"sqlite:///{self.path}"
        host = f"[{self.host}]" if self.host and ":" in self.host else self.host or ""
        port = "" if self.port is None else f":{self.port}"
        return f"postgresql://{host}{port}{'' if self.name is None else f'/{self.name}'}"


def parse_database_url(text: str) -> DatabaseUrl:
    """Parse `sqlite:///FILE` or `postgresql://…`. Raises ValueError with the end of a sentence."""
    scheme, separator, rest = text.partition("://")
    if not separator or scheme not in {"sqlite", "postgresql"}:
        raise ValueError(_FORM)
    return _parse_file(rest) if scheme == "sqlite" else _parse_server(rest)


def show_database_url(text: str) -> str:
    """Return a URL as it may be shown, whatever it is: without user, password and options."""
    try:
        return str(parse_database_url(text))
    except ValueError:
        return "***"


def _parse_file(rest: str) -> DatabaseUrl:
    file = unquote(rest.removeprefix("/").partition("?")[0])
    if not rest.startswith("/") or ":memory:" in file or "\0" in file or not Path(file).name:
        raise ValueError(f"must name a file, {_SQLITE_EXAMPLE}")
    return DatabaseUrl(path=Path(file))


def _parse_server(rest: str) -> DatabaseUrl:
    match = _SERVER.fullmatch(rest)
    if match is None:
        raise ValueError(f"is not a URL; {_FORM}")
    parts = match.groupdict()
    host, name = parts["ipv6"] or parts["host"] or None, parts["name"]
    if "@" in f"{host}{name}":
        raise ValueError(
            "has more than one @; write one in a user name or a password as %40, and a / as %2F"
        )
    if any(character.isspace() for character in f"{host}{name}"):
        raise ValueError("must not contain white space")
    options: dict[str, tuple[str, ...]] = {}
    for key, value in parse_qsl(parts["query"] or "", keep_blank_values=True):
        options[key] = (*options.get(key, ()), value)
    return DatabaseUrl(
        username=_unescape(parts["username"]),
        password=_unescape(parts["password"]),
        host=host,
        port=_parse_port(parts["port"]),
        name=_unescape(name),
        options=options,
    )


def _parse_port(text: str | None) -> int | None:
    if text is None:
        return None
    if (
        text.isascii()
        and text.isdecimal()
        and len(text) <= len(str(_MAX_PORT))
        and 0 < int(text) <= _MAX_PORT
    ):
        return int(text)
    hint = "; has a variable in it not been replaced?" if not text or "$" in text or "{" in text else ""
    raise ValueError(f"has a port that is no number from 1 to {_MAX_PORT}{hint}")


def _unescape(text: str | None) -> str | None:
    return None if text is None else unquote(text)
