"""The real command `dev`, with an emulated FLORA, tunnel programs and sshd."""

import json
import os
import shlex
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import KEYS, RunningCommand, Start, run_command
from tests.support.sshd import sshd
from tests.support.stage import eventually, free_port
from tests.support.tunnel_programs import CLOUDFLARED, FORWARDER, wait_until_gone, write_program

Line = dict[str, Any]
EMULATED = ("--emulator", "--json", "--port", 0)


def until(running: RunningCommand, wanted: Callable[[Line], bool]) -> list[Line]:
    """Return the lines up to the first that is wanted."""
    return [json.loads(line) for line in running.until(lambda line: wanted(json.loads(line)))]


def is_kind(kind: str, **fields: Any) -> Callable[[Line], bool]:
    return lambda line: line["kind"] == kind and all(line[name] == value for name, value in fields.items())


def start_run(cwd: Path, port: int) -> str:
    """Start a run with the command, and return its id."""
    inputs = ["--technique-id", "emu-image", "--input", "{id: prompt, type: text, value: a lighthouse}"]
    done = run_command("runs", "start", *inputs, cwd=cwd, env={"RECEIVER_OPERATIONS__PORT": str(port)})
    assert done.returncode == 0, done.stderr
    return done.stdout.split()[0]


def test_without_a_tunnel_a_callback_is_simulated_for_each_settled_run(
    start: Start, tmp_path: Path
) -> None:
    """The run settles by polling; then its callback reaches the endpoint, and it is matched."""
    port = free_port()
    dev = start("dev", *EMULATED, "--no-tunnel", "--ops-port", port)
    until(dev, is_kind("canary", code="open"))
    run_id = start_run(tmp_path, port)
    lines = until(dev, is_kind("file", run_id=run_id))
    lines += until(dev, is_kind("file", run_id=run_id))
    words = [(line["kind"], line.get("state") or line.get("answer"), line.get("verdict")) for line in lines]
    of_run = [word for word, line in zip(words, lines, strict=True) if line.get("run_id") == run_id]
    assert ("run", "completed", None) in of_run
    assert of_run.index(("callback", "accepted", None)) > of_run.index(("run", "completed", None))
    assert ("run", "completed", "matched") in of_run
    files = [tmp_path / line["file"] for line in lines if line["kind"] == "file"]
    assert {file.name for file in files} == {"output_1.png", "run.json"}
    assert all(file.stat().st_size for file in files)
    assert dev.stop() == 0


async def test_a_callback_arrives_through_ssh_and_tls(start: Start, tmp_path: Path) -> None:
    """FLORA calls the ssh host by HTTPS, the run is matched, and stopping frees the remote port."""
    directory = tmp_path / "sshd"
    directory.mkdir()
    ops_port, remote_port = free_port(), free_port()
    with sshd(directory) as server:
        ssh = ["--ssh", server.address, "--identity", server.identity, "--known-hosts", server.known_hosts]
        dev = start("dev", *EMULATED, *ssh, "--remote-port", remote_port, "--ops-port", ops_port)
        opened = until(dev, is_kind("tunnel"))[-1]
        assert opened["url"] == f"https://127.0.0.1:{remote_port}"
        until(dev, is_kind("canary", code="open"))
        run_id = start_run(tmp_path, ops_port)
        lines = until(dev, is_kind("run", run_id=run_id, verdict="matched"))
        assert any(line["kind"] == "callback" and line["answer"] == "accepted" for line in lines)
        until(dev, is_kind("file", run_id=run_id))
        assert dev.stop() == 0

        async def free() -> bool:
            with socket.socket() as there:
                return there.connect_ex(("127.0.0.1", remote_port)) != 0

        await eventually(free)


async def test_the_tunnel_program_ends_with_dev(start: Start, tmp_path: Path) -> None:
    """Its URL is shown, a canary lost at first is not reported, and SIGTERM leaves no process."""
    program = write_program(
        tmp_path,
        "cloudflared",
        f"open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()))\n" + CLOUDFLARED,
    )
    dev = start("dev", *EMULATED, "--ops-port", 0, PATH=f"{program.parent}:{os.environ['PATH']}")
    opened = until(dev, is_kind("tunnel"))[-1]
    assert (opened["provider"], opened["url"]) == (
        "cloudflared",
        "https://four-plain-made-words.trycloudflare.com",
    )
    pid = int((tmp_path / "pid").read_text())
    assert dev.stop() == 0
    await wait_until_gone(pid)


def test_a_forged_callback_is_shown_with_its_refusal(start: Start, tmp_path: Path) -> None:
    """Nothing of its unverified body is shown."""
    program = write_program(tmp_path, "forwarder", FORWARDER.replace("https://127", "http://127"))
    command = f"{shlex.quote(str(program))} {{port}}"
    dev = start("dev", *EMULATED, "--ops-port", 0, "--command", command, "--pattern", r"listening at (\S+)")
    url = until(dev, is_kind("tunnel"))[-1]["url"]
    forged = ["trigger", f"{url}/callbacks/flora", "--case", "signature_mismatch", "--secret", "whsec_x"]
    assert run_command(*forged, "--run-id", "run_evil", cwd=tmp_path).returncode == 0
    line = until(dev, is_kind("callback"))[-1]
    assert (line["status"], line["answer"], line["run_id"]) == (401, "signature_mismatch", None)
    assert dev.stop() == 0


def test_a_tunnel_that_does_not_open_is_shown_with_its_output(tmp_path: Path) -> None:
    program = write_program(tmp_path, "broken", 'say("ERR no route to the edge"); sys.exit(5)')
    done = run_command(
        "dev", "--emulator", "--port", 0, "--ops-port", 0, "--command", program, cwd=tmp_path
    )
    assert done.returncode == 1
    assert "ended with exit code 5" in done.stdout
    assert "ERR no route to the edge" in done.stdout
    assert "Traceback" not in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "--no-tunnel"),
        (("--ssh", "me@host"), "FLORA calls HTTPS URLs only"),
        (("--public-url", "hooks.example.com"), "--public-url: must be an absolute URL"),
        (("--host", "192.0.2.1"), "--host: must be a loopback"),
        (("--no-tunnel", "--ssh", "me@host"), "--no-tunnel: cannot be combined"),
        (("--no-tunnel", "--ca", "/dev/null"), "--ca: /dev/null holds no certificate"),
    ],
)
def test_unusable_options_are_refused(arguments: tuple[str, ...], message: str, tmp_path: Path) -> None:
    """The exit code is 2, before a tunnel is opened."""
    path = str(Path(sys.executable).parent)
    done = run_command(
        "dev", "--port", 0, "--ops-port", 0, *arguments, cwd=tmp_path, env={**KEYS, "PATH": path}
    )
    assert done.returncode == 2
    assert message in done.stderr
