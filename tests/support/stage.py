"""The stage of the end-to-end tests: an emulator and a receiver over HTTPS, with real files.

`Stage.service()` runs the receiver inside the test's own loop; `tests.support.lives` runs it as
processes that can be killed.
"""

import asyncio
import contextlib
import hashlib
import json
import secrets
import socket
import sqlite3
import ssl
import struct
import time
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import unquote, urlsplit

import httpx
import psycopg
import psycopg.rows

from receiver.config import Settings
from receiver.config.callback_url import CALLBACK_PATH
from receiver.emulator import Emulator, EmulatorSettings
from receiver.emulator.faults import parse_faults
from receiver.flora.signature import HEADER, sign
from receiver.model import Origin, RunRegistered
from receiver.net import certificates
from receiver.service.service import Service
from receiver.web.server import Server, bind
from tests.support.patience import PATIENCE_SECONDS

T = TypeVar("T")

SETTLED = ("completed", "failed")
FINISHED = ("done", "dead", "skipped")


async def eventually(
    probe: Callable[[], Awaitable[T]], *, within: float = PATIENCE_SECONDS, what: str = ""
) -> T:
    """Call `probe` until its result is truthy, and return it: the one wait for time to pass."""
    deadline = asyncio.get_running_loop().time() + within
    while not (found := await probe()):
        if asyncio.get_running_loop().time() > deadline:
            raise AssertionError(f"it did not come within {within:g} s: {what or probe!r}; last: {found!r}")
        await asyncio.sleep(0.03)
    return found


class Clock:
    """The time as the receiver sees it: the real one, and whatever it is wrong by."""

    def __init__(self) -> None:
        self.wrong_by = timedelta(0)

    def __call__(self) -> datetime:
        return datetime.now(UTC) + self.wrong_by


