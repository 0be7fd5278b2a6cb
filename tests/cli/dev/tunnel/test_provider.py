"""Each provider by itself: what it reads, what it refuses, and that it leaves no process."""

import asyncio
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import ngrok
import pytest

from receiver.cli.dev.tunnel.choice import TunnelOptions, choose_provider
from receiver.cli.dev.tunnel.cloudflared import Cloudflared
from receiver.cli.dev.tunnel.command import Command
from receiver.cli.dev.tunnel.ngrok import Ngrok
from receiver.cli.dev.tunnel.process import Program
from receiver.cli.dev.tunnel.provider import FixedUrl, LocalEndpoint
from receiver.cli.dev.tunnel.ssh import Account, Ssh, parse_account
from receiver.cli.doctor.probe import probe
from receiver.config.callback_url import CALLBACK_PATH
from receiver.errors import ConfigError, TunnelError
from receiver.net.clients import probe_client
from tests.support.sshd import Sshd
from tests.support.stage import Stage, free_port
from tests.support.tunnel_programs import CLOUDFLARED, FORWARDER, is_alive, wait_until_gone, write_program

LOCAL = LocalEndpoint(8080)


# --- programs ---


async def test_the_url_of_cloudflared_is_read_from_its_output(tmp_path: Path) -> None:
    """The host of the API, which an error line names first, is skipped."""
    tunnel = Cloudflared(program=str(write_program(tmp_path, "cloudflared", CLOUDFLARED)))
    assert await tunnel.open(LOCAL) == "https://four-plain-made-words.trycloudflare.com"
    assert await tunnel.open(LOCAL) == "https://four-plain-made-words.trycloudflare.com"
    await tunnel.close()
    await tunnel.close()


async def test_the_output_of_a_failed_program_is_in_the_error(tmp_path: Path) -> None:
    refused = 'say("ERR error code: 1015 status_code=429 Too Many Requests"); sys.exit(3)'
    tunnel = Cloudflared(program=str(write_program(tmp_path, "cloudflared", refused)))
    with pytest.raises(TunnelError, match="exit code 3") as caught:
        await tunnel.open(LOCAL)
    assert caught.value.printed == ("ERR error code: 1015 status_code=429 Too Many Requests",)


async def test_a_program_without_a_url_is_ended_after_a_limit(tmp_path: Path) -> None:
    silent = 'say("one moment"); print(os.getpid(), flush=True); time.sleep(3600)'
    tunnel = Command(str(write_program(tmp_path, "silent", silent)), within_seconds=0.5)
    with pytest.raises(TunnelError, match=r"within 0\.5 s") as caught:
        await tunnel.open(LOCAL)
    assert caught.value.printed[0] == "one moment"
    await wait_until_gone(int(caught.value.printed[1]))


async def test_a_program_that_is_not_installed() -> None:
    with pytest.raises(TunnelError, match="no program 'no-such-tunnel'"):
        await Command("no-such-tunnel {port}").open(LOCAL)


async def test_command_forwards_bytes(stage: Stage, tmp_path: Path) -> None:
    """TLS passes through it end to end, colours are removed from its URL, closing ends it."""
    program = write_program(tmp_path, "forwarder", FORWARDER)
    tunnel = Command(f"{shlex.quote(str(program))} {{port}}", r"listening at (https://\S+)")
    async with stage.service() as service, probe_client(ca=stage.ca) as client:
        url = await tunnel.open(LocalEndpoint(service.address[1], tls=True))
        assert re.fullmatch(r"https://127\.0\.0\.1:\d+", url)
        assert (await probe(url + CALLBACK_PATH, stage.secret, client=client)).has_arrived
        await tunnel.close()
        assert not (await probe(url + CALLBACK_PATH, stage.secret, client=client)).has_arrived


