"""The console script as an operator meets it: signals, ports, a second one, broken disks and databases, and what it logs."""

import asyncio
import contextlib
import json
import os
import resource
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.support.lives import COMMAND, is_ready, served
from tests.support.patience import PATIENCE_SECONDS
from tests.support.stage import Stage, eventually


async def test_sigterm_with_nothing_to_do(stage: Stage) -> None:
    """Exit code 0; the next connection is refused; a second start works at once."""
    for _ in range(2):
        async with served(stage) as receiver, stage.client() as client:
            await receiver.ready(client)
            run_id = stage.start()
            await stage.over(run_id)
            assert await receiver.stop() == 0
            with pytest.raises(httpx.ConnectError):
                await client.get(stage.url)
        assert b"service.stopped" in receiver.said
        assert b"Traceback" not in receiver.said
        stage.check_files(run_id)


async def test_sigterm_answers_the_callbacks_in_hand(stage: Stage) -> None:
    """A callback whose body is on its way is committed and answered, a new one is not taken; exit code 0."""
    body = stage.body("run_in_hand")
    async with served(stage) as receiver, stage.client() as client:
        await receiver.ready(client)
        reader, writer = await asyncio.open_connection("127.0.0.1", stage.port, ssl=stage.tls())
        head = (
            f"POST /callbacks/flora HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n"
            f"Flora-Signature: {stage.signature(body)}\r\n\r\n"
        )
        writer.write(head.encode() + body[:10])
        await writer.drain()
        other, other_writer = await asyncio.open_connection("127.0.0.1", stage.port, ssl=stage.tls())
        await is_ready(stage, client)  # the server has had its turn: the head is read
        receiver.process.send_signal(signal.SIGTERM)

        async def refused() -> bool:  # quick to tell: the body in hand has five seconds from here
            try:
                _, another = await asyncio.open_connection("127.0.0.1", stage.port)
            except OSError:
                return True
            another.transport.abort()
            return False

        await eventually(refused)
        writer.write(body[10:])
        await writer.drain()
        answer = await asyncio.wait_for(reader.readuntil(b"}"), PATIENCE_SECONDS)
        assert answer.startswith(b"HTTP/1.1 200")
        assert answer.endswith(b'{"status":"accepted"}')
        assert await receiver.ended() == 0
        for each in (writer, other_writer):
            each.transport.abort()
        assert other.at_eof() or await other.read() == b""
    assert len(stage.deliveries("run_in_hand")) == 1


async def test_sigterm_during_a_download_gives_the_attempt_back(stage: Stage) -> None:
    """The attempt is not counted, nothing unfinished is left, and the next start stores the file at its first attempt."""
    async with served(stage, downloads={"stall_seconds": 60}) as receiver, stage.client() as client:
        await receiver.ready(client)
        stall = {"kind": "stall", "after_bytes": 600_000, "next": 1}
        run_id = stage.start("emu-image", {"kind": "size", "bytes": 900_000}, stall)

        async def halfway() -> bool:
            return any(part.stat().st_size > 0 for part in stage.parts())

        await eventually(halfway)
        assert await receiver.stop() == 0
    [dispatch] = [row for row in stage.dispatches(run_id, "storage") if row["event"] == "settled"]
    assert (dispatch["state"], dispatch["attempts"], dispatch["lease_token"]) == ("ready", 0, None)
    assert stage.rows("SELECT * FROM dispatch_attempts WHERE dispatch_seq = ?", dispatch["seq"]) == []
    assert stage.parts() == []
    async with served(stage) as receiver, stage.client() as client:
        await stage.over(run_id)
        assert await receiver.stop() == 0
    assert b"leases_released" not in receiver.said
    assert stage.dispatches(run_id, "storage")[0]["attempts"] == 1
    stage.check_files(run_id)


async def test_a_second_receiver_on_the_same_file_is_refused(stage: Stage) -> None:
    """One process per SQLite file: the second says so and ends, the first does not notice."""
    async with served(stage) as first, stage.client() as client:
        await first.ready(client)
        port, stage.port = stage.port, 0
        async with served(stage) as second:
            assert await second.ended() == 1
        assert b"belongs to another running flora-receiver" in second.said
        assert b"Traceback" not in second.said
        stage.port = port
        run_id = stage.start()
        await stage.over(run_id)
        assert await first.stop() == 0


async def test_a_port_in_use_is_said(stage: Stage, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Exit code 2 and a sentence with the address; the database is given back."""
    async with stage.service():
        stage.directory = tmp_path_factory.mktemp("other")
        async with served(stage) as receiver:
            assert await receiver.ended() == 2
    assert f"cannot listen on 127.0.0.1:{stage.port}".encode() in receiver.said
    assert b"Traceback" not in receiver.said


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the write lock of the SQLite file, as a backup or a curious operator may."""
    with contextlib.closing(
        sqlite3.connect(path, isolation_level=None, timeout=PATIENCE_SECONDS)
    ) as connection:
        connection.execute("BEGIN IMMEDIATE")
        try:
            yield
        finally:
            connection.execute("ROLLBACK")


def is_unavailable(answer: httpx.Response) -> None:
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "unavailable")
    assert int(answer.headers["retry-after"]) > 0


