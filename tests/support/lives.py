"""Receivers as processes of their own: many lives of one receiver, each of which may end by `kill -9`."""

import asyncio
import contextlib
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from tests.support.patience import PATIENCE_SECONDS
from tests.support.stage import Stage, eventually, free_port, toml

ROOT = Path(__file__).parents[2]
COMMAND = str(Path(sys.executable).with_name("flora-receiver"))


@dataclass
class Nursery:
    """A process that has imported the receiver and forks lives of it: a start then takes a tenth of a second."""

    stage: Stage
    process: asyncio.subprocess.Process
    client: httpx.AsyncClient
    living: set[int] = field(default_factory=set)
    lives: int = 0

    @property
    def log(self) -> Path:
        return self.stage.directory / "receiver.log"

    async def _order(self, order: Mapping[str, Any]) -> dict[str, Any]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(order).encode() + b"\n")
        await self.process.stdin.drain()
        answer: dict[str, Any] = json.loads(await self.process.stdout.readline())
        return answer

    async def begin(self, *, kill: tuple[int, str] | None = None, **sections: Any) -> int:
        """Start a life and return its pid at once."""
        order: dict[str, Any] = {"settings": self.stage.document(**sections), "log": str(self.log)}
        if kill is not None:
            order["kill"] = {"at": kill[0], "when": kill[1]}
        pid: int = (await self._order(order))["pid"]
        self.living.add(pid)
        self.lives += 1
        return pid

    async def ready(self, pid: int) -> bool:
        """Wait until the receiver says that it is ready; False if it ended before."""

        async def look() -> str | None:
            if await self.status(pid) is not None:
                return "ended"
            return "ready" if await is_ready(self.stage, self.client) else None

        return await eventually(look) == "ready"

    async def status(self, pid: int) -> int | None:
        """Return how a life ended, None while it lasts."""
        if pid not in self.living:
            return 0
        status: int | None = (await self._order({"wait": pid}))["status"]
        if status is not None:
            self.living.discard(pid)
        return status

    async def ended(self, pid: int) -> int:
        async def look() -> tuple[int] | None:
            status = await self.status(pid)
            return None if status is None else (status,)

        found = await eventually(look)
        assert found is not None
        return found[0]

    async def kill(self, pid: int, number: signal.Signals = signal.SIGKILL) -> int:
        """Send a signal and wait for the end."""
        os.kill(pid, number)
        return await self.ended(pid)


async def is_ready(stage: Stage, client: httpx.AsyncClient) -> bool:
    try:
        return (await client.get(f"https://127.0.0.1:{stage.port}/readyz")).status_code == 200
    except httpx.TransportError:
        return False


@contextlib.asynccontextmanager
async def nursery(stage: Stage) -> AsyncIterator[Nursery]:
    """Open the nursery; at the end, end every life that is left."""
    stage.port = free_port()
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "tests.support.nursery", stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, cwd=ROOT
    )  # fmt: skip
    # Every probe on a connection of its own: a kept one may lead to a life that is over.
    limits = httpx.Limits(max_keepalive_connections=0)
    async with httpx.AsyncClient(
        verify=stage.tls(), trust_env=False, timeout=PATIENCE_SECONDS, limits=limits
    ) as client:
        made = Nursery(stage, process, client)
        try:
            yield made
        finally:
            for pid in list(made.living):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            assert process.stdin is not None
            process.stdin.close()
            await process.wait()


@dataclass
class Served:
    """`flora-receiver serve`, the console script, in a process of its own."""

    stage: Stage
    process: asyncio.subprocess.Process
    said: bytes = b""

    @property
    def pid(self) -> int:
        return self.process.pid

    async def ended(self) -> int:
        """Wait for the end; return the exit code. What it said is in `said`."""
        async with asyncio.timeout(PATIENCE_SECONDS):
            out, _ = await self.process.communicate()
        self.said += out or b""
        assert self.process.returncode is not None
        return self.process.returncode

    async def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return await self.ended()

    async def ready(self, client: httpx.AsyncClient) -> None:
        async def look() -> bool:
            assert self.process.returncode is None, await self.ended()
            return await is_ready(self.stage, client)

        await eventually(look)


@contextlib.asynccontextmanager
async def served(
    stage: Stage,
    *,
    arguments: Sequence[str] = (),
    stdout: int = asyncio.subprocess.PIPE,
    stderr: int | None = None,
    environ: Mapping[str, str] = {},
    secrets_in_file: bool = False,
    **sections: Any,
) -> AsyncIterator[Served]:
    """Run the console script with a settings file; secrets go through the environment, as in production.

    `environ` may name files of them (`*_FILE`), or `secrets_in_file` leaves them in receiver.toml.

    Nobody reads the pipe before the end: a test in which much is logged gives a file as `stdout`.
    """
    stage.port = stage.port or free_port()
    document = stage.document(**sections)
    flora = document["flora"]
    variables = {"FLORA_API_KEY": "api_key", "FLORA_WEBHOOK_SECRET": "webhook_secrets"}
    for name, key in variables.items():
        if not secrets_in_file and (value := flora.pop(key)) and f"{name}_FILE" not in environ:
            environ = {**environ, name: value if isinstance(value, str) else ",".join(value)}
    environ = {**environ, "PATH": os.environ["PATH"], "RECEIVER_LOG__FORMAT": "json"}
    config = stage.directory / "receiver.toml"
    config.write_text(toml(document))
    process = await asyncio.create_subprocess_exec(
        COMMAND, "serve", "--config", str(config), *arguments, env=environ, cwd=stage.directory,
        stdin=asyncio.subprocess.DEVNULL, stdout=stdout,
        stderr=asyncio.subprocess.STDOUT if stderr is None else stderr,
    )  # fmt: skip
    try:
        yield Served(stage, process)
    finally:
        if process.returncode is None:
            process.kill()
            await process.communicate()
