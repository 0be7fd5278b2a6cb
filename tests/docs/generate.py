"""Fills the generated parts of the documents from the code; `make docs` runs it.

A generated part stands between `<!-- generated: NAME ARGUMENTS -->` and `<!-- end -->`; `PARTS` has
the names. `test_generated.py` fails while a document is not what this module would write.
"""

import ast
import importlib
import inspect
import re
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping
from configparser import ConfigParser
from enum import Enum
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import typer

from receiver.cli.app import app
from receiver.cli.doctor.findings import FINDING_KINDS
from receiver.cli.trigger.cases import CASES
from receiver.config import describe, environment_variables
from receiver.emulator.faults import KINDS
from receiver.plugins.loader import options_of
from receiver.telemetry import Metrics
from receiver.web.ops.openapi import openapi_document
from receiver.web.public import STATUS
from tests.docs.meanings import CASE_MEANINGS, FAULT_MEANINGS, REFUSAL_MEANINGS

ROOT = Path(__file__).parents[2]
_REGION = re.compile(
    r"^(?P<open><!-- generated: (?P<what>[^>]+?) -->)\n.*?^(?P<end><!-- end -->)$", re.MULTILINE | re.DOTALL
)


def documents() -> list[Path]:
    """Return every page of the repository; the example plug-in is a package of its own."""
    found = [ROOT / "README.md", *(page for room in _ROOMS for page in (ROOT / room).rglob("*.md"))]
    return sorted(page for page in found if "example_plugin" not in page.parts)


_ROOMS = ("deploy", "handlers", "receiver", "tests")


def fill(text: str) -> str:
    """Return a document with its generated parts written anew."""
    return _REGION.sub(lambda found: "\n".join((found["open"], _part(found["what"]), found["end"])), text)


def _part(what: str) -> str:
    name, *arguments = what.split()
    return PARTS[name](*arguments)


def _table(head: str, rows: Iterable[Iterable[str]]) -> str:
    """Return a table of Markdown. `head` names its columns, separated by ` | `."""
    columns = head.split(" | ")
    lines = [f"| {head} |", f"|{'---|' * len(columns)}"]
    lines += ["| " + " | ".join(_cell(each) for each in row) + " |" for row in rows]
    return "\n".join(line.replace("|  |", "| |").replace("|  |", "| |") for line in lines)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", r"\|")


def _code(text: str) -> str:
    return f"`{text}`" if text else "–"


def _settings(section: str = "") -> str:
    """Tabulate every setting, or those of a section."""
    rows = [each for each in describe() if re.split(r"\[\]|\.", each.path)[0].startswith(section)]
    return _table("setting | default | meaning", ((_code(row.path), _code(row.default), row.help) for row in rows))


def _environment() -> str:
    """Tabulate the variables that have a name of their own, and the settings that they set."""
    own = {name: each for name, each in environment_variables().items() if "__" not in name}
    return _table("variable | sets", ((_code(name), _code(".".join(each.path))) for name, each in own.items()))


def _options(handler: str) -> str:
    rows = options_of(handler)
    return _table("option | default | meaning", ((_code(row.path), _code(row.default), row.help) for row in rows))


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
    return [each for each in command.params if each.param_type_name == "option" and "--help" not in each.opts]


def _commands() -> str:
    """List the commands, each with what it does; the options are in the sections below."""
    rows = ((f"[`{path}`](#{to_anchor(_heading(path, command))})", _help(command)) for path, command in commands())
    return _table("command | purpose", rows)


def _command_reference() -> str:
    """Write a section for each command: what it does, and its options."""
    return "\n\n".join(_command_section(path, command) for path, command in commands())


def _heading(path: str, command: Any) -> str:
    return " ".join((path, *(_metavar(each) for each in command.params if each.param_type_name == "argument")))


def _command_section(path: str, command: Any) -> str:
    parts = [f"### `{_heading(path, command)}`", _help(command)]
    if options(command):
        parts.append(_table("option | default | meaning", (_option_row(each) for each in options(command))))
    return "\n\n".join(parts)


def _option_row(option: Any) -> tuple[str, str, str]:
    names = ", ".join(_code(each) for each in sorted((*option.opts, *option.secondary_opts), key=len, reverse=True))
    words = ", ".join(_code(str(each)) for each in _choices(option.type_descriptor.annotation))
    meaning = f"{option.help or ''} {f'One of {words}.' if words else ''}"
    default = "" if option.is_flag or option.default in (None, ()) or callable(option.default) else option.default
    return names, "required" if option.required else _code(str(default)), meaning


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


def to_anchor(heading: str) -> str:
    """Return a heading's anchor as GitHub makes it."""
    return re.sub(r"[^a-z0-9 _-]", "", heading.lower()).replace(" ", "-")


def _metrics() -> str:
    return _table("metric | type | meaning", ((_code(name), kind, text) for name, kind, text in Metrics().catalogue()))


def _refusals() -> str:
    rows = ((str(int(status)), _code(code), REFUSAL_MEANINGS[code]) for code, status in STATUS.items())
    return _table("status | code | meaning", rows)


