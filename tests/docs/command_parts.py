"""The commands of `flora-receiver`, and the parts of the documents about them."""

from collections.abc import Iterator, Mapping
from enum import Enum
from typing import Any, Literal, get_args, get_origin

import typer

from receiver.cli.app import app
from tests.docs.markdown import to_anchor, to_code, to_table


def commands(command: Any = None, path: str = "flora-receiver") -> Iterator[tuple[str, Any]]:
    """Yield every command as (its words, its click object)."""
    command = command or typer.main.get_command(app)
    inner: Mapping[str, Any] | None = getattr(command, "commands", None)
    if inner is None:
        yield path, command
        return
    for name, each in inner.items():
        yield from commands(each, f"{path} {name}")


def options(command: Any) -> list[Any]:
    """Return the options of a command without `--help`."""
    return [
        each for each in command.params if each.param_type_name == "option" and "--help" not in each.opts
    ]


def command_table() -> str:
    """List the commands, each with what it does; the options are in the sections below."""
    rows = (
        (f"[`{path}`](#{to_anchor(_heading(path, command))})", _help(command))
        for path, command in commands()
    )
    return to_table("command | purpose", rows)


def command_reference() -> str:
    """Write a section for each command: what it does, and its options."""
    return "\n\n".join(_command_section(path, command) for path, command in commands())


def _heading(path: str, command: Any) -> str:
    return " ".join(
        (path, *(_metavar(each) for each in command.params if each.param_type_name == "argument"))
    )


def _command_section(path: str, command: Any) -> str:
    parts = [f"### `{_heading(path, command)}`", _help(command)]
    if options(command):
        parts.append(
            to_table("option | default | meaning", (_option_row(each) for each in options(command)))
        )
    return "\n\n".join(parts)


def _option_row(option: Any) -> tuple[str, str, str]:
    names = ", ".join(
        to_code(each) for each in sorted((*option.opts, *option.secondary_opts), key=len, reverse=True)
    )
    words = ", ".join(to_code(str(each)) for each in _choices(option.type_descriptor.annotation))
    meaning = f"{option.help or ''} {f'One of {words}.' if words else ''}"
    default = (
        "" if option.is_flag or option.default in (None, ()) or callable(option.default) else option.default
    )
    return names, "required" if option.required else to_code(str(default)), meaning


def _choices(annotation: Any) -> tuple[object, ...]:
    """Return the words that an option takes; none where it takes any."""
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        return tuple(each.value for each in annotation)
    return get_args(annotation) if get_origin(annotation) is Literal else ()


def _metavar(argument: Any) -> str:
    name = (argument.metavar or argument.name).upper()
    return name if argument.required else f"[{name}]"


def _help(command: Any) -> str:
    return " ".join((command.help or "").split())
