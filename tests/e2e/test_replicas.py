"""Several receivers on one PostgreSQL: any of them may be killed, the database may go away and come back."""

import asyncio
import contextlib
import json
import os
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from receiver.intake import group_commit as commits
from receiver.service import service as service_module
from receiver.store import postgres
from tests.support.lives import Served, is_ready, served
from tests.support.patience import PATIENCE_SECONDS
from tests.support.postgres import Postgres
from tests.support.severing_proxy import run_severing_proxy
from tests.support.stage import Stage, eventually, free_port

LEASE: dict[str, Any] = {"dispatch": {"lease_seconds": 3}}


@dataclass
class Balancer:
    """Hands each connection to a replica that lives, as a load balancer would; replicas are ports of this machine."""

    ports: list[int]
    server: asyncio.Server | None = None
    turn: int = 0
    open: set[asyncio.Task[None]] = field(default_factory=set)

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for _ in range(len(self.ports)):
            self.turn += 1
            try:
                there = await asyncio.open_connection("127.0.0.1", self.ports[self.turn % len(self.ports)])
            except OSError:
                continue
            await asyncio.gather(_copy(reader, there[1]), _copy(there[0], writer))
            return
        writer.close()


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    with contextlib.suppress(OSError):
        writer.close()
        await writer.wait_closed()


@dataclass
class Replicas:
    """Receivers on one ledger, and the address that FLORA calls."""

    stage: Stage
    client: httpx.AsyncClient
    lives: list[Served]
    ports: list[int]

    async def operations(self, number: int) -> str:
        """Return where a replica's operations API listens, as its log tells."""

        async def look() -> str | None:
            lines = (self.stage.directory / f"log{number}").read_bytes().splitlines(keepends=True)
            told = [
                json.loads(line) for line in lines if b'"service.ready"' in line and line.endswith(b"\n")
            ]
            return f"http://{told[0]['operations']}" if told else None

        found = await eventually(look)
        assert found is not None
        return found

    def elected(self) -> Counter[str]:
        """Return how often each role was taken up, in all their logs."""
        lines = (
            line
            for log in sorted(self.stage.directory.glob("log*"))
            for line in log.read_bytes().splitlines(True)
        )
        told = (json.loads(line) for line in lines if b'"lease.acquired"' in line and line.endswith(b"\n"))
        return Counter(each["name"] for each in told)

    async def kill(self, number: int) -> None:
        self.lives[number].process.kill()
        await self.lives[number].process.wait()


@contextlib.asynccontextmanager
async def replicas(
    stage: Stage, *roles: tuple[str, ...], environ: Mapping[str, str] = {}, **sections: Any
) -> AsyncIterator[Replicas]:
    """Run one receiver for each tuple of further arguments."""
    async with contextlib.AsyncExitStack() as stack:
        limits = httpx.Limits(max_keepalive_connections=0)
        made = httpx.AsyncClient(
            verify=stage.tls(), trust_env=False, timeout=PATIENCE_SECONDS, limits=limits
        )
        client = await stack.enter_async_context(made)
        lives, ports = [], []
        for number, arguments in enumerate(roles):
            stage.port = free_port()
            ports.append(stage.port)
            log = stack.enter_context((stage.directory / f"log{number}").open("wb"))
            life = await stack.enter_async_context(
                served(
                    stage, stdout=log.fileno(), arguments=arguments, environ=environ, **LEASE, **sections
                )
            )
            if "workers" not in arguments:
                await life.ready(client)
            lives.append(life)
        doors = [port for port, arguments in zip(ports, roles, strict=True) if "workers" not in arguments]
        balancer = Balancer(doors)
        server = await asyncio.start_server(balancer.handle, "127.0.0.1", 0, family=socket.AF_INET)
        stage.port = server.sockets[0].getsockname()[1]
        try:
            yield Replicas(stage, client, lives, ports)
        finally:
            server.close()


EFFECTS = '''"""A handler as a user writes one: it may be called again, and its effect is there once."""

import asyncio
import os
from pathlib import Path

HERE = Path(__file__).parent


async def count(run, context):
    with (HERE / "calls").open("a") as calls:
        calls.write(f"{context.idempotency_key} {os.getpid()}\\n")
    await asyncio.sleep(0.05)  # it takes its time, so that a kill may come in between
    try:
        (HERE / "effects" / context.idempotency_key).open("x").close()
    except FileExistsError:
        return {"again": True}
'''


