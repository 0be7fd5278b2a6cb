"""Real nginx and real Caddy on loopback, with the very files that are shipped: only addresses and paths are put in."""

import asyncio
import contextlib
import os
import shutil
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import pytest

from tests.support.patience import PATIENCE_SECONDS
from tests.support.stage import Stage, free_port

DEPLOY = Path(__file__).parents[2] / "deploy"
KINDS = ["nginx", "caddy"]


def program(name: str) -> str:
    """Return a server's program; whoever has none is told how to get it."""
    found = shutil.which(name) or shutil.which(name, path="/usr/sbin:/usr/local/sbin")
    if found is None:
        package = {"nginx": "nginx-light"}.get(name, name)
        pytest.fail(f"{name} is missing: apt-get install {package}", pytrace=False)
    return found


def replaced(text: str, old: str, new: str) -> str:
    """Replace what must be there."""
    assert old in text, f"the shipped file has no {old!r} any more"
    return text.replace(old, new)


def nginx(stage: Stage, port: int, receivers: Sequence[int | Path]) -> list[str]:
    """Write the configuration; return the command that uses it. A receiver is a port or a Unix socket."""
    shipped = (DEPLOY / "nginx/flora-receiver.conf").read_text()
    site = replaced(shipped, "listen 443 ssl http2;", f"listen 127.0.0.1:{port} ssl http2;")
    hosts = [f"unix:{each}" if isinstance(each, Path) else f"127.0.0.1:{each}" for each in receivers]
    servers = "\n".join(f"    server {host} max_fails=1 fail_timeout=2s;" for host in hosts)
    site = replaced(site, "    server 127.0.0.1:8080 max_fails=1 fail_timeout=2s;", servers)
    site = replaced(site, "/etc/ssl/receiver/cert.pem", str(stage.cert))
    site = replaced(site, "/etc/ssl/receiver/key.pem", str(stage.key))
    here = stage.directory / "nginx"
    here.mkdir()
    (here / "site.conf").write_text(site)
    user = "user root;\n" if os.geteuid() == 0 else ""
    temporary = "\n".join(
        f"    {name}_temp_path {here}/{name};"
        for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    (here / "nginx.conf").write_text(
        f"{user}daemon off;\npid {here}/pid;\nerror_log {here}/error.log warn;\nworker_processes 1;\n"
        f"events {{ worker_connections 256; }}\nhttp {{\n{temporary}\n    include {here}/site.conf;\n}}\n"
    )
    return [program("nginx"), "-p", str(here), "-e", f"{here}/error.log", "-c", f"{here}/nginx.conf"]


def caddy(stage: Stage, port: int, receivers: Sequence[int | Path]) -> tuple[list[str], dict[str, str]]:
    """Write the configuration; return the command that uses it, and its environment."""
    shipped = (DEPLOY / "caddy/Caddyfile").read_text()
    site = replaced(
        shipped,
        "# tls /etc/ssl/receiver/cert.pem /etc/ssl/receiver/key.pem",
        f"tls {stage.cert} {stage.key}",
    )
    site = replaced(site, "\tadmin off\n", "\tadmin off\n\tauto_https disable_redirects\n")
    here = stage.directory / "caddy"
    here.mkdir()
    (here / "Caddyfile").write_text(site)
    environ = {
        "PATH": os.environ["PATH"],
        "HOME": str(here),
        "XDG_DATA_HOME": str(here),
        "XDG_CONFIG_HOME": str(here),
        "RECEIVER_HOST": f"https://127.0.0.1:{port}",
        "RECEIVER_UPSTREAMS": " ".join(
            f"unix/{each}" if isinstance(each, Path) else f"127.0.0.1:{each}" for each in receivers
        ),
    }
    return [program("caddy"), "run", "--config", str(here / "Caddyfile"), "--adapter", "caddyfile"], environ


@contextlib.asynccontextmanager
async def proxy(kind: str, stage: Stage, receivers: Sequence[int | Path]) -> AsyncIterator[int]:
    """Run a proxy before receivers on these ports; yield the port where it speaks TLS."""
    port = free_port()
    environ: dict[str, str] | None = None
    if kind == "nginx":
        command = nginx(stage, port, receivers)
    else:
        command, environ = caddy(stage, port, receivers)
    with (stage.directory / f"{kind}.log").open("wb") as log:
        process = await asyncio.create_subprocess_exec(*command, env=environ, stdout=log, stderr=log)
        try:
            await _listening(process, port, stage.directory / f"{kind}.log")
            yield port
        finally:
            with contextlib.suppress(ProcessLookupError):
                process.terminate()
            await process.wait()


async def _listening(process: asyncio.subprocess.Process, port: int, log: Path) -> None:
    async with asyncio.timeout(PATIENCE_SECONDS):
        while True:
            if process.returncode is not None:
                pytest.fail(f"the proxy ended: {log.read_text()}", pytrace=False)  # noqa: ASYNC240 -- it is over
            try:
                _, writer = await asyncio.open_connection("127.0.0.1", port)
            except OSError:
                await asyncio.sleep(0.02)
            else:
                writer.close()
                return