@dataclass
class Stage:
    """One emulator, one certificate, one directory.

    Any number of receivers, one after the other.
    """

    directory: Path
    emulator: Emulator
    origin: str
    ca: Path
    cert: Path
    key: Path
    secret: str
    port: int = 0
    """Where the receiver listens; 0 takes a free one."""
    extra: dict[str, Any] = field(default_factory=dict)
    postgres: str | None = None
    """The URL of a PostgreSQL ledger, in place of the SQLite file."""
    plain: bool = False
    """Whether the receiver leaves TLS to a proxy before it."""

    @property
    def database(self) -> Path:
        return self.directory / "ledger.db"

    @property
    def outputs(self) -> Path:
        return self.directory / "outputs"

    @property
    def host(self) -> str:
        return urlsplit(self.origin).netloc

    @property
    def url(self) -> str:
        return f"https://127.0.0.1:{self.port}{CALLBACK_PATH}"

    def document(self, **sections: Any) -> dict[str, Any]:
        """Return the settings as a nested dict: production's, with shorter waits.

        `sections` are laid over them.
        """
        base: dict[str, Any] = {
            "public": {"host": "127.0.0.1", "port": self.port},
            "operations": {"port": 0},
            "tls": {} if self.plain else {"cert": str(self.cert), "key": str(self.key)},
            "database": {"url": self.postgres or f"sqlite:///{self.database}"},
            "flora": {
                "base_url": self.emulator.base_url(self.origin),
                "api_key": self.emulator.settings.api_key,
                "webhook_secrets": [self.secret],
                "timeout_seconds": 3,
            },
            "reconcile": {
                "first_poll_seconds": 0.8,
                "max_gap_seconds": 1.0,
                "callback_window_seconds": 60.0,
                "ladder_seconds": [0, 0.1, 0.2, 0.3, 0.5, 0.5, 0.5, 1.0],
                "cost_seconds": 30,
            },
            "downloads": {"allow_private_hosts": [self.host], "stall_seconds": 20.0},
        }
        handlers = [{"use": "storage", "options": {"url": str(self.outputs)}}, {"use": "log"}]
        for name, values in (self.extra | sections).items():
            if name == "handlers":
                handlers = values
            elif isinstance(values, Mapping):
                base[name] = {**base.get(name, {}), **values}
            else:
                base[name] = values
        return base | {"handlers": handlers}

    @contextlib.asynccontextmanager
    async def service(
        self, *, clock: Callable[[], datetime] | None = None, **sections: Any
    ) -> AsyncIterator[Service]:
        """Run a receiver in this loop."""
        service = Service(Settings.model_validate(self.document(**sections)), clock=clock)
        async with service.running():
            self.port = service.address[1]
            yield service

    def start(self, technique: str = "emu-image", *faults: Mapping[str, Any], callback: bool = True) -> str:
        """Start a run at the emulator, as a backend would; its callback goes to the receiver."""
        url = self.url if callback else None
        return self.emulator.start_run(
            technique, callback_url=url, faults=[dict(fault) for fault in faults]
        )

    async def track(
        self, service: Service, technique: str = "emu-image", *faults: Mapping[str, Any]
    ) -> str:
        """Start a run that the receiver knows of, as one that it started itself."""
        run_id = self.start(technique, *faults)
        await self.register(service, run_id)
        return run_id

    async def register(self, service: Service, run_id: str, **known: Any) -> None:
        run = self.emulator.runs.get(run_id)
        await service.intake.apply(
            RunRegistered(
                run_id=run_id,
                origin=Origin.TRACKED,
                registered_at=datetime.now(UTC),
                run_type="technique",
                technique_id=run.subject.id,
                **{"workspace_id": run.workspace_id, **known},
            )
        )
        # The poller may have planned to sleep for longer than this run's first read.
        service.signals.poll.set()

    # --- looking at the ledger, from outside
    # ---------------------------------------------------------------------

    def rows(self, statement: str, *values: Any) -> list[dict[str, Any]]:
        """Read from the SQLite file, as another process would.

        On a connection that cannot write.
        """
        if self.postgres is not None:
            with psycopg.connect(self.postgres, row_factory=psycopg.rows.dict_row) as session:
                return session.execute(statement.replace("?", "%s").encode(), values or None).fetchall()
        with contextlib.closing(
            sqlite3.connect(f"file:{self.database}?mode=ro", uri=True, timeout=PATIENCE_SECONDS)
        ) as connection:
            connection.row_factory = sqlite3.Row
            return [dict(row) for row in connection.execute(statement, values)]

    def run(self, run_id: str) -> dict[str, Any]:
        found = self.rows("SELECT * FROM runs WHERE run_id = ?", run_id)
        return found[0] if found else {}

    def dispatches(self, run_id: str, handler: str | None = None) -> list[dict[str, Any]]:
        rows = self.rows("SELECT * FROM dispatches WHERE run_id = ? ORDER BY seq", run_id)
        return [row for row in rows if handler in (None, row["handler"])]

    def artifacts(self, run_id: str) -> list[dict[str, Any]]:
        return self.rows("SELECT * FROM artifacts WHERE run_id = ? ORDER BY position", run_id)

    def deliveries(self, run_id: str) -> list[dict[str, Any]]:
        return self.rows("SELECT * FROM deliveries WHERE run_id = ?", run_id)

    def end_runs(self) -> None:
        """Let every run that the emulator has started end now.

        Those to come are as short as ever.
        """
        self.emulator.faults.add(parse_faults([{"kind": "run_seconds", "seconds": 0.2}]))
        for run_id in list(self.emulator.runs._order):
            self.emulator._starter.bind(run_id, parse_faults([{"kind": "run_seconds", "seconds": 0}]))

    def end_read_lag(self, run_id: str) -> None:
        """Let the API show the end of a run from now on."""
        self.emulator.runs.apply(run_id, parse_faults([{"kind": "read_lag", "seconds": 0}]))

    def is_over(self, run_id: str) -> bool:
        """Whether a run is settled, its handlers have all answered, and its verdict is given."""
        run, dispatches = self.run(run_id), self.dispatches(run_id)
        return (
            bool(run and dispatches)
            and run["state"] in SETTLED
            and run["verdict"] is not None
            and all(row["state"] in FINISHED for row in dispatches)
        )

    async def over(self, *run_ids: str, within: float = PATIENCE_SECONDS) -> None:
        left = list(run_ids)

        async def look() -> bool:
            # In a thread: the emulator is in this loop, and a receiver that waits for it must not
            # wait for our looking.
            while left:
                over: bool = await asyncio.to_thread(self.is_over, left[-1])
                if not over:
                    return False
                left.pop()
            return True

        try:
            await eventually(look, within=within)
        except AssertionError as error:
            told = [(self.run(run_id), self.dispatches(run_id)) for run_id in left[:2]]
            raise AssertionError(f"{len(left)} of {len(run_ids)} runs are not over: {told}") from error

    async def at(self, run_id: str, **wanted: Any) -> dict[str, Any]:
        """Wait until the run's row shows what is wanted."""

        async def look() -> dict[str, Any] | None:
            run = self.run(run_id)
            return run if run and all(run[name] == value for name, value in wanted.items()) else None

        try:
            found = await eventually(look)
        except AssertionError as error:
            raise AssertionError(f"wanted {wanted}, it is {self.run(run_id)}") from error
        assert found is not None
        return found

    # --- files ------------------------------------------------------------------------------------
    # ---------------

    def files(self, run_id: str) -> dict[int, Path]:
        """Return the stored files of a run by position, -1 being the manifest."""
        stored = [row for row in self.artifacts(run_id) if row["stored_at"] is not None]
        return {row["position"]: Path(unquote(urlsplit(row["location"]).path)) for row in stored}

    def parts(self) -> list[Path]:
        """Return what unfinished downloads have left lying about."""
        return [path for path in self.outputs.rglob("*") if ".part" in path.name]

    def check_files(self, run_id: str) -> dict[str, Any]:
        """Check every file of a completed run against the emulator and the manifest.

        Return that.
        """
        planned = self.emulator.runs.get(run_id).outputs
        files = self.files(run_id)
        assert sorted(files) == [-1, *range(len(planned))], f"{run_id}: {files}"
        manifest: dict[str, Any] = json.loads(files[-1].read_bytes())
        assert manifest["run_id"] == run_id
        assert len(manifest["outputs"]) == len(planned)
        for output, told in zip(planned, manifest["outputs"], strict=True):
            content = files[told["position"]].read_bytes()
            assert told["type"] == output.type
            assert told["output_id"] == output.output_id
            assert told["size"] == len(content)
            assert told["sha256"] == hashlib.sha256(content).hexdigest()
            assert unquote(urlsplit(told["location"]).path) == str(files[told["position"]])
            if output.type == "text":
                assert content.decode() == output.text
            else:
                MAGIC[output.type](content)
        return manifest

    # --- callbacks of our own
    # ------------------------------------------------------------------------------------

    def body(
        self, run_id: str, *, status: str = "completed", delivery_id: str | None = None, **more: Any
    ) -> bytes:
        """Return a callback's body as FLORA writes it; `more` is laid over its top level."""
        data = {"run_id": run_id, "run_type": "technique", "workspace_id": "ws_emulator", "status": status}
        message = {
            "id": delivery_id or f"whd_{secrets.token_hex(8)}",
            "type": f"run.{status}",
            "api_version": "2026-06-11",
            "created_at": int(time.time() * 1000),
            "data": data,
        }
        return json.dumps(message | more, separators=(",", ":")).encode()

    def signature(self, body: bytes, *, age: int = 0) -> str:
        return sign(body, self.secret, timestamp=int(time.time()) - age)

    async def send(
        self, client: httpx.AsyncClient, body: bytes, signature: str | None = None
    ) -> httpx.Response:
        headers = {"Content-Type": "application/json", HEADER: signature or self.signature(body)}
        return await client.post(self.url, content=body, headers=headers)

    def client(self) -> httpx.AsyncClient:
        return httpx.AsyncClient(verify=self.tls(), trust_env=False, timeout=PATIENCE_SECONDS)

    def tls(self) -> ssl.SSLContext:
        return ssl.create_default_context(cafile=self.ca)


