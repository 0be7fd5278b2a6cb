"""The contract of handlers: it only grows until the next major version, and is documented."""

import ast
import inspect
import re
import textwrap
from collections.abc import Iterator
from dataclasses import fields
from typing import Any

import pytest

from receiver import handler, testing
from receiver.handler import Event, OutputType
from receiver.plugins.attempt import AttemptContext
from receiver.plugins.functions import BlockingContext
from receiver.testing import MemoryContext

# Add to these names; remove none, and change no order.
NAMES = """
MANIFEST THUMBNAIL Answer Artifact AttemptOverError Checks Closes Context DescribesSchema Done Download DownloadError
DownloadFailedError DownloadRefusedError Event Handler LocationTakenError Log MissingExtraError Output OutputType
PostError PostFailedError PostRefusedError Posted Poster Reject Retry RunState Saved Secret SettledRun
TargetUnreachableError When growing_pause header_value needs storable_text target_url usable_headers
"""
FIELDS = {
    "Artifact": "run_id handler position output_id location size sha256 content_type stored_at",
    "Done": "result",
    "Download": "chunks content_type content_length",
    "Output": "position output_id type value",
    "Posted": "status retry_after_seconds location excerpt",
    "Reject": "reason",
    "Retry": "reason after_seconds reread",
    "Saved": "path size sha256 content_type",
    "SettledRun": (
        "run_id run_type status technique_id workspace_id project_id outputs metadata charged_cost error_code "
        "error_message created_at started_at completed_at settled_at settled_by verdict version"
    ),
    "When": "status run_type technique_id workspace_id output_type metadata",
}
CONTEXT = {
    "handler idempotency_key event attempt max_attempts deadline_at artifacts log": None,
    "open": ["output"],
    "save": ["output", "path"],
    "stored": [],
    "request": [],
    "reserve": ["position", "output_id", "location", "vacant"],
    "store_artifact": ["position", "size", "sha256", "content_type"],
}


def test_no_name_is_removed() -> None:
    assert set(NAMES.split()) <= set(handler.__all__)
    assert (handler.MANIFEST, handler.THUMBNAIL) == (-1, -2)
    assert {event.value for event in Event} >= {"settled", "cost_final", "lost", "diverged", "dead"}
    assert {each.value for each in OutputType} >= {
        "imageUrl",
        "videoUrl",
        "audioUrl",
        "documentUrl",
        "text",
    }


@pytest.mark.parametrize("name", FIELDS)
def test_no_field_is_removed_or_moved(name: str) -> None:
    """Plug-ins and their tests pass fields by name and by position; a new field has a default."""
    found = fields(getattr(handler, name))
    frozen = FIELDS[name].split()
    assert [each.name for each in found][: len(frozen)] == frozen
    given: dict[str, Any] = dict.fromkeys(frozen)
    getattr(handler, name)(**given)


@pytest.mark.parametrize("context", [handler.Context, AttemptContext, MemoryContext, BlockingContext])
def test_every_context_has_all_of_it(context: type) -> None:
    """The service's, the kit's and that of plain functions, which has `read` in place of `open`."""
    contract = dict(CONTEXT)
    if context is BlockingContext:
        del contract["open"]
        contract["read"] = ["output", "max_bytes"]
    for names, parameters in contract.items():
        for name in names.split():
            if parameters is None:
                known = {
                    *dir(context),
                    *getattr(context, "__annotations__", ()),
                    *_names_in_constructor(context),
                }
                assert name in known
            else:
                assert list(inspect.signature(getattr(context, name)).parameters)[1:] == parameters


def _names_in_constructor(context: type) -> set[str]:
    """Return the names in a class's constructor, the attributes that it sets among them."""
    return set(inspect.unwrap(vars(context)["__init__"]).__code__.co_names)


@pytest.mark.parametrize("module", [handler, testing])
def test_every_public_member_is_documented(module: Any) -> None:
    """Each class, function, field and method of the contract and of the kit has a docstring."""
    public = {name: getattr(module, name) for name in module.__all__}
    ours = {
        name: each
        for name, each in public.items()
        if getattr(each, "__module__", "").startswith("receiver.")
    }
    assert ours
    assert [name for name, each in ours.items() if not each.__doc__] == []
    classes = [each for each in ours.values() if inspect.isclass(each)]
    assert [f"{each.__name__}.{name}" for each in classes for name in _find_undocumented(each)] == []


def _find_undocumented(cls: type) -> Iterator[str]:
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    assert isinstance(tree, ast.ClassDef)
    for node, after in zip(tree.body, (*tree.body[1:], None), strict=True):
        match node:
            case ast.AnnAssign(target=ast.Name(id=name)) | ast.Assign(targets=[ast.Name(id=name)]):
                documented = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
                documented = ast.get_docstring(node) is not None
            case _:
                continue
        if not documented and not re.match("_", name):
            yield name