async def test_a_database_that_somebody_else_locks(stage: Stage) -> None:
    """503 with Retry-After, never 200 and never 4xx; once it is free the same callback is accepted and its run settles."""
    async with stage.service() as service, stage.client() as client:
        run_id = stage.start(callback=False)
        body = stage.body(run_id)
        with locked(stage.database):
            is_unavailable(await stage.send(client, body))
            assert (await client.get(stage.url.replace("/callbacks/flora", "/readyz"))).status_code == 503
        assert stage.deliveries(run_id) == []
        assert (await stage.send(client, body)).json() == {"status": "accepted"}
        await stage.over(run_id)
        assert await service.ready() is None
    stage.check_files(run_id)


async def test_a_database_that_is_locked_while_a_handler_answers(stage: Stage) -> None:
    """The answer is written down when the lock is gone: the dispatch does not stay leased until the next start."""
    async with stage.service() as service:
        run_id = await stage.track(service, "emu-image", {"kind": "stall", "seconds": 0.8, "next": 1})

        async def leased() -> bool:
            return any(row["state"] == "leased" for row in stage.dispatches(run_id, "storage"))

        await eventually(leased)
        with locked(stage.database):
            # Longer than the writer waits for a lock: what it wants to write meanwhile fails.
            async def failed() -> bool:
                return await service.ready() is not None

            await eventually(failed)
            await eventually(failed)
        await stage.over(run_id)
    stage.check_files(run_id)


@pytest.mark.parametrize(
    ("broken", "mended"),
    [
        ("PRAGMA max_page_count = 1", "PRAGMA max_page_count = 4294967294"),
        ("PRAGMA query_only = ON", "PRAGMA query_only = OFF"),
    ],
    ids=["full", "read-only"],
)
async def test_a_database_that_cannot_be_written(stage: Stage, broken: str, mended: str) -> None:
    """Full or read-only: 503 with Retry-After and nothing lost; mended, everything goes on by itself."""
    window = {"callback_window_seconds": 4.0}
    async with stage.service(reconcile=window) as service, stage.client() as client:
        tracked = await stage.track(service, "emu-image", {"kind": "drop"})
        run_id = stage.start(callback=False)
        large = stage.body(run_id, padding="x" * 60_000)
        await service.database.run(lambda connection: _pragma(connection, broken))
        is_unavailable(await stage.send(client, large))
        is_unavailable(await stage.send(client, large))
        assert stage.deliveries(run_id) == []
        await service.database.run(lambda connection: _pragma(connection, mended))
        assert (await stage.send(client, large)).json() == {"status": "accepted"}
        await stage.over(run_id, tracked)
    stage.check_files(run_id)
    stage.check_files(tracked)


def _pragma(connection: object, statement: str) -> None:
    connection.exec_driver_sql(statement)  # type: ignore[attr-defined]
    connection.rollback()  # type: ignore[attr-defined]


