"""The parts of the documents about the source: its packages and its modules."""

import importlib
import re
from configparser import ConfigParser
from pathlib import Path

from tests.docs.markdown import to_code, to_table

ROOT = Path(__file__).parents[2]


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
    """Return the first sentence of a module's docstring, which ends with its first paragraph."""
    paragraph = (importlib.import_module(module).__doc__ or "").partition("\n\n")[0]
    text = " ".join(paragraph.split())
    return re.split(r"(?<=\.) (?=[A-Z`])", text)[0]


def module_tables() -> str:
    """Tabulate the modules of each package of `receiver/`, each by its first sentence."""
    packages = [path.parent for path in sorted((ROOT / "receiver").rglob("__init__.py"))]
    shown = [path for path in packages if path.name not in {"versions", "migrations"}]
    return "\n\n".join(f"### `{path.relative_to(ROOT)}/`\n\n{_module_table(path)}" for path in shown)


def _module_table(package: Path) -> str:
    dotted = ".".join(package.relative_to(ROOT).parts)
    files = [path.stem for path in sorted(package.glob("*.py")) if not path.stem.startswith("__")]
    return to_table(
        "module | purpose", ((to_code(f"{name}.py"), _sentence(f"{dotted}.{name}")) for name in files)
    )
