"""A PostgreSQL of the tests' own: a server in a temporary directory that listens on a unix socket alone.

As root it runs as `nobody`, since PostgreSQL refuses root. Whoever has no server installed is told how to get one.
"""

import contextlib
import grp
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg
import pytest
from sqlalchemy import create_engine

from receiver.store.migrate import upgrade
from receiver.store.schema import metadata
from tests.support.patience import PATIENCE_SECONDS

_PORT = 5432
_PLACES = ("/usr/lib/postgresql/*/bin", "/usr/pgsql-*/bin", "/opt/homebrew/opt/postgresql*/bin")
_SETTINGS = {
    "listen_addresses": "",
    "fsync": "on",
    "max_connections": "200",
    "shared_buffers": "64MB",
    "jit": "off",
    "log_min_messages": "fatal",
}


def tool(name: str) -> str:
    """Return the path of one of PostgreSQL's programs."""
    if found := shutil.which(name):
        return found
    for pattern in _PLACES:
        for directory in sorted(Path("/").glob(pattern[1:]), reverse=True):
            if (directory / name).exists():
                return str(directory / name)
    pytest.fail(
        f"{name} is missing: the tests run on PostgreSQL too. apt-get install postgresql", pytrace=False
    )


def unprivileged_user() -> dict[str, Any]:
    """Return how to start a program that does not want to be root."""
    if os.geteuid() != 0:
        return {}
    nobody = pwd.getpwnam("nobody")
    return {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}


def hand_over(directory: Path) -> None:
    """Give a directory to whom `unprivileged_user` programs run as."""
    if os.geteuid() == 0:
        nobody = pwd.getpwnam("nobody")
        os.chown(directory, nobody.pw_uid, grp.getgrgid(nobody.pw_gid).gr_gid)


@dataclass(frozen=True, slots=True)
class Postgres:
    """A running server, and the directory with its socket."""

    directory: Path

    def url(self, database: str) -> str:
        return f"postgresql://flora@/{database}?host={self.directory}&port={_PORT}"

    def execute(self, sql: str, database: str = "postgres") -> list[tuple[Any, ...]]:
        with psycopg.connect(self.url(database), autocommit=True) as connection:
            cursor = connection.execute(sql.encode())
            return cursor.fetchall() if cursor.description else []

    def create(self, name: str, *, migrated: bool = True) -> str:
        """Make a database, with or without the tables; return its URL."""
        self.execute(f"CREATE DATABASE {name}")
        if migrated:
            engine = create_engine(self.url(name).replace("postgresql:", "postgresql+psycopg:", 1))
            with engine.connect() as connection:
                upgrade(connection)
            engine.dispose()
        return self.url(name)

    def empty(self, name: str) -> None:
        """Delete every row and number anew: a tenth of what TRUNCATE costs on tables that are almost empty."""
        tables = reversed(metadata.sorted_tables)
        deletes = "; ".join(f"DELETE FROM {table.name}" for table in tables)  # noqa: S608  # names of our own
        numbers = "SELECT setval(seqrelid::regclass, 1, false) FROM pg_sequence"
        self.execute(f"BEGIN; {deletes}; {numbers}; COMMIT", name)

    def ctl(self, *words: str) -> None:
        """Run pg_ctl and wait for it."""
        data = str(self.directory / "data")
        done = subprocess.run(
            [tool("pg_ctl"), "-D", data, "-w", "-t", f"{PATIENCE_SECONDS:.0f}", "-l", str(self.directory / "log"), *words],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False,
            cwd="/", **unprivileged_user(),
        )  # fmt: skip
        if done.returncode:
            log = self.directory / "log"
            pytest.fail(
                f"pg_ctl {words}: {done.stderr} {log.read_text() if log.exists() else ''}", pytrace=False
            )


def sweep() -> None:
    """Stop the servers that killed test runs have left behind, and remove their directories."""
    for directory in Path("/tmp").glob("flora-pg-*"):
        with contextlib.suppress(OSError, ValueError, IndexError):
            owner = int((directory / "owner").read_text())
            if Path(f"/proc/{owner}").exists() or not Path("/proc/self").exists():
                continue
            with contextlib.suppress(OSError, ValueError):
                os.kill(int((directory / "data/postmaster.pid").read_text().split()[0]), signal.SIGQUIT)
            shutil.rmtree(directory, ignore_errors=True)


@contextlib.contextmanager
def postgres() -> Iterator[Postgres]:
    """Run a server inside the block."""
    sweep()
    with tempfile.TemporaryDirectory(prefix="flora-pg-", dir="/tmp", ignore_cleanup_errors=True) as name:
        directory = Path(name)
        directory.chmod(0o755)
        hand_over(directory)
        (directory / "owner").write_text(str(os.getpid()))
        data = directory / "data"
        done = subprocess.run(
            [tool("initdb"), "-D", str(data), "-U", "flora", "-A", "trust", "-E", "UTF8", "--no-locale", "-N"],
            capture_output=True, text=True, check=False, cwd="/", **unprivileged_user(),
        )  # fmt: skip
        if done.returncode:
            pytest.fail(f"initdb: {done.stderr}", pytrace=False)
        settings = [f"{key} = '{value}'" for key, value in _SETTINGS.items()]
        settings.append(f"unix_socket_directories = '{directory}'")
        with (data / "postgresql.auto.conf").open("a") as file:
            file.write("\n".join(settings) + "\n")
        server = Postgres(directory)
        server.ctl("start")
        try:
            yield server
        finally:
            server.ctl("stop", "-m", "immediate")


@contextlib.contextmanager
def pooler(server: Postgres, database: str) -> Iterator[str]:
    """Run PgBouncer in transaction mode before a server, on a unix socket; yield the URL that leads through it."""
    program = shutil.which("pgbouncer") or shutil.which("pgbouncer", path="/usr/sbin:/usr/local/sbin")
    if program is None:
        pytest.fail(
            "pgbouncer is missing: the tests run behind it too. apt-get install pgbouncer", pytrace=False
        )
    with tempfile.TemporaryDirectory(prefix="flora-pool-", dir="/tmp", ignore_cleanup_errors=True) as name:
        directory = Path(name)
        directory.chmod(0o755)
        hand_over(directory)
        config = directory / "pgbouncer.ini"
        config.write_text(
            f"[databases]\n* = host={server.directory} port={_PORT}\n[pgbouncer]\npool_mode = transaction\n"
            f"listen_addr =\nlisten_port = 6432\nunix_socket_dir = {directory}\nauth_type = any\n"
            f"default_pool_size = 4\nlogfile = {directory}/log\n"
        )
        config.write_text(
            config.read_text().replace("[databases]\n* =", f"[databases]\n{database} = user=flora")
        )
        process = subprocess.Popen(
            [program, str(config)], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            cwd="/", **unprivileged_user(),
        )  # fmt: skip
        url = f"postgresql://flora@/{database}?host={directory}&port=6432"
        try:
            _answers(process, url)
            yield url
        finally:
            process.terminate()
            process.wait(PATIENCE_SECONDS)


def _answers(process: subprocess.Popen[bytes], url: str) -> None:
    """Wait until PgBouncer, which has only just been started, listens."""
    while True:
        try:
            psycopg.connect(url).close()
        except psycopg.OperationalError as error:
            if process.poll() is not None:
                pytest.fail(f"pgbouncer ended: {error}", pytrace=False)
            time.sleep(0.02)
        else:
            return
