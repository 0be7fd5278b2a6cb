"""OpenSSH's sshd on loopback, with keys and configuration in a temporary directory."""

import getpass
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.support.patience import PATIENCE_SECONDS
from tests.support.stage import free_port

CONFIG = """
ListenAddress 127.0.0.1
Port {port}
HostKey {directory}/host_key
AuthorizedKeysFile {directory}/client_key.pub
PidFile none
StrictModes no
UsePAM no
PasswordAuthentication no
KbdInteractiveAuthentication no
PermitRootLogin prohibit-password
AllowTcpForwarding yes
GatewayPorts clientspecified
LogLevel VERBOSE
"""


@dataclass(frozen=True)
class Sshd:
    """A running server: log in as `user` with `identity`; `known_hosts` has its key."""

    port: int
    user: str
    identity: Path
    known_hosts: Path
    process: "subprocess.Popen[bytes]"

    @property
    def address(self) -> str:
        return f"{self.user}@127.0.0.1:{self.port}"


@contextmanager
def sshd(directory: Path) -> Iterator[Sshd]:
    """Run a server until the block ends."""
    program = shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/sbin:/usr/local/sbin")
    assert program is not None, "sshd is missing; on Debian and Ubuntu: apt-get install openssh-server"
    for name in ("host_key", "client_key"):
        key = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(directory / name)]
        subprocess.run(key, check=True)
    port = free_port()
    (directory / "sshd_config").write_text(CONFIG.format(port=port, directory=directory))
    host_key = (directory / "host_key.pub").read_text()
    (directory / "known_hosts").write_text(f"[127.0.0.1]:{port} {host_key}")
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)  # its privilege separation directory
    with (directory / "sshd.log").open("wb") as log:
        command = [program, "-D", "-e", "-f", str(directory / "sshd_config")]
        process = subprocess.Popen(command, stderr=log, stdin=subprocess.DEVNULL)
        try:
            _wait_until_listening(directory / "sshd.log", process)
            yield Sshd(
                port, getpass.getuser(), directory / "client_key", directory / "known_hosts", process
            )
        finally:
            process.terminate()
            process.wait(PATIENCE_SECONDS)


def _wait_until_listening(log: Path, process: "subprocess.Popen[bytes]") -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while "Server listening" not in log.read_text():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.02)