class Effects:
    """What the handler above has done, and which calls it had."""

    def __init__(self, stage: Stage) -> None:
        self._directory = stage.directory
        (stage.directory / "effects").mkdir()
        (stage.directory / "counting.py").write_text(EFFECTS)
        self.environ = {"PYTHONPATH": str(stage.directory)}
        self.handlers: list[dict[str, Any]] = [
            {"use": "storage", "options": {"url": str(stage.outputs)}},
            {"use": "counting:count", "name": "count"},
        ]

    def check(self, run_ids: list[str], killed: set[int]) -> None:
        """One effect for each run; more than one call only where the process of each earlier call was killed."""
        keys = {f"{run_id}:count:settled:0" for run_id in run_ids}
        assert {path.name for path in (self._directory / "effects").iterdir()} == keys
        calls: dict[str, list[int]] = {}
        for line in (self._directory / "calls").read_text().splitlines():
            key, pid = line.split()
            calls.setdefault(key, []).append(int(pid))
        assert calls.keys() == keys
        assert {pid for pids in calls.values() for pid in pids[:-1]} <= killed


def check(stage: Stage, run_ids: list[str]) -> None:
    """Every run is settled once, its files are whole, and each handler's effect is there once."""
    for run_id in run_ids:
        stage.check_files(run_id)
        assert [row["state"] for row in stage.dispatches(run_id) if row["event"] == "settled"] == [
            "done",
            "done",
        ], run_id
    assert len(stage.rows("SELECT run_id FROM runs")) == len(run_ids)
    manifests = list(stage.outputs.rglob("run.json"))
    assert len(manifests) == len(run_ids)
    assert stage.parts() == []


async def test_two_of_three_are_killed_and_nothing_is_lost(shared: Stage) -> None:
    """One after the other, under load: what they held is taken over within a lease, and no effect is doubled."""
    effects = Effects(shared)
    async with replicas(shared, (), (), (), environ=effects.environ, handlers=effects.handlers) as them:
        run_ids = [shared.start() for _ in range(30)]

        async def settled(count: int) -> bool:
            return len(shared.rows("SELECT run_id FROM runs WHERE settled_at IS NOT NULL")) >= count

        await eventually(lambda: settled(5))
        assert them.elected() == dict.fromkeys(("poller", "janitor", "starter"), 1)
        await them.kill(0)
        run_ids += [shared.start() for _ in range(30)]
        await eventually(lambda: settled(30))
        await them.kill(1)
        run_ids += [shared.start() for _ in range(20)]
        await shared.over(*run_ids)
        check(shared, run_ids)
        effects.check(run_ids, {them.lives[0].pid, them.lives[1].pid})


async def test_a_run_is_waited_for_on_another_replica(shared: Stage) -> None:
    """Whoever settles it: the wait ends by itself, and long before its time is over, on each of them."""
    token = {"token": "0123456789abcdef"}
    async with replicas(shared, (), (), operations=token) as them:
        run_id = shared.start("emu-image", callback=False)
        headers = {"Authorization": f"Bearer {token['token']}"}
        tracked = {"run_id": run_id, "technique_id": "tech_emu_image", "callback_expected": True}
        origins = [await them.operations(number) for number in range(2)]
        answer = await them.client.post(f"{origins[0]}/api/runs/track", json=tracked, headers=headers)
        assert answer.status_code == 200
        waits = [
            asyncio.create_task(
                them.client.get(f"{origin}/api/runs/{run_id}/wait?timeout=14", headers=headers)
            )
            for origin in origins
        ]
        assert (await shared.send(them.client, shared.body(run_id))).status_code == 200
        for answer in await asyncio.gather(*waits):
            run = answer.json()["run"]
            assert (run["state"], run["finished"]) == ("completed", True)
        workers = [
            number
            for number in range(2)
            if b"dispatch.done" in (shared.directory / f"log{number}").read_bytes()
        ]
        assert workers
        shared.check_files(run_id)


