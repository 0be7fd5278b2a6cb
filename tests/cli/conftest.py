"""The command in a process of its own, run to its end or until the test ends."""

import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import pytest

from receiver.net import certificates
from tests.support.patience import PATIENCE_SECONDS

COMMAND = Path(sys.executable).with_name("flora-receiver")
API_KEY, SECRET = "sk_test_cli", "whsec_cli"
OWN_WORKSPACE, OWN_SECRET = "ws_own", "whsec_own"
KEYS = {"FLORA_API_KEY": API_KEY, "FLORA_WEBHOOK_SECRET": SECRET}


def environment(**names: str) -> dict[str, str]:
    """Return the environment of a command: what Python needs, and `names`; warnings are errors."""
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}
    return {**kept, "PYTHONWARNINGS": "error", "COLUMNS": "200", **names}


def run_command(
    *arguments: object, cwd: Path, env: Mapping[str, str] = {}
) -> subprocess.CompletedProcess[str]:
    """Run one command to its end."""
    return subprocess.run(
        [COMMAND, *map(str, arguments)],
        cwd=cwd,
        env=environment(**env),
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE_SECONDS,
    )


class RunningCommand:
    """A running command, whose lines on one stream are read as they arrive."""

    def __init__(self, *arguments: object, cwd: Path, env: Mapping[str, str], errors: bool) -> None:
        self._process = subprocess.Popen(
            [COMMAND, *map(str, arguments)],
            cwd=cwd,
            env=environment(**env),
            stdout=subprocess.DEVNULL if errors else subprocess.PIPE,
            stderr=subprocess.PIPE if errors else subprocess.DEVNULL,
            text=True,
        )
        self._lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        stream = self._process.stderr if errors else self._process.stdout
        assert stream is not None
        self._stream = stream
        self._reader = threading.Thread(target=self._read, args=(stream,), daemon=True)
        self._reader.start()

    def until(self, wanted: Callable[[str], bool]) -> list[str]:
        """Return the lines up to the first that is `wanted`."""
        seen: list[str] = []
        while not (seen and wanted(seen[-1])):
            line = self._lines.get(timeout=PATIENCE_SECONDS)
            assert line is not None, "the command ended: " + "".join(seen)
            seen.append(line)
        return seen

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Send a signal, wait, and return the exit code."""
        if self._process.poll() is None:
            self._process.send_signal(number)
        try:
            return self._process.wait(PATIENCE_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            raise
        finally:
            self._reader.join()
            self._stream.close()

    def _read(self, stream: IO[str]) -> None:
        for line in stream:
            self._lines.put(line)
        self._lines.put(None)


Start = Callable[..., RunningCommand]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start commands that run until the test ends."""
    running: list[RunningCommand] = []

    def start_command(*arguments: object, errors: bool = False, **env: str) -> RunningCommand:
        running.append(RunningCommand(*arguments, cwd=tmp_path, env=env, errors=errors))
        return running[-1]

    yield start_command
    for each in running:
        each.stop()


@dataclass(frozen=True)
class RunningService:
    """A `serve` over HTTPS: its callback URL, and the CA to trust."""

    url: str
    ca: Path
    directory: Path


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningService]:
    """Run `serve` with a certificate and `emulator` for all tests of a module."""
    directory = tmp_path_factory.mktemp("served")
    authority = certificates.make_authority()
    ca = directory / "ca.pem"
    ca.write_bytes(authority.pem)
    cert, key = certificates.write(certificates.issue(authority), directory)
    emulator = RunningCommand("emulator", "--port", 0, cwd=directory, env=KEYS, errors=False)
    try:
        base_url = read_exports(emulator)["FLORA_BASE_URL"]
        tls = {"RECEIVER_TLS__CERT": str(cert), "RECEIVER_TLS__KEY": str(key)}
        own = json.dumps([{"id": OWN_WORKSPACE, "secrets": [OWN_SECRET]}])
        env = {
            **KEYS,
            **tls,
            "FLORA_BASE_URL": base_url,
            "RECEIVER_OPERATIONS__PORT": "0",
            "RECEIVER_WORKSPACES": own,
        }
        env["RECEIVER_PUBLIC__BODY_TIMEOUT_SECONDS"] = "3"
        server = RunningCommand(
            "serve", "--host", "127.0.0.1", "--port", 0, cwd=directory, env=env, errors=True
        )
        try:
            yield RunningService(f"{wait_until_ready(server)}/callbacks/flora", ca, directory)
        finally:
            server.stop()
    finally:
        emulator.stop()


def wait_until_ready(server: RunningCommand) -> str:
    """Wait until `serve` accepts connections, and return its address."""
    line: dict[str, Any] = json.loads(server.until(lambda line: "service.ready" in line)[-1])
    return str(line["listening"])


def read_exports(emulator: RunningCommand) -> dict[str, str]:
    """Wait until the emulator accepts connections, and return the variables that it prints."""
    lines = emulator.until(lambda line: "Ctrl-C" in line)
    return dict(line.split("export ")[1].strip().split("=", 1) for line in lines if "export " in line)
