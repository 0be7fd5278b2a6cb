"""Several receivers on one PostgreSQL: any of them may be killed, the database may go away and come back."""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.e2e.lives import Served, is_ready, served
from tests.e2e.stage import Stage, eventually, free_port
from tests.postgres import Postgres

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

    async def kill(self, number: int) -> None:
        self.lives[number].process.kill()
        await self.lives[number].process.wait()


@contextlib.asynccontextmanager
async def replicas(stage: Stage, *roles: tuple[str, ...], **sections: Any) -> AsyncIterator[Replicas]:
    """Run one receiver for each tuple of further arguments."""
    async with contextlib.AsyncExitStack() as stack:
        limits = httpx.Limits(max_keepalive_connections=0)
        made = httpx.AsyncClient(verify=stage.tls(), trust_env=False, timeout=15, limits=limits)
        client = await stack.enter_async_context(made)
        lives, ports = [], []
        for number, arguments in enumerate(roles):
            stage.port = free_port()
            ports.append(stage.port)
            log = stack.enter_context((stage.directory / f"log{number}").open("wb"))
            life = await stack.enter_async_context(
                served(stage, stdout=log.fileno(), arguments=arguments, **LEASE, **sections)
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


def check(stage: Stage, run_ids: list[str]) -> None:
    """Every run is settled once, its files are whole, and each handler's effect is there once."""
    for run_id in run_ids:
        stage.check_files(run_id)
        assert [row["state"] for row in stage.dispatches(run_id) if row["event"] == "settled"] == ["done", "done"], (
            run_id
        )
    assert len(stage.rows("SELECT run_id FROM runs")) == len(run_ids)
    manifests = list(stage.outputs.rglob("run.json"))
    assert len(manifests) == len(run_ids)
    assert stage.parts() == []


async def test_two_of_three_are_killed_and_nothing_is_lost(shared: Stage) -> None:
    """One after the other, under load: what they held is taken over within a lease, and nothing happens twice."""
    async with replicas(shared, (), (), ()) as them:
        run_ids = [shared.start() for _ in range(30)]

        async def settled(count: int) -> bool:
            return len(shared.rows("SELECT run_id FROM runs WHERE settled_at IS NOT NULL")) >= count

        await eventually(lambda: settled(5))
        await them.kill(0)
        run_ids += [shared.start() for _ in range(30)]
        await eventually(lambda: settled(30))
        await them.kill(1)
        run_ids += [shared.start() for _ in range(20)]
        await shared.over(*run_ids, within=60)
        check(shared, run_ids)


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
            assert not await is_ready(shared, them.client)
        finally:
            await asyncio.to_thread(postgres_server.ctl, "start")

        async def taken() -> bool:
            return (await shared.send(them.client, shared.body(late, delivery_id="whd_late"))).status_code == 200

        await eventually(taken)
        await shared.over(*run_ids, late, within=60)
        check(shared, [*run_ids, late])


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


def test_logs_hold_no_password(tmp_path: Path) -> None:
    from receiver.store.database import shown  # noqa: PLC0415

    assert shown("postgresql://u:secret@host/x?password=secret") == "postgresql://host/x"
    assert shown("sqlite:///var/receiver.db") == "sqlite:///var/receiver.db"
