"""Where the service listens, and whom it takes its callers for: real sockets."""

import asyncio
import os
import socket
import subprocess
from pathlib import Path
from typing import Any

import httpx
import pytest
from structlog.testing import capture_logs

from receiver.client.client import ReceiverClient
from receiver.config import Settings
from receiver.errors import ConfigError, ReceiverApiError
from receiver.net.addresses import local_origin
from receiver.net.clients import own_client
from receiver.service.service import Service
from receiver.web.unix_socket import UnixListener
from tests.support.lives import COMMAND
from tests.support.patience import PATIENCE_SECONDS
from tests.support.stage import Stage, toml

FORGED = {"Flora-Signature": "t=1,v1=" + "0" * 64}


@pytest.mark.parametrize(
    ("host", "forwarded", "remote"),
    [
        ("127.0.0.1", None, "127.0.0.1"),
        ("127.0.0.1", "203.0.113.7:51234", "203.0.113.7"),
        ("127.0.0.1", "192.0.2.9, [2001:db8::7]:51234", "2001:db8::7"),
        ("[::1]", "203.0.113.7", "203.0.113.7"),
    ],
)
async def test_callers_of_a_listener_on_every_address(
    stage: Stage, host: str, forwarded: str | None, remote: str
) -> None:
    """On `::` an IPv4 proxy is `::ffff:127.0.0.1`: the same proxy, and trusted as much."""
    headers = FORGED if forwarded is None else {**FORGED, "X-Forwarded-For": forwarded}
    async with stage.service(public={"host": "::"}) as service, stage.client() as client:
        url = f"https://{host}:{stage.port}/callbacks/flora"
        assert (await client.post(url, content=b"{}", headers=headers)).status_code == 401
        assert [refused.remote for refused in service.intake.rejections] == [remote]


def over(path: Path) -> httpx.AsyncClient:
    """Return a client on a Unix socket."""
    return httpx.AsyncClient(transport=httpx.AsyncHTTPTransport(uds=str(path)), base_url="http://receiver")


@pytest.mark.parametrize("http", ["httptools", "h11"])
async def test_a_unix_socket(stage: Stage, http: str) -> None:
    """It takes callbacks without TLS, also with [tls], and the proxy that speaks there is trusted."""
    path = stage.directory / "public.sock"
    async with stage.service(public={"host": f"unix:{path}", "http": http}) as service:
        assert service.address == (f"unix:{path}", 0)
        async with over(path) as client:
            body = stage.body("run_x")
            headers = {"Flora-Signature": stage.signature(body)}
            accepted = await client.post("/callbacks/flora", content=body, headers=headers)
            assert (accepted.status_code, accepted.json()) == (200, {"status": "accepted"})
            for more in (
                {},
                {"X-Forwarded-For": "192.0.2.9, 203.0.113.7:51234"},
                {"X-Forwarded-For": "unix"},
            ):
                refused = await client.post("/callbacks/flora", content=b"{}", headers=FORGED | more)
                assert refused.status_code == 401
        assert [each.remote for each in service.intake.rejections] == ["unix", "203.0.113.7", "unix"]
        async with own_client(bound=f"unix:{path}") as own:  # as doctor looks at its own receiver
            assert (
                await own.get(f"{local_origin(service.address[0], 0, tls=True)}/readyz")
            ).status_code == 200
    assert not path.exists()


