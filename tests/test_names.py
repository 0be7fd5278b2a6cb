"""Plain English, as far as a program can hold it: function names are verb phrases, and no words that must be translated."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
FILES = [
    path
    for name in ("receiver", "handlers")
    for path in sorted((ROOT / name).rglob("*.py"))
    if "migrations" not in path.parts
]
NO_PARTICIPLES = {
    "bind", "embed", "feed", "missing", "need", "ping", "read", "seed", "setting", "settings", "string", "warning",
}  # fmt: skip
"""Words that end like a participle and are none, or are nouns where they stand."""
IRREGULAR = {
    "drawn", "found", "given", "gone", "heard", "held", "kept", "known", "left", "made", "met", "put", "seen", "sent",
    "shown", "taken", "told", "written",
}  # fmt: skip
PUBLIC = {"running", "standing", "stored"}
"""Names that plug-ins and programs use: `Service.running`, `Context.stored`, `receiver.testing.standing`."""
STRANGE = {
    "bury": "mark as exhausted", "cure": "fix", "desk": "name what it is", "herald": "notifier", "illness": "finding",
    "noun": "value", "nobody": "name the subject", "standing": "state or progress", "told": "reported, logged, said",
    "whoever": "name the subject",
}  # fmt: skip
"""Words of an earlier version of this code, and what to say instead."""


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Yield the functions and methods of a file, properties left out: those are nouns."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not any(
            "property" in ast.unparse(each) or "setter" in ast.unparse(each) for each in node.decorator_list
        ):
            yield node


def is_participle(name: str) -> bool:
    """Tell whether a function's whole name is a participle or a gerund, as `shown` and `_talking` are."""
    word = name.strip("_")
    if "_" in word or name in PUBLIC or word in NO_PARTICIPLES:
        return False
    return word in IRREGULAR or re.fullmatch(r"[a-z]{3,}(ed|ing)", word) is not None


def prose(path: Path) -> str:
    """Return the comments and docstrings of a file without `code` in them, and its names, words apart."""
    source = path.read_text("utf-8")
    tree = ast.parse(source)
    texts = [
        node.value.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    ]
    comments = re.findall(r"#[^\n]*", source)
    names = [node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    apart = [re.sub(r"(?<=[a-z])(?=[A-Z])|_", " ", name) for name in names if name not in PUBLIC]
    return re.sub(r"`[^`]*`", "", " ".join([*texts, *comments])) + " " + " ".join(apart)


def test_the_rule_knows_a_participle() -> None:
    """Else the next test would hold of anything."""
    assert [name for name in ("_told", "shown", "talking", "read", "send", "to_ms", "warning") if is_participle(name)] == [
        "_told", "shown", "talking",
    ]  # fmt: skip


def test_functions_are_named_by_verb_phrases() -> None:
    """A bare participle says neither what is done nor what comes back."""
    found = [
        f"{path.relative_to(ROOT)}:{node.lineno} {node.name}"
        for path in FILES
        for node in functions(path)
        if is_participle(node.name)
    ]
    assert found == []


def test_no_word_must_be_translated_back() -> None:
    """One word for one idea, the one that the field uses."""
    found = [
        f"{path.relative_to(ROOT)}: {word}: {STRANGE[word]}"
        for path in FILES
        for word in sorted(STRANGE.keys() & set(re.findall(r"[a-z]+", prose(path).lower())))
    ]
    assert found == []


def test_a_function_fits_a_screen() -> None:
    """50 lines at most."""
    found = [
        f"{path.relative_to(ROOT)}:{node.lineno} {node.name}"
        for path in FILES
        for node in functions(path)
        if (node.end_lineno or node.lineno) - node.lineno + 1 > 50
    ]
    assert found == []