@pytest.mark.parametrize(
    ("line", "pattern", "url"),
    [
        ("your url is: https://cool.loca.example", None, "https://cool.loca.example"),
        ("see <https://a.example/docs>", None, "https://a.example"),
        ("listening at bore.example:4321", r"listening at (\S+)", "https://bore.example:4321"),
        ("forwarding on port 4321", r"port \d+", None),
        ("x https:// y", r"https://", None),
        ("open (https://a.example).", None, "https://a.example"),
        ("open [https://a.example:81]!", None, "https://a.example:81"),
        ("**https://a.example**; twice: https://b.example", None, "https://a.example"),
        ("\x1b]8;;https://a.example/x\x07here\x1b]8;;\x07", None, "https://a.example"),
        ('{"url":"https://a.example"}', None, "https://a.example"),
        ("at https://[2001:db8::1]:8443/", None, "https://[2001:db8::1]:8443"),
        ("listening at (https://a.example).", r"listening at \((\S+)", "https://a.example"),
        ("listening at [a.example:81],", r"listening at \[(\S+)", "https://a.example:81"),
        ("listening at https://[::1]:81;", r"listening at (\S+)", "https://[::1]:81"),
        ("listening at <a$b>", r"listening at <(\S+)", None),
    ],
)
async def test_the_url_that_a_pattern_finds(line: str, pattern: str | None, url: str | None) -> None:
    """It is the first group or the whole match, without a path; a bare name gets https."""
    source = f"print({line!r}, flush=True); import time; time.sleep(3600)"
    command = f"{sys.executable} -c {shlex.quote(source)}"
    tunnel = Command(command) if pattern is None else Command(command, pattern)
    if url is None:
        with pytest.raises(TunnelError, match="not a URL"):
            await tunnel.open(LOCAL)
    else:
        assert await tunnel.open(LOCAL) == url
        await tunnel.close()


async def test_a_line_without_an_end_is_read(tmp_path: Path) -> None:
    """For example, a program may wait at a prompt."""
    waiting = 'print("your url: https://a.example", end="", flush=True); time.sleep(3600)'
    tunnel = Command(str(write_program(tmp_path, "waiting", waiting)))
    assert await tunnel.open(LOCAL) == "https://a.example"
    await tunnel.close()


async def test_placeholders_of_a_command_are_replaced() -> None:
    program = 'import sys, time; print("https://x.example", sys.argv[1:], flush=True); time.sleep(3600)'
    tunnel = Command(
        f"{sys.executable} -c {shlex.quote(program)} {{port}} {{host}}:{{port}} {{url}} '$HOME {{x}}'"
    )
    await tunnel.open(LocalEndpoint(81, tls=True))
    assert tunnel._program is not None
    assert tunnel._program.printed[-1].endswith(
        "['81', '127.0.0.1:81', 'https://127.0.0.1:81', '$HOME {x}']"
    )
    await tunnel.close()


async def test_a_suspended_program_is_ended_with_its_children(tmp_path: Path) -> None:
    """After SIGSTOP it does not handle SIGTERM, so the whole group gets SIGKILL."""
    source = (
        "import subprocess; child = subprocess.Popen(['sleep', '3600']);"
        "say(f'{os.getpid()} {child.pid}'); time.sleep(3600)"
    )
    program = await Program.start([str(write_program(tmp_path, "family", source))])
    found = await program.find(re.compile(r"(\d+) (\d+)"), within_seconds=20)
    parent, child = int(found[1]), int(found[2])
    os.kill(parent, signal.SIGSTOP)
    assert is_alive(parent)
    await program.stop()
    await wait_until_gone(parent)
    await wait_until_gone(child)


async def test_wait_closed_returns_the_exit_code(tmp_path: Path) -> None:
    program = await Program.start([str(write_program(tmp_path, "short", "sys.exit(7)"))])
    assert (await program.wait_closed()).endswith("short ended with exit code 7")
    await program.stop()


def test_a_program_does_not_outlive_a_killed_parent(tmp_path: Path) -> None:
    """After SIGKILL only the closed pipe can end the program."""
    write_program(tmp_path, "tunnel", "say(str(os.getpid())); time.sleep(3600)")
    parent = f"""
import asyncio, re
from receiver.cli.dev.tunnel.process import Program
async def main():
    program = await Program.start(["{tmp_path}/tunnel"])
    found = await program.find(re.compile("[0-9]+"), within_seconds=20)
    print(found[0], flush=True)
    await asyncio.sleep(3600)
asyncio.run(main())
"""
    with subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        pid = int(process.stdout.readline())
        assert is_alive(pid)
        process.kill()
    asyncio.run(wait_until_gone(pid))


# --- ssh ---


def connect_to(server: Sshd, remote_port: int, **more: Any) -> Ssh:
    given = {"known_hosts": server.known_hosts, "identity": server.identity} | more
    return Ssh(Account("127.0.0.1", server.user, server.port), remote_port=remote_port, **given)


def public(key: Path) -> str:
    return key.with_suffix(".pub").read_text()


