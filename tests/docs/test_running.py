"""The README's examples on runs work as they stand: each is run against a service beside an emulator."""

import asyncio
import os
import re
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from starlette.routing import Route

from receiver.service.service import Service
from tests.docs.pages import code_blocks, read_page, section
from tests.support.stage import Stage, free_port, staged

BIN = Path(sys.executable).parent


def examples(page: str, title: str, language: str) -> list[str]:
    return code_blocks(section(page, title), language)


def size_of(file: str) -> int:
    return Path(file).stat().st_size


@dataclass
class Desk:
    """A service that runs, and a shell that finds it as the README says."""

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
        told, errors = await process.communicate()
        assert process.returncode == 0, f"{script}\n{told.decode()}{errors.decode()}"
        return told.decode()


@pytest.fixture
async def desk(tmp_path: Path) -> AsyncIterator[Desk]:
    async with staged(tmp_path) as stage:
        stage.port = free_port()
        async with stage.service(public_url=f"https://127.0.0.1:{stage.port}") as service:
            yield Desk(stage, service)


async def test_runs_start_and_are_waited_for_as_shown(desk: Desk) -> None:
    """The first example stores its file, the second's run is waited for; the start by FLORA's name is the same run."""
    first, second = examples("receiver/docs/runs.md", "Starting runs", "sh")
    run_id, file = (await desk.shell(first)).split()
    assert size_of(file)
    assert (await desk.shell(first.replace("runs start", "techniques:runs create"))).split()[0] == run_id
    generated = (await desk.shell(second)).strip()
    (wait,) = examples("receiver/docs/runs.md", "Waiting", "sh")
    assert size_of((await desk.shell(wait, RUN_ID=generated)).strip())
    assert desk.stage.run(generated)["metadata"] == '{"market": "de"}'


async def test_python_does_as_shown(desk: Desk) -> None:
    (source,) = examples("receiver/docs/python.md", "Python", "python")
    (desk.stage.directory / "example.py").write_text(source, "utf-8")
    path, size, sha256 = (await desk.shell(f"{sys.executable} example.py")).split()
    assert size_of(path) == int(size)
    assert len(sha256) == 64


async def test_every_request_is_listed(desk: Desk) -> None:
    """And none that is not there."""
    assert desk.service._operations is not None
    app = desk.service._operations.config.app
    there = {
        f"{method} {re.sub(r':[a-z]+}', '}', route.path)}"
        for route in app.routes  # type: ignore[union-attr]
        if isinstance(route, Route)
        for method in (route.methods or set()) - {"HEAD"}
    }
    assert set(re.findall(r"^\| `((?:GET|POST) [^`]+)` \|", read_page("receiver/docs/api.md"), re.MULTILINE)) == there
