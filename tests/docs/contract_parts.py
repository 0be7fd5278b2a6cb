"""The parts of the documents about the contract of handlers and its kit: classes, functions, errors, fixtures."""

import ast
import importlib
import inspect
import re
import textwrap
from collections.abc import Iterator
from typing import Any

from _pytest.fixtures import FixtureFunctionDefinition

from tests.docs.markdown import to_code, to_table


def public_members(module: str) -> dict[str, Any]:
    """Return what a module names in `__all__`."""
    found = importlib.import_module(module)
    return {name: getattr(found, name) for name in found.__all__}


def is_error(member: Any) -> bool:
    return inspect.isclass(member) and issubclass(member, Exception)


def member_table(*paths: str) -> str:
    """Tabulate the public fields and methods of classes, each with its docstring in the source."""
    rows = (row for path in paths for row in _class_rows(path, is_prefixed=len(paths) > 1))
    return to_table("member | type | meaning", rows)


def _class_rows(path: str, *, is_prefixed: bool) -> Iterator[tuple[str, str, str]]:
    module, _, name = path.rpartition(".")
    cls = getattr(importlib.import_module(module), name)
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    assert isinstance(tree, ast.ClassDef), path
    for member, kind, text in _member_rows(tree):
        prefixed = re.sub("`(await )?", rf"`\1{name}.", member, count=1)
        yield prefixed if is_prefixed else member, kind, text


def _member_rows(tree: ast.ClassDef) -> Iterator[tuple[str, str, str]]:
    for node, after in zip(tree.body, (*tree.body[1:], None), strict=True):
        match node:
            case ast.AnnAssign(target=ast.Name(id=name)):
                member, kind, text = to_code(name), ast.unparse(node.annotation), _text_of(after)
            case ast.Assign(targets=[ast.Name(id=name)]):
                member, kind, text = (
                    to_code(name),
                    ast.unparse(node.value).replace("'", '"'),
                    _text_of(after),
                )
            case ast.FunctionDef(name="__init__"):
                member, kind, text = _signature(node, tree.name), tree.name, ast.get_docstring(tree) or ""
            case ast.FunctionDef() | ast.AsyncFunctionDef():
                kind = ast.unparse(node.returns) if node.returns else ""
                member, text = _signature(node, node.name), ast.get_docstring(node) or ""
            case _:
                continue
        if not re.match("`(await )?_", member):
            yield member, to_code(kind), text


def _signature(node: ast.FunctionDef | ast.AsyncFunctionDef, name: str) -> str:
    if any(isinstance(each, ast.Name) and each.id == "property" for each in node.decorator_list):
        return to_code(name)
    arguments = node.args
    arguments.args = [each for each in arguments.args if each.arg not in {"self", "cls"}]
    for each in (*arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg):
        if each is not None:
            each.annotation = None
    word = "await " if isinstance(node, ast.AsyncFunctionDef) else ""
    return to_code(f"{word}{name}({ast.unparse(arguments)})".replace("'", '"'))


def _text_of(node: ast.stmt | None) -> str:
    """Return the docstring of an attribute: the text that follows it."""
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
        return str(node.value.value)
    return ""


def function_table(module: str) -> str:
    """Tabulate the public functions of a module, each under its own name."""
    functions = (
        each for name, each in public_members(module).items() if getattr(each, "__name__", "") == name
    )
    rows = (_function_row(inspect.unwrap(each)) for each in functions if not inspect.isclass(each))
    return to_table("function | meaning", rows)


def _function_row(function: Any) -> tuple[str, str]:
    (node,) = ast.parse(textwrap.dedent(inspect.getsource(function))).body
    assert isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef), function
    word = "async with " if isinstance(node, ast.AsyncFunctionDef) else ""
    return _signature(node, node.name).replace("`await ", f"`{word}"), ast.get_docstring(node) or ""


def error_table(module: str) -> str:
    """Tabulate the errors of a module with the error that each is a kind of."""
    errors = ((name, each) for name, each in public_members(module).items() if is_error(each))
    rows = ((to_code(name), to_code(each.__base__.__name__), each.__doc__ or "") for name, each in errors)
    return to_table("error | is a | meaning", rows)


def fixture_table(module: str) -> str:
    """Tabulate the pytest fixtures of a module."""
    found = vars(importlib.import_module(module)).items()
    rows = (
        (to_code(name), each.__doc__ or "")
        for name, each in found
        if isinstance(each, FixtureFunctionDefinition)
    )
    return to_table("fixture | meaning", rows)
