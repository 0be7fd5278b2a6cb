"""Message brokers on loopback: nats-server, redis-server, librdkafka's mock of Kafka.

Each is a child process that is stopped by its id, can be frozen, and comes back on the same port
with its data.
"""

import contextlib
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.support.patience import PATIENCE_SECONDS

_MOCK = """
import sys
from confluent_kafka import Producer

cluster = Producer({"test.mock.num.brokers": 2, "bootstrap.servers": "unused", "log_level": 0})
brokers = cluster.list_topics(timeout=10).brokers.values()
print(",".join(f"{broker.host}:{broker.port}" for broker in brokers), flush=True)
sys.stdin.read()
"""


def program(name: str) -> str:
    """Return the path of a server's program, or fail with how to install it."""
    found = shutil.which(name) or shutil.which(name, path="/usr/sbin:/usr/local/sbin")
    if found is None:
        pytest.fail(f"{name} is missing: apt-get install {name}", pytrace=False)
    return found


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _freeze(process: subprocess.Popen[Any]) -> None:
    """Freeze a process, and return once all its threads are stopped."""
    process.send_signal(signal.SIGSTOP)
    tasks = Path(f"/proc/{process.pid}/task")
    while any((task / "stat").read_text().rpartition(")")[2].split()[0] != "T" for task in tasks.iterdir()):
        time.sleep(0.001)


@dataclass
class Server:
    """A broker's process."""

    command: Sequence[str]
    port: int
    log: Path
    _process: subprocess.Popen[bytes] | None = field(default=None, init=False)

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def start(self) -> None:
        """Start it, and return when it accepts connections."""
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(self.command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        give_up_at = time.monotonic() + PATIENCE_SECONDS
        while True:
            with (
                contextlib.suppress(OSError),
                socket.create_connection(("127.0.0.1", self.port), timeout=1),
            ):
                return
            if self._process.poll() is not None or time.monotonic() > give_up_at:
                self.kill()
                pytest.fail(f"{self.command[0]} does not start: {self.log.read_text()}", pytrace=False)
            time.sleep(0.01)

    def stop(self) -> None:
        """Stop it properly: its data is on disk."""
        if self._process is not None:
            self.thaw()
            self._process.terminate()
            self._process.wait(PATIENCE_SECONDS)
            self._process = None

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait(PATIENCE_SECONDS)
            self._process = None

    def freeze(self) -> None:
        """Stop responding, with connections open."""
        assert self._process is not None
        _freeze(self._process)

    def thaw(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)


@contextlib.contextmanager
def nats(settings: str = "", *, jetstream: bool = True) -> Iterator[Server]:
    """Run a NATS server inside the block; `settings` are appended to its configuration."""
    with _directory("nats") as directory:
        port = free_port()
        config = directory / "nats.conf"
        store = f'jetstream {{ store_dir: "{directory}/store" }}\n' if jetstream else ""
        config.write_text(f'listen: "127.0.0.1:{port}"\n{store}{settings}')
        with _run_server(
            Server([program("nats-server"), "-c", str(config)], port, directory / "log")
        ) as server:
            yield server


@contextlib.contextmanager
def redis(*options: str, tls: bool = False) -> Iterator[Server]:
    """Run a Redis inside the block that syncs every write; `options` as on its command line."""
    with _directory("redis") as directory:
        port = free_port()
        ports = ["--port", "0", "--tls-port", str(port)] if tls else ["--port", str(port)]
        durable = ["--appendonly", "yes", "--appendfsync", "always", "--save", "", "--dir", str(directory)]
        command = [program("redis-server"), "--bind", "127.0.0.1", *ports, *durable, *options]
        with _run_server(Server(command, port, directory / "log")) as server:
            yield server


@dataclass(frozen=True, slots=True)
class Kafka:
    """A mock cluster of two brokers, which creates topics on first use and keeps nothing."""

    process: subprocess.Popen[str]
    hosts: str

    def freeze(self) -> None:
        _freeze(self.process)

    def thaw(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(PATIENCE_SECONDS)


@contextlib.contextmanager
def kafka() -> Iterator[Kafka]:
    """Run librdkafka's mock cluster inside the block."""
    process = subprocess.Popen(
        [sys.executable, "-c", _MOCK],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdin is not None
    try:
        yield Kafka(process, process.stdout.readline().strip())
    finally:
        process.kill()
        process.wait(PATIENCE_SECONDS)
        process.stdout.close()
        process.stdin.close()


@contextlib.contextmanager
def _directory(name: str) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix=f"flora-{name}-", ignore_cleanup_errors=True) as directory:
        yield Path(directory)


@contextlib.contextmanager
def _run_server(server: Server) -> Iterator[Server]:
    server.start()
    try:
        yield server
    finally:
        server.kill()
