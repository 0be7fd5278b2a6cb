"""Batches on the stage: a table, the command as a process, and the check of every row's result."""

import asyncio
import csv
import json
import os
import secrets
import signal
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from receiver.client.client import ReceiverClient
from tests.support.lives import COMMAND
from tests.support.stage import Stage, eventually, free_port

T = TypeVar("T")
WEATHER: tuple[Mapping[str, Any], ...] = (
    {"kind": "drop", "probability": 0.2},
    {"kind": "duplicate", "probability": 0.1},
    {"kind": "rate_limited", "probability": 0.05, "retry_after": 0.3},
    {"kind": "internal_error", "probability": 0.02},
)
PRICE = 0.04
"""Of emu-image, in USD."""
KEY = "{metadata[batch]}/{metadata[name]}{ext}"
LONGEST_SECONDS = 300.0


@dataclass(frozen=True, slots=True)
class CommandResult:
    """The exit code of the command, and its output."""

    code: int
    out: str
    err: str

    @property
    def data(self) -> Any:
        return json.loads(self.out)


@dataclass
class BatchStage:
    """Batches on a stage, with the operations port and the token of its receiver."""

    stage: Stage
    token: str = field(default_factory=lambda: secrets.token_hex(16))
    port: int = field(default_factory=free_port)

    def settings(self) -> dict[str, Any]:
        """Return the settings of a receiver that starts runs and names files after rows."""
        self.stage.port = self.stage.port or free_port()
        return {
            "public_url": f"https://127.0.0.1:{self.stage.port}",
            "operations": {"host": "127.0.0.1", "port": self.port, "token": self.token},
            "handlers": [{"use": "storage", "options": {"url": str(self.stage.outputs), "key": KEY}}],
        }

    def call(self, ask: Callable[[ReceiverClient], T]) -> T:
        """Call the operations API as a program does; blocking."""
        with ReceiverClient(self.environment()["RECEIVER_OPS_URL"], self.token) as receiver:
            return ask(receiver)

    def table(self, rows: int, name: str = "spring.csv") -> Path:
        """Write a table of rows `r0`, `r1`, … whose prompts differ and have newlines."""
        path = self.stage.directory / name
        with path.open("w", encoding="utf-8-sig", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["market_code", "headline"])
            writer.writerows((f"r{number}", f'Row {number},\nsays "hello"') for number in range(rows))
        return path

    def environment(self) -> dict[str, str]:
        return {
            "PATH": os.environ["PATH"],
            "RECEIVER_OPS_URL": f"http://127.0.0.1:{self.port}",
            "RECEIVER_OPS_TOKEN": self.token,
        }

    def arguments(self, file: Path | str, *more: str) -> list[str]:
        options = ["--technique-id", "emu-image", "--map", "prompt={headline}", "--key", "{market_code}"]
        return ["runs", "batch", str(file), *options, *more]

    async def begin(
        self, *arguments: str, stdin: int = asyncio.subprocess.DEVNULL
    ) -> asyncio.subprocess.Process:
        return await asyncio.create_subprocess_exec(
            COMMAND, *arguments, env=self.environment(), cwd=self.stage.directory, stdin=stdin,
            stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
        )  # fmt: skip

    async def end(self, process: asyncio.subprocess.Process, given: bytes | None = None) -> CommandResult:
        try:
            async with asyncio.timeout(LONGEST_SECONDS):
                out, err = await process.communicate(given)
        except TimeoutError:
            process.kill()
            out, err = await process.communicate()
            raise AssertionError(
                f"the batch did not end: {out.decode()[-2000:]} {err.decode()[-2000:]}"
            ) from None
        assert process.returncode is not None
        return CommandResult(process.returncode, out.decode(), err.decode())

    async def batch(self, file: Path | str, *more: str, given: bytes | None = None) -> CommandResult:
        """Run the command to its end."""
        stdin = asyncio.subprocess.DEVNULL if given is None else asyncio.subprocess.PIPE
        return await self.end(await self.begin(*self.arguments(file, *more), stdin=stdin), given)

    async def stop(
        self, process: asyncio.subprocess.Process, number: signal.Signals = signal.SIGINT
    ) -> CommandResult:
        process.send_signal(number)
        return await self.end(process)

    def count_started(self) -> int:
        """Return how many runs the emulator has started."""
        return len(self.stage.emulator.runs._order)

    async def until_started(self, count: int) -> None:
        async def has_started() -> bool:
            return self.count_started() >= count

        await eventually(has_started, what=f"{count} runs at FLORA")

    def results(self, name: str = "results.csv") -> list[dict[str, str]]:
        with (self.stage.directory / name).open(newline="", encoding="utf-8-sig") as file:
            return list(csv.DictReader(file))

    def check(self, rows: int, *, batch: str = "spring") -> None:
        """Check that each row was started once and settled, its file stored, and the cost right."""
        runs = {run_id: self.stage.emulator.runs.get(run_id) for run_id in self.stage.emulator.runs._order}
        prompts = Counter(run.outputs[0].text for run in runs.values())
        assert prompts == Counter(f'Row {number},\nsays "hello"' for number in range(rows)), (
            "started twice, or never"
        )
        results = self.results()
        assert [row["key"] for row in results] == [f"r{number}" for number in range(rows)]
        assert {row["state"] for row in results} == {"completed"}
        assert {row["run_id"] for row in results} == set(runs)
        assert round(sum(float(row["cost"]) for row in results), 6) == round(
            sum(run.cost for run in runs.values()), 6
        )
        for row in results:
            assert runs[row["run_id"]].outputs[0].text == f'Row {row["key"][1:]},\nsays "hello"'
            manifest = self.stage.check_files(row["run_id"])
            assert manifest["metadata"]["market_code"] == row["key"]
            file = self.stage.outputs / batch / f"{row['key']}.png"
            assert self.stage.files(row["run_id"])[0] == file
            assert row["files"] == file.as_uri()
        assert len(list((self.stage.outputs / batch).glob("*.png"))) == rows
        assert self.stage.parts() == []
        states = Counter(row["state"] for row in self.stage.rows("SELECT state FROM starts"))
        assert states == {"started": rows}
