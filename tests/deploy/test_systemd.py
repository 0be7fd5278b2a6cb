"""systemd's part, played for real: the socket is held outside, readiness and the watchdog are heard, the unit is verified."""

import asyncio
import configparser
import contextlib
import fcntl
import os
import shutil
import socket
import subprocess
from collections.abc import AsyncIterator, Mapping
from pathlib import Path

import httpx
import pytest

from receiver.client.client import ReceiverClient
from receiver.service.systemd import Supervisor, inherited_listeners
from tests.support.lives import COMMAND
from tests.support.patience import PATIENCE_SECONDS
from tests.support.stage import Stage, eventually, run_stage, toml

DEPLOY = Path(__file__).parents[2] / "deploy/systemd"


@pytest.fixture
async def stage(tmp_path: Path) -> AsyncIterator[Stage]:
    async with run_stage(tmp_path) as made:
        yield made


class Manager:
    """Holds the listening sockets and hears what the service says, as systemd does."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage
        self.sockets: list[tuple[str, socket.socket]] = []
        """The sockets and their names, in the order of their descriptors."""
        self.listener = self.hold("public", socket.create_server(("127.0.0.1", 0), backlog=512))
        stage.port = self.listener.getsockname()[1]
        self.address = str(stage.directory / "notify")
        self._ear = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._ear.bind(self.address)
        self._ear.setblocking(False)
        self.heard: list[str] = []

    def hold(self, name: str, listener: socket.socket) -> socket.socket:
        """Pass a socket to the service from now on; return it."""
        self.sockets.append((name, listener))
        return listener

    def hold_unix(self, name: str, path: Path) -> None:
        listener = self.hold(name, socket.socket(socket.AF_UNIX))
        listener.bind(str(path))
        listener.listen()

    def listen(self) -> list[str]:
        with contextlib.suppress(BlockingIOError):
            while True:
                self.heard += self._ear.recv(4096).decode().splitlines()
        return self.heard

    async def said(self, word: str, times: int = 1) -> None:
        async def look() -> bool:
            return self.listen().count(word) >= times

        await eventually(look, what=f"{word} in {self.heard}")

    @contextlib.asynccontextmanager
    async def service(self, environ: Mapping[str, str] = {}) -> AsyncIterator[asyncio.subprocess.Process]:
        """Start the service with the sockets from descriptor 3 on; `LISTEN_PID` is its own, so a shell has to say it."""
        document = self._stage.document()
        flora = document["flora"]
        config = self._stage.directory / "receiver.toml"
        secrets = {
            "FLORA_API_KEY": flora.pop("api_key"),
            "FLORA_WEBHOOK_SECRET": flora.pop("webhook_secrets")[0],
        }
        document["public"] = {
            "host": "127.0.0.1",
            "port": 1,
        }  # which nobody but root could bind, and nobody has to
        config.write_text(toml(document))
        process = await asyncio.create_subprocess_exec(
            "/bin/sh", "-c", 'export LISTEN_PID=$$; exec "$@"', "sh", COMMAND, "serve", "--config", str(config),
            env={"PATH": os.environ["PATH"], **secrets, "LISTEN_FDS": str(len(self.sockets)),
                 "LISTEN_FDNAMES": ":".join(name for name, _ in self.sockets),
                 "NOTIFY_SOCKET": self.address, "WATCHDOG_USEC": "400000", **environ},
            cwd=self._stage.directory, pass_fds=range(3, 3 + len(self.sockets)), preexec_fn=self._place,
            stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
        )  # fmt: skip
        try:
            yield process
        finally:
            if process.returncode is None:
                process.kill()
            await process.wait()

    def _place(self) -> None:
        """Give the sockets their descriptors, in the process that becomes the service."""
        # First out of the way: one may lie where another belongs.
        high = [fcntl.fcntl(each, fcntl.F_DUPFD, 200) for _, each in self.sockets]
        for number, descriptor in enumerate(high):
            os.dup2(descriptor, 3 + number)

    def close(self) -> None:
        for _, each in self.sockets:
            each.close()
        self._ear.close()


async def test_a_restart_refuses_no_connection(stage: Stage) -> None:
    """The socket outlives the service: who calls in between waits in its queue, and is answered by the next life."""
    manager = Manager(stage)
    async with stage.client() as client:
        async with manager.service() as first:
            await manager.said("READY=1")
            await manager.said("WATCHDOG=1", 3)
            assert (await stage.send(client, stage.body("run_before"))).status_code == 200
            first.terminate()
            assert await first.wait() == 0
            assert "STOPPING=1" in manager.listen()
        between = [asyncio.create_task(_called(stage, f"run_{number}")) for number in range(20)]
        async with manager.service():
            await manager.said("READY=1", 2)
            assert set(await asyncio.gather(*between)) == {200}
    manager.close()
    assert len(stage.rows("SELECT run_id FROM runs")) == 21


async def test_every_socket_is_served(stage: Stage) -> None:
    """As many as there are, on addresses and on Unix sockets: what systemd accepts, somebody answers."""
    paths = [stage.directory / name for name in ("public.sock", "operations.sock")]
    manager = Manager(stage)
    other = manager.hold("flora-receiver.socket", socket.create_server(("127.0.0.1", 0)))
    manager.hold_unix("public", paths[0])
    manager.hold_unix("operations", paths[1])
    async with stage.client() as client, manager.service({"RECEIVER_OPS_TOKEN": "t"}) as process:
        await manager.said("READY=1")
        transport = httpx.AsyncHTTPTransport(uds=str(paths[0]))
        async with httpx.AsyncClient(transport=transport) as local:
            for caller, origin in (
                (client, f"https://127.0.0.1:{stage.port}"),
                (client, f"https://127.0.0.1:{other.getsockname()[1]}"),
                (local, "http://receiver"),
            ):
                assert (await caller.get(f"{origin}/readyz")).json() == {"status": "ready"}, origin
        with ReceiverClient(f"unix:{paths[1]}", "t") as receiver:
            assert await asyncio.to_thread(list, receiver.runs()) == []
        process.terminate()
        assert await process.wait() == 0
    assert all(path.exists() for path in paths), "they are systemd's"
    manager.close()


@pytest.mark.parametrize("kind", [socket.SOCK_DGRAM, socket.SOCK_SEQPACKET, socket.SOCK_STREAM])
async def test_a_socket_that_cannot_be_served_is_named(stage: Stage, kind: int) -> None:
    """Datagrams, packets, or a stream that does not listen (`Accept=yes`): the service does not start."""
    manager = Manager(stage)
    manager.hold("extra", socket.socket(socket.AF_UNIX, kind))
    async with manager.service() as process:
        out, _ = await process.communicate()
    manager.close()
    assert process.returncode != 0
    assert b"socket 4 (extra)" in out
    assert b"ListenStream=" in out


async def _called(stage: Stage, run_id: str) -> int:
    async with httpx.AsyncClient(verify=stage.tls(), trust_env=False, timeout=PATIENCE_SECONDS) as client:
        return (await stage.send(client, stage.body(run_id))).status_code


async def test_what_hangs_says_nothing() -> None:
    """A loop or a writer that does not come back is not alive: systemd hears no word, and starts the service anew."""
    said: list[str] = []

    class Listening(Supervisor):
        def notify(self, *lines: str) -> None:
            said.extend(lines)

    hanging = asyncio.Event()
    lives = 3

    async def alive() -> None:
        nonlocal lives
        lives -= 1
        if lives < 0:
            await hanging.wait()

    watching = asyncio.create_task(Listening("@nobody", 0.002).run_watchdog(alive))

    async def silent() -> bool:
        return lives < 0

    await eventually(silent)
    assert said == ["WATCHDOG=1"] * 3
    watching.cancel()


def test_what_is_not_for_us_is_left_alone() -> None:
    """Sockets and a watchdog are for one process: a child of ours that inherits the names takes neither."""
    assert inherited_listeners({"LISTEN_PID": "1", "LISTEN_FDS": "1"}, 2) == {}
    assert inherited_listeners({}, 2) == {}
    assert inherited_listeners({"LISTEN_PID": "2", "LISTEN_FDS": ""}, 2) == {}
    assert Supervisor.from_environment({"WATCHDOG_USEC": "1000000", "WATCHDOG_PID": "1"}, 2) == Supervisor()
    assert Supervisor.from_environment(
        {"WATCHDOG_USEC": "1000000", "NOTIFY_SOCKET": "/x"}, 2
    ) == Supervisor("/x", 1.0)
    Supervisor().notify("READY=1")
    Supervisor("/nowhere/at/all").notify("READY=1")


def test_the_unit_is_as_systemd_wants_it(tmp_path: Path) -> None:
    """`systemd-analyze verify` has nothing to say about the shipped files but where the program is."""
    program = shutil.which("systemd-analyze")
    if program is None:
        pytest.fail("systemd-analyze is missing: apt-get install systemd", pytrace=False)
    for name in ("flora-receiver.service", "flora-receiver.socket"):
        text = (DEPLOY / name).read_text()
        (tmp_path / name).write_text(
            text.replace("/opt/flora-receiver/.venv/bin/flora-receiver", "/bin/true")
        )
    done = subprocess.run(
        [program, "verify", tmp_path / "flora-receiver.service", tmp_path / "flora-receiver.socket"],
        capture_output=True, text=True, check=False, env={**os.environ, "SYSTEMD_LOG_LEVEL": "warning"},
    )  # fmt: skip
    ours = [line for line in (done.stdout + done.stderr).splitlines() if "flora-receiver" in line]
    assert (done.returncode, ours) == (0, [])


def test_the_unit_is_hardened() -> None:
    """By `systemd-analyze security`'s own count, in which 10 is an open door; the threshold is in tenths."""
    program = shutil.which("systemd-analyze")
    assert program is not None
    command = [
        program,
        "security",
        "--offline=yes",
        "--threshold=20",
        "--no-pager",
        f"{DEPLOY}/flora-receiver.service",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Overall exposure level" in done.stdout


def test_the_unit_never_gives_up() -> None:
    """A database that is away at the start ends each start at once: five of those in ten seconds must not be the last.

    Nor may a check come before the service: a bucket that refuses its key is no reason to refuse callbacks.
    """
    unit = configparser.ConfigParser(strict=False, interpolation=None)
    unit.read(DEPLOY / "flora-receiver.service")
    assert unit["Unit"]["StartLimitIntervalSec"] == "0"
    assert unit["Service"]["Restart"] == "always"
    assert unit["Service"]["ExecReload"] == "/bin/kill -HUP $MAINPID"
    assert "ExecStartPre" not in unit["Service"]