@pytest.fixture
def other_key(tmp_path: Path) -> Path:
    """A private key that the server does not accept; its public half is beside it."""
    key = tmp_path / "other_key"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key], check=True)
    return key


@pytest.fixture
def locked_key(other_key: Path) -> Path:
    """A private key with a passphrase."""
    subprocess.run(
        ["ssh-keygen", "-q", "-p", "-N", "a passphrase", "-f", other_key], check=True, capture_output=True
    )
    return other_key


@pytest.fixture
def junk(tmp_path: Path) -> Path:
    """A file that is neither a key nor a list of hosts."""
    path = tmp_path / "junk"
    path.write_text("junk\n")
    return path


async def test_ssh_against_openssh(stage: Stage, ssh_server: Sshd) -> None:
    """TLS passes through end to end; closing frees the port; it can be reopened."""
    port = free_port()
    tunnel = connect_to(ssh_server, port)
    async with stage.service() as service, probe_client(ca=stage.ca) as client:
        local = LocalEndpoint(service.address[1], tls=True)
        for _ in range(2):
            url = await tunnel.open(local)
            assert url == f"https://127.0.0.1:{port}"
            assert (await probe(url + CALLBACK_PATH, stage.secret, client=client)).has_arrived
            await tunnel.close()
            assert not (await probe(url + CALLBACK_PATH, stage.secret, client=client)).has_arrived


async def test_ssh_to_a_host_whose_proxy_ends_tls(stage: Stage, ssh_server: Sshd) -> None:
    """It listens on the loopback of that host, and the URL is the given one."""
    tunnel = connect_to(ssh_server, free_port(), public_url="https://hooks.example.com")
    async with stage.service() as service:
        assert await tunnel.open(LocalEndpoint(service.address[1])) == "https://hooks.example.com"
        await tunnel.close()


async def test_an_unknown_host_key_is_refused(ssh_server: Sshd, other_key: Path, tmp_path: Path) -> None:
    """With another key in the file, an empty file or none."""
    wrong, empty = tmp_path / "wrong", tmp_path / "empty"
    wrong.write_text(f"[127.0.0.1]:{ssh_server.port} {public(other_key)}")
    empty.touch()
    for known_hosts in (wrong, empty, tmp_path / "missing"):
        with pytest.raises(TunnelError, match="is not in"):
            await connect_to(ssh_server, free_port(), known_hosts=known_hosts).open(LOCAL)


async def test_ssh_errors_are_explained(ssh_server: Sshd, other_key: Path) -> None:
    """A key is refused, a port is in use, a host does not listen."""
    with pytest.raises(TunnelError, match="refused the login"):
        await connect_to(ssh_server, free_port(), identity=other_key).open(LOCAL)
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    with (
        socket.create_server(("::" if both else "0.0.0.0", 0), family=family, dualstack_ipv6=both) as taken,
        pytest.raises(TunnelError, match="did not open port"),
    ):
        await connect_to(ssh_server, taken.getsockname()[1]).open(LOCAL)
    closed = Ssh(Account("127.0.0.1", "x", free_port()), remote_port=1, known_hosts=ssh_server.known_hosts)
    with pytest.raises(TunnelError, match="cannot be reached"):
        await closed.open(LOCAL)


@pytest.mark.parametrize(
    ("kind", "message"), [("locked", "`ssh-add`"), ("junk", "cannot be used"), ("hosts", "junk")]
)
async def test_unusable_ssh_files_are_named(
    kind: str, message: str, ssh_server: Sshd, locked_key: Path, junk: Path
) -> None:
    """A locked key, a file that is no key, one that is no list of hosts."""
    given = {
        "locked": {"identity": locked_key},
        "junk": {"identity": junk},
        "hosts": {"known_hosts": junk},
    }[kind]
    with pytest.raises(TunnelError, match="on this machine cannot be used") as caught:
        await connect_to(ssh_server, free_port(), **given).open(LOCAL)
    assert message in str(caught.value)


