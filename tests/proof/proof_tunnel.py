"""In real time, at production's pace: a tunnel that hangs is noticed and replaced in under a minute, and no run is lost."""

# ruff: noqa: T201 -- a proof prints what it has found

import json
import os
import shlex
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import RunningCommand, environment, run_command
from tests.support.stage import free_port
from tests.support.tunnel_programs import FORWARDER, write_program

LIMIT_SECONDS = 60.0
Line = dict[str, Any]


class Dev:
    """`dev` with the emulator, through a program that forwards; each of the program's lives leaves its pid in a file."""

    def __init__(self, directory: Path, *more: object) -> None:
        self._directory = directory
        source = f"open({str(directory / 'pid')!r}, 'w').write(str(os.getpid()))\n" + FORWARDER
        program = write_program(directory, "forwarder", source.replace("https://127", "http://127"))
        self.ops_port = free_port()
        self.running = RunningCommand(
            "dev", "--emulator", "--json", "--port", 0, "--ops-port", self.ops_port,
            "--command", f"{shlex.quote(str(program))} {{port}} {' '.join(map(str, more))}",
            "--pattern", r"listening at (\S+)",
            cwd=directory, env=environment(), errors=False,
        )  # fmt: skip

    @property
    def pid(self) -> int:
        return int((self._directory / "pid").read_text())

    def until(self, wanted: Callable[[Line], bool]) -> Line:
        found: Line = json.loads(self.running.until(lambda line: wanted(json.loads(line)))[-1])
        return found

    def start(self) -> str:
        inputs = ["--technique-id", "emu-image", "--input", "{id: prompt, type: text, value: a lighthouse}"]
        env = {"RECEIVER_OPERATIONS__PORT": str(self.ops_port)}
        done = run_command("runs", "start", *inputs, cwd=self._directory, env=env)
        assert done.returncode == 0, done.stderr
        return done.stdout.split()[0]


@pytest.mark.parametrize("same_address", [False, True])
@pytest.mark.parametrize("number", [signal.SIGSTOP, signal.SIGKILL])
def test_a_tunnel_that_fails_is_replaced(
    number: signal.Signals, same_address: bool, tmp_path: Path
) -> None:
    """Right after a canary, when it takes longest; a run of that time is stored, and the next one is called back again."""
    dev = Dev(tmp_path, *([free_port()] if same_address else []))
    try:
        dev.until(lambda line: line["kind"] == "canary" and line["code"] == "open")
        os.kill(dev.pid, number)
        began = time.monotonic()
        meanwhile = dev.start()
        opened = dev.until(lambda line: line["kind"] == "tunnel" and bool(line.get("url")))
        noticed = time.monotonic() - began
        dev.until(lambda line: line["kind"] == "file" and line["run_id"] == meanwhile)
        stored = time.monotonic() - began
        address = "same" if same_address else "new"
        print(
            f"\n{number.name}, {address} address: open again after {noticed:.1f} s, its run stored after {stored:.1f} s"
        )
        assert noticed < LIMIT_SECONDS
        assert opened["moved"] is not same_address
        after = dev.start()
        dev.until(lambda line: line["kind"] == "callback" and line["run_id"] == after)
        dev.until(
            lambda line: line["kind"] == "run" and line["run_id"] == after and line["verdict"] == "matched"
        )
    finally:
        assert dev.running.stop() == 0
