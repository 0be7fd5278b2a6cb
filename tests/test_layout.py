"""The tests mirror the code: `tests/<folder>/test_<module>.py` is about `receiver/<folder>/<module>.py`."""

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TESTS = ROOT / "tests"
NOT_MIRRORED = {
    "bench",
    "deploy",
    "docs",
    "e2e",
    "example_plugin",
    "proof",
    "samples",
    "support",
    "vectors",
}
"""Folders about the whole: processes, documents, recipes, figures; and data."""
WHOLE = {"test_imports.py", "test_layout.py", "test_names.py", "test_waits.py"}
"""Files about the whole."""


def mirrored() -> list[Path]:
    """Return the test files that must stand beside a module, relative to tests/."""
    found = (path.relative_to(TESTS) for path in sorted(TESTS.rglob("test_*.py")))
    return [path for path in found if path.parts[0] not in NOT_MIRRORED | WHOLE]


def folder_of(test: Path) -> Path:
    """Return the folder of the code that a test file is about."""
    return ROOT / test.parent if test.parts[0] == "handlers" else ROOT / "receiver" / test.parent


@pytest.mark.parametrize("test", mirrored(), ids=str)
def test_each_test_file_is_named_after_a_module(test: Path) -> None:
    """`test_<module>.py`, or `test_<module>_<aspect>.py` where one file would be too long."""
    words = test.stem.removeprefix("test_").split("_")
    names = {"_".join(words[:count]) for count in range(1, len(words) + 1)}
    folder = folder_of(test)
    modules = {
        path.stem for path in folder.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()
    }
    assert names & modules, f"{folder.relative_to(ROOT)} has none of {sorted(names)}"


@pytest.mark.parametrize(
    "package",
    [
        path.parent
        for name in ("receiver", "handlers")
        for path in sorted((ROOT / name).rglob("__init__.py"))
    ],
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_each_package_says_what_it_is_for(package: Path) -> None:
    """Its `__init__.py` begins with a docstring, which is where a newcomer looks."""
    if package.parts[-2:] == ("store", "migrations") or "versions" in package.parts:
        return
    assert (package / "__init__.py").read_text("utf-8").startswith('"""'), f"{package} has no docstring"


def test_helpers_stand_in_one_folder() -> None:
    """Besides tests and conftest.py, mirrored folders hold nothing that is imported."""
    astray = [
        str(path.relative_to(TESTS))
        for path in TESTS.rglob("*.py")
        if path.relative_to(TESTS).parts[0] not in NOT_MIRRORED
        and not path.name.startswith("test_")
        and path.name not in {"conftest.py", "__init__.py"}
    ]
    assert astray == []