async def test_the_database_restarts(shared: Stage, postgres_server: Postgres) -> None:
    """Meanwhile callbacks get 503, which FLORA repeats; then work goes on by itself."""
    async with replicas(shared, (), ()) as them:
        run_ids = [shared.start() for _ in range(10)]
        await eventually(lambda: _accepted(shared))
        await asyncio.to_thread(postgres_server.ctl, "stop", "-m", "immediate")
        try:
            late = shared.start(callback=False)
            answer = await shared.send(them.client, shared.body(late))
            assert answer.status_code == 503
            shared.port = them.ports[0]

            async def says_so() -> bool:  # a good answer is believed for a second
                return not await is_ready(shared, them.client)

            await eventually(says_so)
        finally:
            await asyncio.to_thread(postgres_server.ctl, "start")

        async def taken() -> bool:
            return (
                await shared.send(them.client, shared.body(late, delivery_id="whd_late"))
            ).status_code == 200

        await eventually(taken)
        await shared.over(*run_ids, late)
        check(shared, [*run_ids, late])


async def test_connections_to_the_database_are_reset(shared: Stage, postgres_server: Postgres) -> None:
    """As in a failover, again and again, just before a COMMIT or just after it: what was not confirmed is done once."""
    effects = Effects(shared)
    with run_severing_proxy(postgres_server, "suite") as way:
        sections = {"database": {"url": way.url}, "handlers": effects.handlers}
        async with replicas(shared, (), (), environ=effects.environ, **sections) as them:
            run_ids: list[str] = []
            for number in range(12):
                run_ids += [shared.start() for _ in range(4)]
                before = way.cuts
                way.cut_next = "after COMMIT" if number % 2 else "before COMMIT"

                async def cut(before: int = before) -> bool:
                    return way.cuts > before

                await eventually(cut)
                if number % 4 == 3:
                    way.sever()
            way.refusing = True
            way.sever()
            late = shared.start(callback=False)
            answer = await shared.send(them.client, shared.body(late, delivery_id="whd_late"))
            assert (answer.status_code, answer.headers["retry-after"]) == (503, "10")
            way.refusing = False

            async def taken() -> bool:
                return (
                    await shared.send(them.client, shared.body(late, delivery_id="whd_late"))
                ).status_code == 200

            await eventually(taken)
            await shared.over(*run_ids, late)
            check(shared, [*run_ids, late])
            effects.check([*run_ids, late], killed=set())


