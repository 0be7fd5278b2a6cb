"""No test fails because the machine is busy: where tests use real time is listed, with the reason.

Whatever must come is waited for as long as `PATIENCE_SECONDS`. A sleep, a limit of a test's own or
a look at the clock stands in a file that the section "Real time" of tests/README.md names.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TESTS = ROOT / "tests"
REAL_TIME = ("bench", "proof", "example_plugin")
"""Folders whose subject is real time, and a package of its own."""
CLOCKS = ("monotonic", "perf_counter", "loop.time", "get_running_loop().time")
BOUNDED = ("run", "wait", "communicate", "to_thread", "AsyncClient", "Client", "eventually", "over")
"""Calls whose `timeout` or `within` is a limit of the test, not a setting of what it tests."""


def is_number(node: ast.expr) -> bool:
    """Return whether this is a literal number other than 0: a look around takes no time."""
    return isinstance(node, ast.Constant) and isinstance(node.value, int | float) and bool(node.value)


def uses_real_time(call: ast.Call) -> bool:
    """Return whether a call sleeps, reads a clock, or has a limit that is written as a number."""
    function = ast.unparse(call.func)
    name = function.rpartition(".")[2]
    match name:
        case "sleep":
            return not (call.args and isinstance(call.args[0], ast.Constant) and call.args[0].value == 0)
        case "timeout":
            return bool(call.args) and is_number(call.args[0])
        case "wait_for":
            return any(map(is_number, call.args[1:])) or any(
                is_number(each.value) for each in call.keywords
            )
        case _ if function.endswith(CLOCKS):
            return True
        case _ if name in BOUNDED:
            limits = [each.value for each in call.keywords if each.arg in {"timeout", "within"}]
            return any(map(is_number, limits))
        case _:
            return False


def find_real_time(source: str) -> list[int]:
    """Return the lines of a test's source that use real time."""
    calls = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call))
    return sorted({call.lineno for call in calls if uses_real_time(call)})


def list_real_time() -> Iterator[tuple[str, list[int]]]:
    for path in sorted(TESTS.rglob("*.py")):
        if path.relative_to(TESTS).parts[0] not in REAL_TIME:
            lines = find_real_time(path.read_text("utf-8"))
            if lines:
                yield str(path.relative_to(ROOT)), lines


def test_each_use_of_real_time_is_listed_with_its_reason() -> None:
    """And what is listed is there."""
    section = (TESTS / "README.md").read_text("utf-8").partition("## Real time\n")[2].partition("\n## ")[0]
    listed = set(re.findall(r"^\| `(tests/\S+\.py)` \|", section, re.MULTILINE))
    found = dict(list_real_time())
    assert not {path: lines for path, lines in found.items() if path not in listed}
    assert not listed - found.keys()


@pytest.mark.parametrize(
    "line",
    [
        "await asyncio.sleep(0.1)",
        "time.sleep(pause)",
        "asyncio.timeout(5)",
        "await asyncio.wait_for(task, 3)",
        "subprocess.run(command, timeout=30)",
        "httpx.AsyncClient(timeout=5)",
        "await eventually(probe, within=20)",
        "began = time.monotonic()",
        "asyncio.get_running_loop().time()",
    ],
)
def test_real_time_is_found(line: str) -> None:
    assert find_real_time(f"async def test(): {line}") == [1]


@pytest.mark.parametrize(
    "line",
    [
        "await asyncio.sleep(0)",
        "asyncio.timeout(PATIENCE_SECONDS)",
        "await asyncio.wait(tasks, timeout=0)",
        "await ops.get('/api/runs/run_1/wait', timeout=0.2)",
        "FloraClient(http, timeout_seconds=0.1)",
    ],
)
def test_what_takes_no_time_or_is_a_setting_is_not(line: str) -> None:
    assert find_real_time(f"async def test(): {line}") == []
