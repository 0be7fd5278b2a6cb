"""What may import what, beyond the layers in `.importlinter`: no cycle of any kind, narrow rooms, a light command."""

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from configparser import ConfigParser
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
HEAVY = {
    "alembic",
    "cryptography",
    "httpx",
    "obstore",
    "prometheus_client",
    "pydantic",
    "sqlalchemy",
    "starlette",
    "structlog",
    "uvicorn",
}


def modules() -> dict[str, Path]:
    """Every module of ours by its dotted name."""
    found = {}
    for package in ("receiver", "handlers"):
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def imported(name: str) -> Iterator[str]:
    """Every module of ours that a module names in an import: at the top, in a function, or for typing alone."""
    for node in ast.walk(ast.parse(MODULES[name].read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in MODULES)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{name} has a relative import"
            inner = {f"{node.module}.{alias.name}" for alias in node.names} & MODULES.keys()
            yield from inner
            if node.module in MODULES and len(inner) < len(node.names):
                yield str(node.module)


GRAPH = {name: set(imported(name)) for name in MODULES}


def test_no_cycle_of_any_kind() -> None:
    """Lazy and typing-only imports count: what needs such a trick is in the wrong place."""
    try:
        TopologicalSorter(GRAPH).prepare()
    except CycleError as error:
        pytest.fail(" imports ".join(reversed(error.args[1])))


@pytest.mark.parametrize(
    ("room", "may_import"),
    [
        ("receiver.errors", ()),
        ("receiver.model", ()),
        ("receiver.decide", ("receiver.model", "receiver.errors")),
        ("receiver.flora.signature", ("receiver.errors",)),
        ("receiver.emulator", ("receiver.flora.signature", "receiver.errors")),
        ("receiver.telemetry", ("receiver.model", "receiver.net.scrubber")),
        ("receiver.net.scrubber", ()),
        ("receiver.net.credentials", ()),
        ("receiver.net.database_url", ()),
        ("receiver.net.ownership", ()),
        ("receiver.net.certificates", ("receiver.net.ownership",)),
        (
            "receiver.cli.dev.tunnel",
            (
                "receiver.errors",
                "receiver.net.addresses",
                "receiver.net.clients",
                "receiver.flora.signature",
                "receiver.cli.doctor.probe",
                "receiver.workers.loop",
            ),
        ),
        ("handlers", ("receiver.handler",)),
    ],
)
def test_a_narrow_room_sees_only_what_it_may(room: str, may_import: tuple[str, ...]) -> None:
    inside = {name for name in GRAPH if name == room or name.startswith(f"{room}.")}
    assert inside
    seen = set().union(*(GRAPH[name] for name in inside)) - inside
    assert seen <= set(may_import)


def test_receiver_never_imports_handlers() -> None:
    """They are found by entry point, as anyone else's are."""
    assert not [
        name
        for name, seen in GRAPH.items()
        if name.startswith("receiver") and any(each.startswith("handlers") for each in seen)
    ]


def test_the_contract_on_handlers_names_each_of_them() -> None:
    """`.importlinter` has no pattern for modules that are not shared: a handler must be added there."""
    contracts = ConfigParser()
    contracts.read(ROOT / ".importlinter", "utf-8")
    named = contracts["importlinter:contract:handlers"]["modules"].split()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    points = project["entry-points"]["flora_receiver.handlers"].values()
    assert named == sorted(point.partition(":")[0] for point in points)


@pytest.mark.parametrize("arguments", [[], ["--help"]])
def test_the_command_starts_without_heavy_modules(arguments: list[str]) -> None:
    """Importing the command, and its help, load only what parses arguments."""
    program = f"""
import sys
import receiver.cli
if {arguments!r}:
    sys.argv = ["flora-receiver", *{arguments!r}]
    try:
        receiver.cli.main()
    except SystemExit:
        pass
print("loaded:", *sorted({HEAVY!r} & sys.modules.keys()))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.stdout.splitlines()[-1:] == ["loaded:"], done.stdout + done.stderr