def png(content: bytes) -> None:
    """Walk the chunks and check every checksum."""
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    at, kinds = 8, []
    while at < len(content):
        length, kind = struct.unpack(">I4s", content[at : at + 8])
        data = content[at + 4 : at + 8 + length]
        assert zlib.crc32(data) == struct.unpack(">I", content[at + 8 + length : at + 12 + length])[0]
        kinds.append(kind)
        at += 12 + length
    assert kinds[0] == b"IHDR"
    assert kinds[-1] == b"IEND"


def mp4(content: bytes) -> None:
    """Walk the boxes: they must fill the file exactly."""
    at, kinds = 0, []
    while at < len(content):
        size, kind = struct.unpack(">I4s", content[at : at + 8])
        size = struct.unpack(">Q", content[at + 8 : at + 16])[0] if size == 1 else size
        assert size >= 8
        kinds.append(kind)
        at += size
    assert at == len(content)
    assert kinds[0] == b"ftyp"
    assert b"moov" in kinds


def wav(content: bytes) -> None:
    assert content[:4] == b"RIFF"
    assert content[8:12] == b"WAVE"
    assert struct.unpack("<I", content[4:8])[0] == len(content) - 8


def pdf(content: bytes) -> None:
    assert content.startswith(b"%PDF-")
    assert content.rstrip().endswith(b"%%EOF")


