"""The container, without an engine: the Dockerfile's own steps are run into a directory, and the service is started from it.

As an unprivileged user on a read-only root, where this machine lets root make one; compose files are held to what they name.
"""

import asyncio
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from receiver.config import environment_variables, load_settings
from receiver.service.service import check_role
from tests.support.lives import served
from tests.support.postgres import hand_over, unprivileged_user
from tests.support.stage import Stage, eventually, free_port, run_stage, toml

ROOT = Path(__file__).parents[2]
DOCKERFILE = (ROOT / "deploy/container/Dockerfile").read_text()
COMPOSE = ["compose.yaml", "compose.scale.yaml"]


def steps() -> list[tuple[str, str]]:
    """Return the instructions of the build stage, in order."""
    stage = re.split(r"(?m)^FROM .*$", DOCKERFILE)[1]
    return [(line.split(" ", 1)[0], line.split(" ", 1)[1]) for line in stage.strip().splitlines()]


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory in which the build stage has been carried out; only its two places are elsewhere."""
    place = tmp_path_factory.mktemp("image")
    source, prefix = place / "src", place / "opt"
    source.mkdir()
    for instruction, words in steps():
        if instruction == "COPY":
            *names, target = words.split()
            for name in names:
                found = ROOT / name
                to = source / target if found.is_dir() else source / Path(name).name
                (shutil.copytree if found.is_dir() else shutil.copy)(found, to)
        elif instruction == "RUN":
            command = shlex.split(words.replace("/opt/flora-receiver", str(prefix)))
            command[0] = sys.executable if command[0] == "python" else command[0]
            done = subprocess.run(command, cwd=source, capture_output=True, text=True, check=False)
            assert done.returncode == 0, f"{words}: {done.stderr}"
        else:
            assert instruction == "WORKDIR"
    return prefix


def open_to_all(place: Path) -> None:
    """Let everybody reach a directory; pytest closes its own whenever another session begins."""
    for parent in (place, *place.parents):
        if parent != Path("/tmp") and str(parent).startswith("/tmp"):
            parent.chmod(parent.stat().st_mode | 0o755)


@pytest.fixture
async def stage(tmp_path: Path) -> AsyncIterator[Stage]:
    async with run_stage(tmp_path) as made:
        yield made


def can_remount() -> bool:
    """Whether this machine lets us make a root of our own: containers often do not."""
    probe = [
        "unshare",
        "-m",
        "sh",
        "-c",
        "mount --make-rprivate / && mount --bind /tmp /tmp && mount -o remount,bind,ro /",
    ]
    return os.geteuid() == 0 and subprocess.run(probe, capture_output=True, check=False).returncode == 0


@pytest.mark.parametrize("ledger", ["sqlite", "postgres"])
async def test_the_service_runs_from_the_image_on_a_read_only_root(
    image: Path, stage: Stage, ledger: str, request: pytest.FixtureRequest
) -> None:
    """As nobody, with one directory to write to: a run goes from its callback to its file."""
    data = stage.directory / "data"
    data.mkdir(mode=0o700)
    hand_over(data)
    open_to_all(stage.directory)
    open_to_all(image)
    for secret in (stage.cert, stage.key, stage.ca):
        secret.chmod(0o644)
    stage.port = free_port()
    url = f"sqlite:///{data}/receiver.db" if ledger == "sqlite" else request.getfixturevalue("postgres_url")
    document = stage.document(database={"url": url})
    document["handlers"] = [{"use": "storage", "options": {"url": str(data / "outputs")}}]
    flora = document["flora"]
    environ = {
        "PATH": f"{image}/bin:/usr/bin:/bin",
        "PYTHONDONTWRITEBYTECODE": "1",
        "FLORA_API_KEY": flora.pop("api_key"),
        "FLORA_WEBHOOK_SECRET": flora.pop("webhook_secrets")[0],
    }
    config = stage.directory / "receiver.toml"
    config.write_text(toml(document))
    serve = [f"{image}/bin/flora-receiver", "serve", "--config", str(config)]
    further: dict[str, Any] = unprivileged_user()
    if can_remount():
        # `mount` as root, then nobody: what the engine does for `read_only: true` and `USER`.
        script = (
            f"mount --make-rprivate / && mount --bind {data} {data} && mount -o remount,bind,ro / && cd {data} && "
            'exec setpriv --reuid=nobody --regid=nogroup --clear-groups "$@"'
        )
        serve, further = ["unshare", "-m", "sh", "-c", script, "sh", *serve], {}
    with (stage.directory / "log").open("wb") as log:
        process = await asyncio.create_subprocess_exec(
            *serve, env=environ, cwd=data, stdout=log, stderr=log, **further
        )
        try:
            async with stage.client() as client:

                async def ready() -> bool:
                    assert process.returncode is None, (stage.directory / "log").read_text()
                    try:
                        return (
                            await client.get(f"https://127.0.0.1:{stage.port}/readyz")
                        ).status_code == 200
                    except httpx.TransportError:
                        return False

                await eventually(ready)
                run_id = stage.start()

                async def stored() -> list[Path]:
                    return list((data / "outputs").rglob(f"*/{run_id}/*.png"))

                [file] = await eventually(stored)
            assert file.read_bytes().startswith(b"\x89PNG")
            process.terminate()
            assert await process.wait() == 0
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()


def test_the_image_has_what_the_recipes_ask_for(image: Path) -> None:
    """The driver of PostgreSQL, the faster loop, and what the shipped handlers need."""
    modules = ("psycopg", "uvloop", "aiokafka", "nats", "redis", "apprise", "PIL")
    done = subprocess.run(
        [image / "bin/python", "-c", f"import {', '.join(modules)}"], capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr


def probes() -> dict[str, tuple[list[str], str]]:
    """Return each probe that is a command, and the port that it asks at."""
    (image,) = re.findall(r"HEALTHCHECK .*?CMD (\[.*?\])\n", DOCKERFILE, re.DOTALL)
    scale = yaml.safe_load((ROOT / "deploy/compose.scale.yaml").read_text())["services"]["workers"]
    (workers, _) = yaml.safe_load_all((ROOT / "deploy/kubernetes/workers.yaml").read_text())
    (container,) = workers["spec"]["template"]["spec"]["containers"]
    return {
        "image": (json.loads(image), "8080"),
        "compose": (scale["healthcheck"]["test"][1:], "8081"),
        "startup": (container["startupProbe"]["exec"]["command"], "8081"),
        "liveness": (container["livenessProbe"]["exec"]["command"], "8081"),
    }


@pytest.mark.parametrize("name", probes())
async def test_probes_tell_a_service_that_is_ready_from_one_that_is_gone(name: str, stage: Stage) -> None:
    """HEALTHCHECK and its like, run as they are written: only the port is another."""
    command, port = probes()[name]
    stage.plain = True
    operations = free_port()

    def ask() -> int:
        words = [each.replace(port, str(stage.port if port == "8080" else operations)) for each in command]
        return subprocess.run([sys.executable, *words[1:]], capture_output=True, check=False).returncode

    async with served(stage, operations={"port": operations}) as life:

        async def ready() -> bool:
            assert life.process.returncode is None, await life.ended()
            return await asyncio.to_thread(ask) == 0

        await eventually(ready)
        assert await life.stop() == 0
    assert await asyncio.to_thread(ask) != 0


def test_the_image_is_told_what_to_leave_out() -> None:
    """The context is the lock, the package and its words; every file that the Dockerfile copies is among them."""
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = {
        name for instruction, words in steps() if instruction == "COPY" for name in words.split()[:-1]
    }
    assert copied == kept
    assert "--require-hashes" in DOCKERFILE
    assert 'ENTRYPOINT ["flora-receiver"]' in DOCKERFILE  # no shell in between: signals reach the process


@pytest.mark.parametrize("name", COMPOSE)
def test_compose_publishes_the_proxy_alone(name: str) -> None:
    """Everything else is inside; roots are read-only, secrets are files, and every variable is a setting of ours."""
    document = yaml.safe_load((ROOT / "deploy" / name).read_text())
    known = {
        *environment_variables(),
        *(f"{each}_FILE" for each in environment_variables()),
        "RECEIVER_CONFIG",
    }
    for service, described in document["services"].items():
        assert described["restart"] == "always"
        assert ("ports" in described) == (service == "caddy")
        assert set(described.get("secrets", ())) <= document["secrets"].keys()
        assert set(described["networks"]) <= document["networks"].keys()
        if service not in {"caddy", "postgres"}:
            assert described["read_only"]
            assert described["cap_drop"] == ["ALL"]
            assert described["environment"].keys() <= known
            files = {
                Path(value).name
                for each, value in described["environment"].items()
                if each.endswith("_FILE")
            }
            assert files == set(described["secrets"])
    assert all(
        (ROOT / "deploy" / volume.split(":")[0]).exists()
        for volume in _mounted(document)
        if "Caddyfile" in volume
    )


@pytest.mark.parametrize("name", COMPOSE)
def test_what_compose_sets_are_good_settings(name: str, tmp_path: Path) -> None:
    """Read by the service's own code, with its secrets in files that are where compose puts them."""
    document = yaml.safe_load((ROOT / "deploy" / name).read_text())
    contents = {
        "database_url": "postgresql://receiver:x@postgres/receiver",
        "ops_token": "0123456789abcdef",
    }
    for secret in document["secrets"]:
        (tmp_path / secret).write_text(contents.get(secret, f"{secret}_value") + "\n")
    (tmp_path / "receiver.toml").write_text('[[handlers]]\nuse = "log"\n')
    for service, described in document["services"].items():
        if service in {"caddy", "postgres"}:
            continue
        environ = {
            each: re.sub(r"\$\{\w+:\?[^}]*\}", "hooks.example.com", value)
            .replace("/run/secrets", str(tmp_path))
            .replace("/etc/flora-receiver", str(tmp_path))
            for each, value in described["environment"].items()
        }
        settings = load_settings(None, environ)
        assert settings.public_url == "https://hooks.example.com"
        assert settings.operations.host == "127.0.0.1"
        assert settings.database.url.startswith("postgresql" if "scale" in name else "sqlite")
        assert described["init"] is True, (
            "handlers may leave processes behind, which somebody must wait for"
        )
        only = described.get("command", ["serve"])[1:]
        assert check_role(settings, only[1] if only else None) is None


def _mounted(document: dict[str, Any]) -> list[str]:
    return [
        volume for described in document["services"].values() for volume in described.get("volumes", ())
    ]


def test_the_container_has_the_extras_of_all_handlers() -> None:
    """A new extra is either in the Makefile's `SERVER`, which the container's lock is made of, or of no use there."""
    found = re.search(
        r"^SERVER := \$\(foreach extra,([^,]+),", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE
    )
    assert found
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    elsewhere = {"dev", "ngrok", "ssh", "testing"}
    assert set(found[1].split()) == project["optional-dependencies"].keys() - elsewhere