async def test_a_lost_ssh_connection_is_reported(ssh_server: Sshd) -> None:
    tunnel = connect_to(ssh_server, free_port())
    await tunnel.open(LOCAL)
    closing = asyncio.create_task(tunnel.wait_closed())
    tunnel._connection.abort()
    assert "127.0.0.1 was closed" in await closing
    await tunnel.close()


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("host", Account("host")),
        ("me@host", Account("host", "me")),
        ("me@host:2222", Account("host", "me", 2222)),
        ("a@b@host:22", Account("host", "a@b", 22)),
        ("me@[::1]:22", Account("::1", "me", 22)),
        ("[::1]", Account("::1")),
        ("", None),
        ("me@", None),
        ("host:", None),
        ("host:0", None),
        ("host:x", None),
        ("[::1", None),
        ("[::1]22", None),
    ],
)
def test_parse_account(text: str, found: Account | None) -> None:
    if found is None:
        with pytest.raises(ValueError, match="user@host:port"):
            parse_account(text)
    else:
        assert parse_account(text) == found


# --- ngrok, whose service a test cannot reach ---


class Listener:
    closed = False

    def url(self) -> str:
        return "https://a-b-c.ngrok-free.app"

    async def close(self) -> None:
        self.closed = True


class Agent:
    """Stands in for the module `ngrok`."""

    def __init__(self) -> None:
        self.listener = Listener()
        self.request: tuple[str, dict[str, Any]] | None = None

    async def forward(self, addr: str, **options: Any) -> Listener:
        self.request = addr, options
        if options.get("domain") == "taken.ngrok.app":
            raise ValueError("failed to start listener", "the domain is taken", "ERR_NGROK_334")
        return self.listener


async def test_ngrok_forwards_to_the_receiver() -> None:
    agent = Agent()
    tunnel = Ngrok(agent=agent)
    assert await tunnel.open(LocalEndpoint(8080, tls=True)) == "https://a-b-c.ngrok-free.app"
    assert agent.request == (
        "https://127.0.0.1:8080",
        {"authtoken_from_env": True, "verify_upstream_tls": False},
    )
    await tunnel.close()
    assert agent.listener.closed
    with pytest.raises(TunnelError, match="ERR_NGROK_334"):
        await Ngrok("taken.ngrok.app", agent=agent).open(LOCAL)


def test_the_real_ngrok_module_has_what_is_used() -> None:
    """Its service is not contacted."""
    assert callable(ngrok.forward)
    assert {"url", "close"} <= set(dir(ngrok.Listener))


# --- choice of a provider ---


def test_options_choose_the_provider(tmp_path: Path) -> None:
    """An option of its own names a provider; else it is the first that is installed."""
    there = write_program(tmp_path, "cloudflared", CLOUDFLARED).parent
    assert isinstance(
        choose_provider(TunnelOptions(), tls=False, environ={"PATH": str(there)}), Cloudflared
    )
    assert isinstance(
        choose_provider(TunnelOptions(), tls=False, environ={"PATH": "", "NGROK_AUTHTOKEN": "x"}), Ngrok
    )
    assert isinstance(choose_provider(TunnelOptions(domain="x.ngrok.app"), tls=False), Ngrok)
    assert isinstance(choose_provider(TunnelOptions(ssh="me@host"), tls=True), Ssh)
    assert isinstance(choose_provider(TunnelOptions(tunnel="ssh", ssh="me@host"), tls=True), Ssh)
    assert isinstance(
        choose_provider(TunnelOptions(ssh="me@host", public_url="https://hooks.example.com"), tls=False),
        Ssh,
    )
    assert isinstance(choose_provider(TunnelOptions(command="bore local {port}"), tls=False), Command)
    assert isinstance(
        choose_provider(TunnelOptions(public_url="https://hooks.example.com"), tls=False), FixedUrl
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (TunnelOptions(), "--no-tunnel"),
        (TunnelOptions(tunnel="ssh"), "--ssh: is required"),
        (TunnelOptions(ssh="me@host"), "FLORA calls HTTPS URLs only"),
        (TunnelOptions(ssh="me@", public_url="https://x.example"), "user@host:port"),
        (TunnelOptions(tunnel="command"), "--command: is required"),
        (TunnelOptions(command="x", pattern="("), "regular expression"),
        (TunnelOptions(command="'"), "--command"),
        (TunnelOptions(command=" "), "empty"),
        (TunnelOptions(tunnel="cloudflared", public_url="https://x.example"), "a URL of its own"),
        (TunnelOptions(tunnel="cloudflared", ssh="me@host"), "cloudflared and ssh are different tunnels"),
        (TunnelOptions(command="bore", ssh="me@host"), "ssh and command are different tunnels"),
    ],
)
def test_missing_and_contradicting_options_are_refused(options: TunnelOptions, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        choose_provider(options, tls=False, environ={"PATH": ""})