MAGIC: Mapping[str, Callable[[bytes], None]] = {
    "imageUrl": png,
    "videoUrl": mp4,
    "audioUrl": wav,
    "documentUrl": pdf,
}


@contextlib.asynccontextmanager
async def run_stage(directory: Path, **emulation: Any) -> AsyncIterator[Stage]:
    """Set the stage: a throw-away CA, and an emulator that trusts it alone, served on loopback."""
    authority = certificates.make_authority()
    ca = directory / "ca.pem"
    ca.write_bytes(authority.pem)
    cert, key = certificates.write(certificates.issue(authority), directory)
    secret = f"whsec_{secrets.token_hex(16)}"
    settings = EmulatorSettings(
        **{
            "run_seconds": 0.2,
            "time_scale": 10.0,
            "callback_timeout_seconds": 5.0,
            "allow_private_callbacks": True,
            "callback_ca": ca,
            "webhook_secrets": (secret,),
            "api_key": f"sk_test_{secrets.token_hex(16)}",
            **emulation,
        }
    )
    emulator = Emulator(settings)
    stand = Server(emulator.app, bind("127.0.0.1", 0))
    await stand.start()
    emulator.public_origin = f"http://127.0.0.1:{stand.port}"
    try:
        yield Stage(directory, emulator, emulator.public_origin, ca, cert, key, secret)
    finally:
        await emulator.aclose()
        await stand.stop()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def toml(document: Mapping[str, Any]) -> str:
    """Write settings as TOML.

    Plain values first, then tables of plain values, and lists of tables.
    """
    plain = {name: value for name, value in document.items() if not isinstance(value, Mapping | list)}
    tables = {name: value for name, value in document.items() if name not in plain}
    return "\n".join([*(f"{name} = {json.dumps(value)}" for name, value in plain.items()), *_toml(tables)])


def _toml(document: Mapping[str, Any]) -> Iterator[str]:
    for name, value in document.items():
        tables: Sequence[Any] = value if isinstance(value, list) else [value]
        for table in tables:
            yield f"[[{name}]]" if isinstance(value, list) else f"[{name}]"
            flat = {**table, **table.get("options", {})}
            flat.pop("options", None)
            yield from (f"{key} = {json.dumps(given)}" for key, given in flat.items())