async def test_a_disk_that_is_full(stage: Stage) -> None:
    """No process of ours may write a byte more: callbacks get 503, downloads are retried; with space again all is stored."""
    async with served(stage) as receiver, stage.client() as client:
        await receiver.ready(client)
        waiting = stage.start(
            "emu-image", {"kind": "size", "bytes": 3_000_000}, {"kind": "run_seconds", "seconds": 0}
        )
        soft = resource.prlimit(receiver.pid, resource.RLIMIT_FSIZE)
        resource.prlimit(receiver.pid, resource.RLIMIT_FSIZE, (1_000_000, soft[1]))
        run_id = stage.start("emu-image", {"kind": "size", "bytes": 2_000_000})

        async def told() -> bool:
            return "cannot write" in str([row["last_error"] for row in stage.dispatches(run_id, "storage")])

        await eventually(told)
        resource.prlimit(receiver.pid, resource.RLIMIT_FSIZE, (1, soft[1]))
        other = stage.start(callback=False)
        is_unavailable(await stage.send(client, stage.body(other)))

        async def not_ready() -> bool:
            return (await client.get(stage.url.replace("/callbacks/flora", "/readyz"))).status_code == 503

        await eventually(not_ready)  # an empty transaction would still go well
        resource.prlimit(receiver.pid, resource.RLIMIT_FSIZE, soft)
        assert (await stage.send(client, stage.body(other))).status_code == 200
        await stage.over(run_id, waiting, other)
        assert await receiver.stop() == 0
    for each in (run_id, waiting, other):
        stage.check_files(each)
    assert stage.parts() == []


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount")
async def test_outputs_on_a_full_file_system(stage: Stage, tmp_path: Path) -> None:
    """ENOSPC is a reason to try again, said in words; when there is room, the file is stored."""
    stage.outputs.mkdir()
    if await _ran("mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(stage.outputs)):
        pytest.skip("mounting is not allowed here")
    try:
        (stage.outputs / "someone's").write_bytes(bytes(900_000))
        async with stage.service() as service:
            run_id = await stage.track(service, "emu-image", {"kind": "size", "bytes": 400_000})

            async def told() -> bool:
                return "disk full" in str(
                    [row["last_error"] for row in stage.dispatches(run_id, "storage")]
                )

            await eventually(told)
            assert stage.parts() == []
            (stage.outputs / "someone's").unlink()
            await stage.over(run_id)
            stage.check_files(run_id)
    finally:
        assert await _ran("umount", str(stage.outputs)) == 0


async def _ran(*command: str) -> int:
    return await (await asyncio.create_subprocess_exec(*command)).wait()


async def test_outputs_below_a_file(stage: Stage) -> None:
    """A directory that cannot be made is said at the start and by every dispatch; callbacks and other handlers go on."""
    stage.outputs.write_text("in the way")
    handlers = [
        {"use": "storage", "max_attempts": 2, "options": {"url": str(stage.outputs)}},
        {"use": "log"},
    ]
    async with served(stage, handlers=handlers) as receiver, stage.client() as client:
        await receiver.ready(client)
        run_id = stage.start()
        await stage.over(run_id)
        assert await receiver.stop() == 0
    storage, log = stage.dispatches(run_id)[:2]
    assert (storage["state"], log["state"]) == ("dead", "done")
    assert "cannot write to" in storage["last_error"]
    assert b"handler.unhealthy" in receiver.said
    assert stage.run(run_id)["state"] == "completed"


async def test_logs_that_nobody_can_write(stage: Stage) -> None:
    """The reader of the log dies, or its disk is full: that is no reason to refuse a callback or to leave a run unread."""
    reader, writer = os.pipe()
    os.close(reader)
    try:
        async with served(stage, stderr=writer) as receiver, stage.client() as client:
            await receiver.ready(client)
            run_id = stage.start()
            forged = await client.post(stage.url, content=b"{}", headers={"Flora-Signature": "rubbish"})
            assert forged.status_code == 400
            await stage.over(run_id)
            assert await receiver.stop() in {
                0,
                120,
            }  # 120: Python itself could not flush its standard error
    finally:
        os.close(writer)
    stage.check_files(run_id)


async def test_logs_keep_secrets_and_media_to_themselves(stage: Stage) -> None:
    """At info level, through good and bad weather: no secret, no key, no body, no media URL, no text of an output."""
    handlers = [
        {"use": "storage", "max_attempts": 2, "options": {"url": str(stage.outputs)}},
        {"use": "log"},
    ]
    async with (
        served(stage, handlers=handlers, downloads={"stall_seconds": 3.0}) as receiver,
        stage.client() as client,
    ):
        await receiver.ready(client)
        runs = [
            stage.start("emu-everything"),
            stage.start("emu-fail"),
            stage.start("emu-image", {"kind": "expired"}),
            stage.start("emu-image", {"kind": "stall"}),
            stage.start("emu-image", {"kind": "cut", "after_bytes": 3}),
            stage.start(
                "emu-image", {"kind": "redirect", "url": "https://127.0.0.1:1/media/elsewhere?token=1"}
            ),
            stage.start("emu-image", {"kind": "html", "next": 1}),
            stage.start("emu-image", {"kind": "contradict"}),
            stage.start("emu-image", {"kind": "wrong_secret", "attempts": [1]}),
        ]
        bodies = [stage.body("run_body", note="a word from the body"), b'{"note": "a word from the body"}']
        for body in bodies:
            await stage.send(client, body)
        await client.post(stage.url, content=bodies[0], headers={"Flora-Signature": "t=1,v1=abc"})
        await stage.over(*runs)
        assert await receiver.stop() == 0
    said = receiver.said.decode()
    for line in said.splitlines():
        assert {"event", "level", "timestamp"} <= json.loads(line).keys(), line
    assert "dispatch.dead" in said
    secret = stage.secret
    signatures = [
        attempt.signature for delivery in stage.emulator.deliveries for attempt in delivery.attempts
    ]
    digests = [signature.partition("v1=")[2] for signature in signatures]
    texts = [output.text for run in runs for output in stage.emulator.runs.get(run).outputs if output.text]
    for hidden in (
        secret, secret.removeprefix("whsec_"), "whsec_", stage.emulator.settings.api_key, "sk_test_", "/media/", "token=",
        "a word from the body", '"api_version"', "api_version", *digests, *texts, "An emulated answer",
    ):  # fmt: skip
        assert hidden not in said, hidden


def test_the_module_is_the_command() -> None:
    """The console script is there and answers: everything above really ran it."""
    version = subprocess.run([COMMAND, "--version"], capture_output=True, check=True, text=True)
    assert version.stdout.strip()
    assert Path(COMMAND).parent == Path(sys.executable).parent