async def test_commands_reach_the_operations_listener_on_a_unix_socket(stage: Stage) -> None:
    """By `RECEIVER_OPS_URL`, or by the settings; the client too, and the token is needed as ever."""
    path = stage.directory / "operations.sock"
    sections: dict[str, Any] = {"operations": {"host": f"unix:{path}", "token": "t-operations"}}
    async with stage.service(**sections) as service:
        assert service.operations_address == (f"unix:{path}", 0)
        run_id = await stage.track(service)
        config = stage.directory / "receiver.toml"
        config.write_text(toml({"operations": {"host": f"unix:{path}", "token": "t-operations"}}))
        token = {"RECEIVER_OPS_TOKEN": "t-operations"}
        for env in (
            {"RECEIVER_OPS_URL": f"unix:{path}", **token},
            {"RECEIVER_OPS_URL": f"unix://{path}", **token},
            {"RECEIVER_CONFIG": str(config)},
        ):
            done = await run_command("runs", "list", "--json", env=env, cwd=stage.directory)
            assert run_id in done.stdout, done
        with ReceiverClient(f"unix:{path}", "wrong") as stranger:
            with pytest.raises(ReceiverApiError) as caught:
                await asyncio.to_thread(stranger.run, run_id)
            assert caught.value.status == 401
    late = await run_command("runs", "list", env={"RECEIVER_CONFIG": str(config)}, cwd=stage.directory)
    assert late.returncode != 0
    assert f"no response from unix:{path}" in late.stderr
    with pytest.raises(ReceiverApiError, match="absolute path"):
        ReceiverClient("unix:operations.sock", "t")


async def run_command(*arguments: str, env: dict[str, str], cwd: Path) -> subprocess.CompletedProcess[str]:
    return await asyncio.to_thread(
        subprocess.run, [COMMAND, *arguments], env={"PATH": os.environ["PATH"], **env}, cwd=cwd,
        capture_output=True, text=True, check=False, timeout=PATIENCE_SECONDS,
    )  # fmt: skip


def listen(host: str) -> socket.socket:
    return socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET)


async def test_operations_sockets_that_are_handed_over_are_judged_by_their_own_address(
    stage: Stage,
) -> None:
    """The settings say loopback, and systemd holds another address: then a token and TLS are needed there too."""
    listeners = {"operations": [listen("0.0.0.0")]}
    settings = Settings.model_validate(stage.document())
    with pytest.raises(ConfigError) as caught:
        async with Service(settings, listeners=listeners).running():
            pass
    assert [problem.path for problem in caught.value.problems] == ["operations.token"]
    for each in listeners["operations"]:
        each.close()


async def test_every_socket_that_is_handed_over_is_served(stage: Stage) -> None:
    """Two addresses speak TLS and a Unix socket does not; the operations listener has two as well."""
    paths = [stage.directory / "public.sock", stage.directory / "operations.sock"]
    unix = [UnixListener(), UnixListener()]
    for socket_, path in zip(unix, paths, strict=True):
        socket_.bind_path(str(path))
    public = [listen("127.0.0.1"), listen("::1"), unix[0]]
    operations = [listen("127.0.0.1"), unix[1]]
    ports = [each.getsockname()[1] for each in (*public[:2], operations[0])]
    settings = Settings.model_validate(stage.document(operations={"token": "t-operations"}))
    service = Service(settings, listeners={"public": public, "operations": operations})
    async with service.running(), stage.client() as client, over(paths[0]) as local:
        urls = [f"https://127.0.0.1:{ports[0]}", f"https://[::1]:{ports[1]}"]
        for caller, url in ((client, urls[0]), (client, urls[1]), (local, "http://receiver")):
            assert (await caller.get(f"{url}/readyz")).status_code == 200, url
        for url in (f"http://127.0.0.1:{ports[2]}", f"unix:{paths[1]}"):
            with ReceiverClient(url, "t-operations") as receiver:
                assert await asyncio.to_thread(list, receiver.runs()) == []


async def test_workers_say_that_they_do_not_answer_at_a_public_socket(shared: Stage) -> None:
    """Connections to it wait in its queue for ever, which nobody would notice otherwise."""
    settings = Settings.model_validate(shared.document())
    listeners = {"public": [listen("127.0.0.1")]}
    with capture_logs() as logs:
        async with Service(settings, only="workers", listeners=listeners).running():
            pass
    listeners["public"][0].close()
    assert [line["log_level"] for line in logs if line["event"] == "listener.unanswered"] == ["warning"]
