"""The examples of the documents work as they stand, against a service beside an emulator."""

import asyncio
import os
import re
import shlex
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from starlette.routing import Route

from receiver.service.service import Service
from tests.cli.conftest import RunningCommand
from tests.docs.pages import code_blocks, read_page, run_shell, section
from tests.support.stage import Stage, free_port, run_stage

BIN = Path(sys.executable).parent


def examples(page: str, title: str, language: str) -> list[str]:
    return code_blocks(section(page, title), language)


def size_of(file: str) -> int:
    return Path(file).stat().st_size


@dataclass
class Terminal:
    """A shell beside a running service, which it finds as the documents say."""

    stage: Stage
    service: Service

    async def shell(self, script: str, **env: str) -> str:
        """Run a script, hold that it succeeds, and return what it printed."""
        host, port = self.service.operations_address
        token = (self.stage.directory / "ops-token").read_text().strip()
        process = await asyncio.create_subprocess_exec(
            "sh", "-euc", script,
            cwd=self.stage.directory,
            env={
                "PATH": f"{BIN}:{os.environ['PATH']}",
                "RECEIVER_OPS_URL": f"http://{host}:{port}",
                "RECEIVER_OPS_TOKEN": token,
                **env,
            },
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )  # fmt: skip
        output, errors = await process.communicate()
        assert process.returncode == 0, f"{script}\n{output.decode()}{errors.decode()}"
        return output.decode()


@pytest.fixture
async def terminal(tmp_path: Path) -> AsyncIterator[Terminal]:
    async with run_stage(tmp_path) as stage:
        stage.port = free_port()
        async with stage.service(public_url=f"https://127.0.0.1:{stage.port}") as service:
            yield Terminal(stage, service)


async def test_runs_start_and_are_waited_for_as_shown(terminal: Terminal) -> None:
    """Both examples store their files; a start under FLORA's name of the command is the same."""
    first, second = examples("receiver/docs/runs.md", "Starting runs", "sh")
    run_id, file = (await terminal.shell(first)).split()
    assert size_of(file)
    assert (await terminal.shell(first.replace("runs start", "techniques:runs create"))).split()[
        0
    ] == run_id
    generated = (await terminal.shell(second)).strip()
    (wait,) = examples("receiver/docs/runs.md", "Waiting", "sh")
    assert size_of((await terminal.shell(wait, RUN_ID=generated)).strip())
    assert terminal.stage.run(generated)["metadata"] == '{"market": "de"}'


async def test_python_does_as_shown(terminal: Terminal) -> None:
    (source,) = examples("receiver/docs/python.md", "Python", "python")
    (terminal.stage.directory / "example.py").write_text(source, "utf-8")
    path, size, sha256 = (await terminal.shell(f"{sys.executable} example.py")).split()
    assert size_of(path) == int(size)
    assert len(sha256) == 64


async def test_every_request_is_listed(terminal: Terminal) -> None:
    """The page lists the routes of the application, all of them and no other."""
    assert terminal.service._operations is not None
    app = terminal.service._operations.config.app
    there = {
        f"{method} {re.sub(r':[a-z]+}', '}', route.path)}"
        for route in app.routes  # type: ignore[union-attr]
        if isinstance(route, Route)
        for method in (route.methods or set()) - {"HEAD"}
    }
    assert (
        set(re.findall(r"^\| `((?:GET|POST) [^`]+)` \|", read_page("receiver/docs/api.md"), re.MULTILINE))
        == there
    )


async def test_daily_use_is_as_shown(terminal: Terminal) -> None:
    """The README's five examples, one after the other; `run_abc` is the run of the first."""
    (block,) = examples("README.md", "Daily use", "sh")
    (table,) = code_blocks(read_page("receiver/docs/batches.md"), "csv")
    (terminal.stage.directory / "spring.csv").write_text(table, "utf-8")
    start, *others = block.splitlines()
    run_id = (await terminal.shell(start)).strip()
    wait, batch, listing, explain = (line.replace("run_abc", run_id) for line in others)
    assert size_of((await terminal.shell(wait)).strip())
    await terminal.shell(batch.partition("#")[0] + " --yes")
    assert len((terminal.stage.directory / "results.csv").read_text("utf-8").splitlines()) == 3
    assert (await terminal.shell(listing)).count("run_") == 3
    assert run_id in await terminal.shell(explain)


def test_the_first_minute_is_as_shown(tmp_path: Path) -> None:
    """A receiver and a run in two terminals; `make demo` is tested with the picture."""
    (first, second) = examples("README.md", "Try it in a minute", "sh")
    demo, dev = first.splitlines()
    assert demo == "make demo"
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv/bin").symlink_to(BIN)
    env = {"RECEIVER_OPERATIONS__PORT": str(free_port()), "RECEIVER_PUBLIC__PORT": "0"}
    running = RunningCommand(*shlex.split(dev)[1:], cwd=tmp_path, env=env, errors=False)
    try:
        running.until(lambda line: "the receiver works" in line)
        run_id, file = run_shell(second, tmp_path, env).split()
        assert size_of(file)
        running.until(lambda line: run_id in line and "matched" in line)
    finally:
        assert running.stop() == 0


def test_an_account_is_set_up_as_shown(tmp_path: Path) -> None:
    """`check` accepts what `init` wrote, filled in; the environment is not built again."""
    install, check, _ = examples("README.md", "With a FLORA account", "sh")
    built = "python3() { mkdir -p .venv/bin; : > .venv/bin/activate; }; pip() { :; }\n"
    env = {"PATH": f"{BIN}:{os.environ['PATH']}"}
    run_shell(built + install, tmp_path, env)
    secrets = tmp_path / ".env"
    given = secrets.read_text("utf-8").replace("FLORA_API_KEY=", "FLORA_API_KEY=sk_test_x")
    secrets.write_text(given.replace("FLORA_WEBHOOK_SECRET=", "FLORA_WEBHOOK_SECRET=whsec_x"), "utf-8")
    settings = tmp_path / "receiver.toml"
    (line,) = re.findall(r"`(public_url = [^`]+)`", section("README.md", "With a FLORA account"))
    settings.write_text(settings.read_text("utf-8").replace("# public_url = …", line), "utf-8")
    *before, last = check.splitlines()
    assert last == "flora-receiver serve"
    run_shell("\n".join(before), tmp_path, env)
