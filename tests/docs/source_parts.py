"""The parts of the documents about the source: its packages, its modules, the members of a class."""

import ast
import importlib
import inspect
import re
import textwrap
from collections.abc import Iterator
from configparser import ConfigParser
from pathlib import Path

from tests.docs.markdown import to_code, to_table

ROOT = Path(__file__).parents[2]


def member_table(path: str) -> str:
    """Tabulate the public fields and methods of a class, each with its docstring in the source."""
    module, _, name = path.rpartition(".")
    cls = getattr(importlib.import_module(module), name)
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    assert isinstance(tree, ast.ClassDef), path
    return to_table("member | type | meaning", _member_rows(tree.body))


def _member_rows(body: list[ast.stmt]) -> Iterator[tuple[str, str, str]]:
    for node, after in zip(body, (*body[1:], None), strict=True):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            name, kind, text = to_code(node.target.id), ast.unparse(node.annotation), _text_of(after)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            kind = ast.unparse(node.returns) if node.returns else ""
            name, text = _signature(node), ast.get_docstring(node) or ""
        else:
            continue
        if not re.match("`(await )?_", name):
            yield name, to_code(kind), text


def _signature(node: ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    if any(isinstance(each, ast.Name) and each.id == "property" for each in node.decorator_list):
        return to_code(node.name)
    arguments = node.args
    arguments.args = [each for each in arguments.args if each.arg != "self"]
    for each in (*arguments.args, *arguments.kwonlyargs):
        each.annotation = None
    word = "await " if isinstance(node, ast.AsyncFunctionDef) else ""
    return to_code(f"{word}{node.name}({ast.unparse(arguments)})")


def _text_of(node: ast.stmt | None) -> str:
    """Return the docstring of an attribute: the text that follows it."""
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
        return str(node.value.value)
    return ""


def package_table() -> str:
    """Tabulate the packages of `receiver/` in the order of `.importlinter`."""
    contracts = ConfigParser()
    contracts.read(ROOT / ".importlinter", "utf-8")
    layers = contracts["importlinter:contract:layers"]["layers"].strip().split("\n")
    rows = (
        (str(number), to_code(_place(name)), _sentence(name))
        for number, layer in enumerate(layers, 1)
        for name in (each.strip("() ") for each in re.split("[|:]", layer))
    )
    return to_table("layer | package | purpose", rows)


def _place(module: str) -> str:
    path = ROOT / module.replace(".", "/")
    return f"{path.relative_to(ROOT)}/" if path.is_dir() else f"{path.relative_to(ROOT)}.py"


def _sentence(module: str) -> str:
    text = " ".join((importlib.import_module(module).__doc__ or "").split())
    return re.split(r"(?<=\.) (?=[A-Z`])", text)[0]


def module_tables() -> str:
    """Tabulate the modules of each package of `receiver/`, each by its first sentence."""
    packages = [path.parent for path in sorted((ROOT / "receiver").rglob("__init__.py"))]
    shown = [path for path in packages if path.name not in {"versions", "migrations"}]
    return "\n\n".join(f"### `{path.relative_to(ROOT)}/`\n\n{_module_table(path)}" for path in shown)


def _module_table(package: Path) -> str:
    dotted = ".".join(package.relative_to(ROOT).parts)
    files = [path.stem for path in sorted(package.glob("*.py")) if not path.stem.startswith("__")]
    return to_table("module | purpose", ((to_code(f"{name}.py"), _sentence(f"{dotted}.{name}")) for name in files))