def _endpoints() -> str:
    """Tabulate the requests of the operations API by its own OpenAPI document."""
    document = openapi_document()
    schemas = document["components"]["schemas"]
    rows = []
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            names = [each["name"] for each in operation.get("parameters", ()) if each["in"] == "query"]
            body = operation.get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema", {})
            names += schemas.get(body.get("$ref", "").rsplit("/", 1)[-1], {}).get("properties", {})
            parameters = ", ".join(_code(name) for name in names)
            rows.append((_code(f"{method.upper()} {path}"), parameters, operation["summary"]))
    return _table("request | parameters | purpose", rows)


def _findings() -> str:
    rows = ((_code(name), kind.severity, kind.summary, kind.cause, kind.fix) for name, kind in FINDING_KINDS.items())
    return _table("finding | severity | meaning | usual cause | fix", rows)


def _cases() -> str:
    return _table("case | request", ((_code(name), CASE_MEANINGS[name]) for name in CASES))


def _faults() -> str:
    rows = (
        (_code(kind), family, ", ".join(_fault_option(*option) for option in own.items()), FAULT_MEANINGS[kind])
        for kind, (family, own) in KINDS.items()
    )
    return _table("kind | strikes | options | effect", rows)


def _fault_option(name: str, default: object) -> str:
    """Return an option with its default in parentheses, unless it has none."""
    if default in (None, ""):
        return f"`{name}`"
    shown = (
        str(default).lower() if isinstance(default, bool) else f"{default:g}" if isinstance(default, float) else default
    )
    return f"`{name}` ({shown})"


def _members(path: str) -> str:
    """Tabulate the public fields and methods of a class, each with its docstring in the source."""
    module, _, name = path.rpartition(".")
    cls = getattr(importlib.import_module(module), name)
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    assert isinstance(tree, ast.ClassDef), path
    return _table("member | type | meaning", _member_rows(tree.body))


def _member_rows(body: list[ast.stmt]) -> Iterator[tuple[str, str, str]]:
    for node, after in zip(body, (*body[1:], None), strict=True):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            name, kind, text = _code(node.target.id), ast.unparse(node.annotation), _text_of(after)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            kind = ast.unparse(node.returns) if node.returns else ""
            name, text = _signature(node), ast.get_docstring(node) or ""
        else:
            continue
        if not re.match("`(await )?_", name):
            yield name, _code(kind), text


def _signature(node: ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    if any(isinstance(each, ast.Name) and each.id == "property" for each in node.decorator_list):
        return _code(node.name)
    arguments = node.args
    arguments.args = [each for each in arguments.args if each.arg != "self"]
    for each in (*arguments.args, *arguments.kwonlyargs):
        each.annotation = None
    word = "await " if isinstance(node, ast.AsyncFunctionDef) else ""
    return _code(f"{word}{node.name}({ast.unparse(arguments)})")


def _text_of(node: ast.stmt | None) -> str:
    """Return the docstring of an attribute: the text that follows it."""
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
        return str(node.value.value)
    return ""


def _packages() -> str:
    """Tabulate the packages of `receiver/` in the order of `.importlinter`."""
    contracts = ConfigParser()
    contracts.read(ROOT / ".importlinter", "utf-8")
    layers = contracts["importlinter:contract:layers"]["layers"].strip().split("\n")
    rows = (
        (str(number), _code(_place(name)), _sentence(name))
        for number, layer in enumerate(layers, 1)
        for name in (each.strip("() ") for each in re.split("[|:]", layer))
    )
    return _table("layer | package | purpose", rows)


def _place(module: str) -> str:
    path = ROOT / module.replace(".", "/")
    return f"{path.relative_to(ROOT)}/" if path.is_dir() else f"{path.relative_to(ROOT)}.py"


def _sentence(module: str) -> str:
    text = " ".join((importlib.import_module(module).__doc__ or "").split())
    return re.split(r"(?<=[.:;]) (?=[A-Z])", text)[0]


def _modules(package: str) -> str:
    """Tabulate the modules of a folder by the first sentence of each."""
    names = [
        each.stem if each.is_file() else each.name for each in sorted((ROOT / package).iterdir()) if _is_module(each)
    ]
    dotted = package.strip("/").replace("/", ".")
    rows = ((_code(_place(f"{dotted}.{name}").removeprefix(package)), _sentence(f"{dotted}.{name}")) for name in names)
    return _table("module | purpose", rows)


def _is_module(path: Path) -> bool:
    return (path / "__init__.py").exists() or (path.suffix == ".py" and not path.stem.startswith("__"))


PARTS: Mapping[str, Callable[..., str]] = {
    "settings": _settings,
    "environment": _environment,
    "options": _options,
    "commands": _commands,
    "command-reference": _command_reference,
    "metrics": _metrics,
    "refusals": _refusals,
    "endpoints": _endpoints,
    "findings": _findings,
    "cases": _cases,
    "faults": _faults,
    "members": _members,
    "packages": _packages,
    "modules": _modules,
}
"""What a generated part may hold, by its name. Words after the name are its arguments."""


def main() -> None:
    for page in documents():
        before = page.read_text("utf-8")
        after = fill(before)
        if after != before:
            page.write_text(after, "utf-8")
            sys.stdout.write(f"{page.relative_to(ROOT)} was stale and has been written anew.\n")


if __name__ == "__main__":
    main()
