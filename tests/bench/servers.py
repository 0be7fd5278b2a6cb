"""The servers that are measured, as processes pinned to one core: ours by its console script, and its rivals."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.bench.load import SECRET, SERVER_CORE

ROOT = Path(__file__).parents[2]
WITHOUT_UVLOOP = Path(__file__).with_name("without_uvloop")
COMMAND = str(Path(sys.executable).with_name("flora-receiver"))
_TICKS = os.sysconf("SC_CLK_TCK")


@dataclass
class Process:
    """A server that answers on `port`."""

    pid: int
    port: int
    ready_seconds: float
    log: Path
    command: str = ""

    def cpu_seconds(self) -> float:
        """Return the processor time that all of its threads have taken, in user mode and in the kernel's."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / _TICKS

    def said(self) -> str:
        """Return the end of its log, to tell why something failed."""
        return self.log.read_text(errors="replace")[-2000:]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


@contextlib.contextmanager
def running(
    command: Sequence[str],
    port: int,
    *,
    environ: Mapping[str, str],
    cwd: Path,
    core: int | None = SERVER_CORE,
) -> Iterator[Process]:
    """Run a server until the block is left; it is ready when `/readyz` answers, with whatever status."""
    began = time.perf_counter()
    log = (cwd / "server.log").open("ab")
    pinned = ["taskset", "-c", str(core), *command] if core is not None else list(command)
    process = subprocess.Popen(
        pinned, env=dict(environ), cwd=cwd, stdin=subprocess.DEVNULL, stdout=log, stderr=log
    )
    try:
        while not _answers(port):
            if process.poll() is not None or time.perf_counter() - began > 30:
                raise AssertionError(
                    f"the server did not begin: {(cwd / 'server.log').read_text()[-2000:]}"
                )
            time.sleep(0.005)
        yield Process(process.pid, port, time.perf_counter() - began, cwd / "server.log", " ".join(command))
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        log.close()


def _answers(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 2) as connection:
        connection.sendall(b"GET /readyz HTTP/1.1\r\nHost: bench\r\nConnection: close\r\n\r\n")
        return connection.recv(16).startswith(b"HTTP/1.1 ")
    return False


@contextlib.contextmanager
def receiver(
    directory: Path,
    *arguments: str,
    core: int | None = SERVER_CORE,
    settings: Mapping[str, str] | None = None,
    uvloop: bool = False,
) -> Iterator[Process]:
    """Run `flora-receiver serve` with its SQLite file in `directory`; settings as environment variables."""
    port = free_port()
    environ = {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": _path(uvloop=uvloop),
        "FLORA_WEBHOOK_SECRET": SECRET,
        "FLORA_API_KEY": "sk_test_bench",
        "FLORA_BASE_URL": "http://127.0.0.1:9/api/v1",
        "RECEIVER_PUBLIC__HOST": "127.0.0.1",
        "RECEIVER_PUBLIC__PORT": str(port),
        "RECEIVER_OPERATIONS__PORT": "0",
        "RECEIVER_DATABASE__URL": f"sqlite:///{directory}/receiver.db",
        "RECEIVER_LOG__FORMAT": "json",
        **(settings or {}),
    }
    with running(
        [COMMAND, "serve", *arguments], port, environ=environ, cwd=directory, core=core
    ) as process:
        yield process


@contextlib.contextmanager
def door(directory: Path, *, uvloop: bool = False) -> Iterator[Process]:
    """Run the door alone: nothing polls, nothing is dispatched."""
    alone = {"RECEIVER_BENCH_DOOR": "1"}
    with receiver(directory, "--only", "door", settings=alone, uvloop=uvloop) as process:
        yield process


@contextlib.contextmanager
def rival(
    name: str, directory: Path, *command: str, uvloop: bool = False, **environ: str
) -> Iterator[Process]:
    """Run a rival of `tests/bench/rivals` on a free port, which it finds in its environment."""
    port = free_port()
    given = {
        **os.environ,
        "PORT": str(port),
        "SECRET": SECRET,
        "DATABASE": str(directory / f"{name}.db"),
        **environ,
    }
    given["PYTHONPATH"] = os.pathsep.join(filter(None, (_path(uvloop=uvloop), given.get("PYTHONPATH"))))
    command = command or (sys.executable, "-m", f"tests.bench.rivals.{name}")
    with running(command, port, environ=given, cwd=directory) as process:
        yield process


def _path(*, uvloop: bool) -> str:
    return str(ROOT) if uvloop else f"{WITHOUT_UVLOOP}{os.pathsep}{ROOT}"


@contextlib.contextmanager
def emulator(directory: Path, *, core: int, nice: int = 0) -> Iterator[tuple[Process, dict[str, str]]]:
    """Run an emulated FLORA; yield it with the settings that lead a receiver to it."""
    port = free_port()
    command = ["nice", "-n", str(nice), COMMAND, "emulator", "--port", str(port), "--run-seconds", "0"]
    with running(command, port, environ=os.environ, cwd=directory, core=core) as process:
        settings = {
            "FLORA_BASE_URL": f"http://127.0.0.1:{port}/api/v1",
            "FLORA_API_KEY": "sk_test_emulator",
        }
        yield process, settings