async def test_a_database_that_hangs_does_not_keep_the_process(
    shared: Stage, postgres_server: Postgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing answers any more, not even with an error: callers get their 503, and stopping ends; nobody was told 200."""
    monkeypatch.setattr(commits, "_TIMEOUT_SECONDS", 0.5)
    monkeypatch.setattr(postgres, "_CLOSE_SECONDS", 0.2)
    for name in ("_LOOPS_SECONDS", "_COMMIT_SECONDS"):
        monkeypatch.setattr(service_module, name, 0.2)
    with run_severing_proxy(postgres_server, "suite") as way:
        async with (
            asyncio.timeout(PATIENCE_SECONDS),
            shared.client() as client,
            shared.service(database={"url": way.url}),
        ):
            assert (await shared.send(client, shared.body("run_1"))).status_code == 200
            way.holding = True
            answer = await shared.send(client, shared.body("run_2"))
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "unavailable")
    assert len(shared.rows("SELECT run_id FROM runs WHERE run_id = 'run_1'")) == 1


async def _accepted(stage: Stage) -> bool:
    return bool(stage.rows("SELECT run_id FROM runs"))


async def test_door_and_workers_share_the_work(shared: Stage) -> None:
    """The door takes callbacks and works on nothing; what it takes, the workers are woken for."""
    async with replicas(shared, ("--only", "door"), ("--only", "workers")) as them:
        run_ids = [shared.start() for _ in range(10)]
        await shared.over(*run_ids)
        check(shared, run_ids)
        with pytest.raises(httpx.TransportError):
            await them.client.get(f"https://127.0.0.1:{them.ports[1]}/healthz")
    assert b"dispatch.done" not in (shared.directory / "log0").read_bytes()
    assert b"callbacks.committed" in (shared.directory / "log0").read_bytes()
    assert b"dispatch.done" in (shared.directory / "log1").read_bytes()


async def test_a_doors_operations_listener_has_probes_and_metrics_alone(shared: Stage) -> None:
    """What it could tell of runs is another's business; unknown paths are told in our own JSON."""
    headers = {"Authorization": "Bearer 0123456789abcdef"}
    async with replicas(shared, ("--only", "door"), operations={"token": "0123456789abcdef"}) as them:
        origin = await them.operations(0)
        for path in ("/healthz", "/metrics"):
            assert (await them.client.get(origin + path, headers=headers)).status_code == 200
        for path in ("/api/runs", "/api/dispatches", "/api/events", "/"):
            answer = await them.client.get(origin + path, headers=headers)
            assert (answer.status_code, answer.json()["error"]["code"]) == (404, "not_found")
        assert (await them.client.get(f"{origin}/metrics")).status_code == 401


async def test_a_door_restarts_while_workers_go_on(shared: Stage) -> None:
    """FLORA repeats what it was refused meanwhile: every callback is accepted, none is lost, no run waits for a poll."""
    slow: dict[str, Any] = {"reconcile": {"first_poll_seconds": 60, "callback_window_seconds": 120}}
    async with replicas(shared, ("--only", "door"), ("--only", "workers"), **slow) as them:
        run_ids = [shared.start() for _ in range(20)]
        await eventually(lambda: _accepted(shared))
        door = them.lives[0]
        assert await door.stop() == 0
        run_ids += [shared.start() for _ in range(10)]
        balanced, shared.port = shared.port, them.ports[0]
        with (shared.directory / "log2").open("wb") as log:
            async with served(
                shared, stdout=log.fileno(), arguments=("--only", "door"), **LEASE, **slow
            ) as again:
                await again.ready(them.client)
                shared.port = balanced
                await shared.over(*run_ids)
        check(shared, run_ids)
        assert {row["verdict"] for row in shared.rows("SELECT verdict FROM runs")} == {"matched"}


async def test_a_door_on_sqlite_is_for_measuring(stage: Stage) -> None:
    """Only where it is asked for by name; it takes callbacks, commits them, and works on nothing."""
    async with served(stage, arguments=("--only", "door")) as life:
        assert await life.ended() == 2
    environ = {"RECEIVER_BENCH_DOOR": "1"}
    async with (
        stage.client() as client,
        served(stage, arguments=("--only", "door"), environ=environ) as life,
    ):
        await life.ready(client)
        run_id = stage.start(callback=False)
        assert (await stage.send(client, stage.body(run_id))).json() == {"status": "accepted"}
        assert await life.stop() == 0
    assert (stage.run(run_id)["state"], stage.dispatches(run_id)) == ("reported", [])


@pytest.mark.parametrize("command", ["check", "serve"])
def test_a_missing_driver_is_told_with_its_cure(command: str, tmp_path: Path) -> None:
    """PostgreSQL is an extra: without it the settings are answered by what to install."""
    blocked = "import sys; sys.modules['psycopg'] = None; from receiver.cli import main; main()"
    environ = {
        "PATH": os.environ["PATH"],
        "FLORA_API_KEY": "sk_test_x",
        "FLORA_WEBHOOK_SECRET": "whsec_x",
        "RECEIVER_DATABASE__URL": "postgresql://receiver@127.0.0.1/receiver",
    }
    done = subprocess.run(
        [sys.executable, "-c", blocked, command],
        cwd=tmp_path,
        env=environ,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode in {1, 2}, done.stdout
    assert "flora-receiver[postgres]" in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


async def test_a_part_of_the_work_needs_postgres(stage: Stage) -> None:
    """A SQLite file belongs to one process."""
    async with served(stage, arguments=("--only", "workers")) as life:
        assert await life.ended() == 2
    assert b"postgresql://" in life.said


async def test_behind_pgbouncer(shared: Stage, pgbouncer: str) -> None:
    """In transaction mode: nothing of ours lives in a session, and wake-ups take the way past it or are done without."""
    direct, shared.postgres = shared.postgres, pgbouncer
    for listen_url in ({"listen_url": direct}, {}):
        async with replicas(shared, (), (), database={"url": pgbouncer, **listen_url}):
            run_ids = [shared.start() for _ in range(10)]
            await shared.over(*run_ids)
            for run_id in run_ids:
                shared.check_files(run_id)
