"""The three commands of "Through a tunnel" work as they stand, but for the host's name."""

import shlex
import subprocess
import sys
from pathlib import Path

from tests.cli.conftest import COMMAND, RunningCommand
from tests.docs.pages import code_blocks, run_shell, section
from tests.docs.source_parts import ROOT
from tests.support.patience import PATIENCE_SECONDS
from tests.support.sshd import sshd
from tests.support.stage import free_port


def test_three_commands_lead_from_a_clone_to_a_stored_file(tmp_path: Path) -> None:
    """The callback arrives through sshd and TLS, and the file is where the last command says."""
    blocks = code_blocks(section("receiver/docs/laptop.md", "Through a tunnel"), "sh")
    install, dev, run = [line for block in blocks for line in block.splitlines()]
    subprocess.run(shlex.split(install), cwd=ROOT, check=True, timeout=PATIENCE_SECONDS)
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv/bin").symlink_to(Path(sys.executable).parent)
    directory = tmp_path / "sshd"
    directory.mkdir()
    # Ports that are free here; the key and the host's key are those of this sshd.
    env = {"RECEIVER_OPERATIONS__PORT": str(free_port()), "RECEIVER_PUBLIC__PORT": "0"}
    program, *arguments = shlex.split(dev)
    assert tmp_path.joinpath(program).samefile(COMMAND)
    with sshd(directory) as server:
        arguments[arguments.index("you@hooks.example.com")] = server.address
        remote_port = free_port()
        here = (
            "--identity",
            server.identity,
            "--known-hosts",
            server.known_hosts,
            "--remote-port",
            remote_port,
        )
        running = RunningCommand(*arguments, *here, cwd=tmp_path, env=env, errors=False)
        try:
            seen = running.until(lambda line: "callbacks arrive" in line)
            assert any(f"https://127.0.0.1:{remote_port}/callbacks/flora" in line for line in seen)
            run_id, file = run_shell(run, tmp_path, env).split()
            told = running.until(lambda line: "output_1.png" in line)
        finally:
            assert running.stop() == 0
    assert Path(file).read_bytes().startswith(b"\x89PNG")
    assert sum(f"callback  {run_id}  completed  accepted" in line for line in told) == 1
    assert any("matched" in line for line in told)
