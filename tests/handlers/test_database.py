"""The handler `database` on PostgreSQL and SQLite: repeats, old versions, failures."""

import asyncio
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import psycopg
import pytest
from pydantic import ValidationError

from handlers.database import Database, DatabaseConfig
from handlers.database.errors import DatabaseFailedError
from handlers.database.tables import DialectName
from receiver.errors import MissingExtraError
from receiver.handler import (
    Answer,
    Artifact,
    Checks,
    Closes,
    DescribesSchema,
    Done,
    Event,
    Handler,
    Output,
    Reject,
    Retry,
    SettledRun,
    TargetUnreachableError,
)
from receiver.model import Origin, Run, RunState
from receiver.plugins.attempt import to_settled_run
from tests.support.handler_kit import NOW
from tests.support.patience import PATIENCE_SECONDS
from tests.support.postgres import Postgres, tool

ContextOf = Callable[..., Any]
NUMBERS = iter(range(10_000))


@dataclass
class Place:
    """A database of the user's: its URL, and queries as its owner."""

    dialect: DialectName
    url: str

    def execute(self, sql: str) -> list[Any]:
        if self.dialect == "sqlite":
            wire = sqlite3.connect(self.url.removeprefix("sqlite:///"))
            try:
                with wire:
                    return wire.execute(sql).fetchall()
            finally:
                wire.close()
        with psycopg.connect(self.url, autocommit=True) as connection:
            cursor = connection.execute(sql.encode())
            return cursor.fetchall() if cursor.description else []

    def program(self, sql: str) -> None:
        """Apply SQL as the user would: with the database's own program."""
        if self.dialect == "sqlite":
            line = ["sqlite3", "-bail", self.url.removeprefix("sqlite:///")]
        else:
            line = [shutil.which("psql") or tool("psql"), "-q", "-v", "ON_ERROR_STOP=1", self.url]
        subprocess.run(line, input=sql, text=True, check=True, capture_output=True)


@pytest.fixture(params=["sqlite", "postgresql"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    """An empty database."""
    if request.param == "sqlite":
        sqlite3.connect(tmp_path / "runs.db").close()
        return Place("sqlite", f"sqlite:///{tmp_path}/runs.db")
    server: Postgres = request.getfixturevalue("postgres_server")
    return Place("postgresql", server.create(f"user_{next(NUMBERS)}", migrated=False))


@pytest.fixture
def postgres_place(postgres_server: Postgres) -> Place:
    return Place("postgresql", postgres_server.create(f"user_{next(NUMBERS)}", migrated=False))


@pytest.fixture
async def open_handler() -> AsyncIterator[Callable[..., Database]]:
    """Build handlers that are closed at the end."""
    handlers: list[Database] = []

    def build(url: str, **options: Any) -> Database:
        handlers.append(Database(DatabaseConfig.model_validate({"url": url, **options})))
        return handlers[-1]

    yield build
    for handler in handlers:
        await handler.close()


OpenHandler = Callable[..., Database]


async def command(*words: str | Path, **env: str) -> str:
    """Run `handlers schema` with some words in a directory, the last one; return its output."""
    *arguments, directory = words
    process = await asyncio.create_subprocess_exec(
        Path(sys.executable).with_name("flora-receiver"), "handlers", "schema", *arguments,
        cwd=directory, env={"PATH": os.environ["PATH"], **env}, stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    printed, _ = await process.communicate()
    assert process.returncode == 0
    return printed.decode()


def media(position: int, url: str = "https://media.example/secret") -> Output:
    return Output(position=position, output_id=f"out_{position}", type="imageUrl", value=url)


def artifact(position: int, handler: str = "storage", **fields: Any) -> Artifact:
    return replace(
        Artifact(
            "run_1",
            handler,
            position,
            f"out_{position}",
            f"file:///o/{position}",
            3,
            "ab",
            "image/png",
            NOW,
        ),
        **fields,
    )


def reason(answer: Answer) -> str:
    assert not isinstance(answer, Done)
    return answer.reason


def all_rows(place: Place) -> list[list[Any]]:
    return [
        place.execute(f"SELECT * FROM {name} ORDER BY 1, 2, 3")  # noqa: S608  # names of our own
        for name in ("flora_runs", "flora_outputs", "flora_artifacts")
    ]


async def test_a_run_becomes_rows(
    place: Place, open_handler: OpenHandler, run: SettledRun, context_of: ContextOf
) -> None:
    """Run, outputs and artifacts of all handlers; times and metadata in native types."""
    text = Output(position=1, output_id="words", type="text", value="Grüße")
    run = replace(
        run, outputs=(media(0), text), metadata={"market": "DE", "n": [1, 2.5, None]}, charged_cost=0.04
    )
    context = context_of(others=(artifact(0), artifact(0, "copies"), artifact(1, stored_at=None)))
    handler = open_handler(place.url, create=True)
    assert isinstance(handler, Handler | Checks | Closes)
    assert await handler.handle(run, context) == Done({"outputs": 2, "artifacts": 2, "newest": True})

    [(run_id, status, metadata, cost, created_at, completed_at)] = place.execute(
        "SELECT run_id, status, metadata, charged_cost, created_at, completed_at FROM flora_runs"
    )
    assert (run_id, status, float(cost)) == ("run_1", "completed", 0.04)
    if place.dialect == "postgresql":
        assert (metadata, created_at, completed_at) == (run.metadata, run.created_at, run.completed_at)
    else:
        assert json.loads(metadata) == run.metadata
        assert (created_at, completed_at) == ("2026-11-24T11:58:00.000Z", "2026-11-24T12:00:00.000Z")
        assert place.execute("SELECT unixepoch(completed_at) - unixepoch(created_at) FROM flora_runs") == [
            (120,)
        ]
    assert place.execute("SELECT position, type, url, text FROM flora_outputs ORDER BY 1") == [
        (0, "imageUrl", "https://media.example/secret", None),
        (1, "text", None, "Grüße"),
    ]
    assert place.execute("SELECT handler, position, location, size FROM flora_artifacts ORDER BY 1") == [
        ("copies", 0, "file:///o/0", 3),
        ("storage", 0, "file:///o/0", 3),
    ]


async def test_what_is_printed_is_what_is_needed(
    place: Place, open_handler: OpenHandler, run: SettledRun, context_of: ContextOf, tmp_path: Path
) -> None:
    """The command's SQL, applied twice by psql or sqlite3, creates tables for the handler."""
    tables = 'tables = { runs = "Runs", outputs = "order", artifacts = "artifacts_of_runs" }'
    (tmp_path / "receiver.toml").write_text(
        f'[[handlers]]\nuse = "database"\nname = "mine"\nurl = "env:DB"\n{tables}\n', "utf-8"
    )
    printed = await command("database", tmp_path, DB=place.url)
    as_json = await command("mine", "--json", tmp_path, DB=place.url)
    assert json.loads(as_json) == {"handler": "mine", "sql": printed.rstrip("\n")}
    assert place.url not in printed + as_json
    place.program(printed)
    place.program(printed)

    handler = open_handler(
        place.url, tables={"runs": "Runs", "outputs": "order", "artifacts": "artifacts_of_runs"}
    )
    await handler.check()
    assert isinstance(await handler.handle(replace(run, outputs=(media(0),)), context_of()), Done)
    assert place.execute('SELECT run_id FROM "Runs"') == [("run_1",)]
    assert len(place.execute('SELECT * FROM "order"')) == 1


async def test_again_changes_nothing(
    place: Place, open_handler: OpenHandler, run: SettledRun, context_of: ContextOf
) -> None:
    """An attempt repeated, from another process or after a crash, ends in the same rows."""
    run = replace(run, outputs=(media(0), media(1)), charged_cost=0.5)
    context = context_of(others=(artifact(0),))
    first, second = open_handler(place.url, create=True), open_handler(place.url, create=True)
    await first.handle(run, context)
    before = all_rows(place)
    assert isinstance(await first.handle(run, context), Done)
    assert isinstance(await second.handle(run, context), Done)
    assert all_rows(place) == before


async def test_many_at_once(
    place: Place, open_handler: OpenHandler, run: SettledRun, context_of: ContextOf
) -> None:
    """Two replicas write the same runs and create the tables: no deadlock, nothing twice."""
    handlers = [open_handler(place.url, create=True) for _ in range(2)]
    runs = [replace(run, run_id=f"run_{n}", outputs=(media(0), media(1))) for n in range(20)]
    answers = await asyncio.gather(
        *(handler.handle(each, context_of(each.run_id)) for each in runs for handler in handlers)
    )
    assert all(isinstance(answer, Done) for answer in answers), answers
    assert place.execute("SELECT count(*) FROM flora_runs") == [(20,)]
    assert place.execute("SELECT count(*) FROM flora_outputs") == [(40,)]


@pytest.mark.parametrize("older", [{"version": 3}, {"version": 9, "settled_at": NOW - timedelta(hours=1)}])
async def test_old_facts_never_replace_new_ones(
    place: Place, open_handler: OpenHandler, run: SettledRun, context_of: ContextOf, older: dict[str, Any]
) -> None:
    """A stale worker finds its row newer: cost, verdict, outputs and artifacts stay as they are."""
    new = replace(
        run, outputs=(media(0, "https://media.example/new"),), charged_cost=0.5, verdict="late", version=4
    )
    old = replace(
        run, **older, status="lost", outputs=(media(0), media(1)), charged_cost=None, verdict=None
    )
    handler = open_handler(place.url, create=True)
    await handler.handle(
        new, context_of(others=(artifact(0, size=7, stored_at=NOW + timedelta(seconds=9)),))
    )
    before = all_rows(place)
    answer = await handler.handle(old, context_of(others=(artifact(0),)))
    assert answer == Done({"outputs": 2, "artifacts": 1, "newest": False})
    assert all_rows(place) == before


async def test_new_facts_replace_old_ones(
    place: Place, open_handler: OpenHandler, run: SettledRun, context_of: ContextOf
) -> None:
    """Lost, then found; fewer outputs with new URLs; a known cost survives a new ledger."""
    handler = open_handler(place.url, create=True)
    await handler.handle(replace(run, status="lost", version=1), context_of(event=Event.LOST))
    found = replace(run, outputs=(media(0), media(1)), settled_at=NOW + timedelta(hours=1), version=2)
    await handler.handle(found, context_of())
    billed = replace(found, outputs=(media(1, "https://media.example/2"),), charged_cost=0.5, version=3)
    await handler.handle(billed, context_of(event=Event.COST_FINAL))
    assert place.execute("SELECT position, url FROM flora_outputs") == [(1, "https://media.example/2")]
    anew = replace(found, settled_at=NOW + timedelta(days=1), version=0)
    await handler.handle(anew, context_of())
    [(status, cost)] = place.execute("SELECT status, charged_cost FROM flora_runs")
    assert (status, float(cost)) == ("completed", 0.5)


async def test_columns_of_the_users_own_stay(
    place: Place, open_handler: OpenHandler, run: SettledRun, context_of: ContextOf
) -> None:
    """A row of the user's is filled in; columns that the user added are kept."""
    await open_handler(place.url, create=True).check()
    place.execute("ALTER TABLE flora_runs ADD campaign TEXT")
    place.execute("ALTER TABLE flora_outputs ADD approved INTEGER")
    handler = open_handler(place.url)
    run = replace(run, outputs=(media(0),))
    await handler.handle(run, context_of())
    place.execute("UPDATE flora_runs SET campaign = 'spring'")
    place.execute("UPDATE flora_outputs SET approved = 1")
    await handler.handle(
        replace(run, outputs=(media(0, "https://media.example/2"),), version=1), context_of()
    )
    assert place.execute("SELECT campaign, version FROM flora_runs") == [("spring", 1)]
    assert place.execute("SELECT approved, url FROM flora_outputs") == [(1, "https://media.example/2")]


async def test_what_no_database_can_hold_is_replaced(
    place: Place, open_handler: OpenHandler, run: SettledRun, context_of: ContextOf
) -> None:
    """NUL, lone surrogates, NaN and endless nesting are stored as closely as possible."""
    deep: Any = "end"
    for _ in range(500):
        deep = [deep]
    bad = "a\x00b\ud800c"
    run = replace(
        run,
        technique_id=bad,
        error_message=bad,
        charged_cost=float("inf"),
        metadata={bad: bad, "nan": float("nan"), "deep": deep, "big": 2**80},
        outputs=(Output(position=0, output_id=bad, type="text", value=bad),),
    )
    answer = await open_handler(place.url, create=True).handle(
        run, context_of(others=(artifact(0, location=bad),))
    )
    assert isinstance(answer, Done)
    assert place.execute("SELECT technique_id FROM flora_runs") == [("a\ufffdb\ufffdc",)]
    assert place.execute("SELECT text FROM flora_outputs") == [("a\ufffdb\ufffdc",)]


async def test_texts_may_be_left_out(
    place: Place, open_handler: OpenHandler, run: SettledRun, context_of: ContextOf
) -> None:
    words = Output(position=0, output_id="words", type="text", value="private")
    await open_handler(place.url, create=True, text=False).handle(
        replace(run, outputs=(words,)), context_of()
    )
    assert place.execute("SELECT type, url, text FROM flora_outputs") == [("text", None, None)]


async def test_waits_for_the_files_of_others(
    place: Place, open_handler: OpenHandler, run: SettledRun, context_of: ContextOf
) -> None:
    """With `wait_for` rows are written at once; it is done with the other handler's files."""
    handler = open_handler(place.url, create=True, wait_for=["storage"])
    run = replace(run, outputs=(media(0), media(1)))
    answer = await handler.handle(run, context_of(others=(artifact(0),)))
    assert isinstance(answer, Retry)
    assert "storage" in answer.reason
    assert place.execute("SELECT count(*) FROM flora_outputs") == [(2,)]
    assert isinstance(await handler.handle(run, context_of(others=(artifact(0), artifact(1)))), Done)
    assert place.execute("SELECT count(*) FROM flora_artifacts") == [(2,)]
    assert isinstance(await handler.handle(replace(run, status="failed"), context_of("run_2")), Done)


MISSING = {
    "tables": ("DROP TABLE flora_artifacts; DROP TABLE flora_outputs; DROP TABLE flora_runs", "flora_runs"),
    "column": ("ALTER TABLE flora_runs DROP COLUMN verdict", "verdict"),
    "one table": ("DROP TABLE flora_outputs", "flora_outputs"),
}


@pytest.mark.parametrize("missing", MISSING)
async def test_a_missing_table_says_what_to_do(
    place: Place, open_handler: OpenHandler, run: SettledRun, context_of: ContextOf, missing: str
) -> None:
    """The check fails, a run is retried until the table exists. Nothing is half written."""
    await open_handler(place.url, create=True).check()
    sql, word = MISSING[missing]
    place.program(sql + ";")
    handler = open_handler(place.url)
    with pytest.raises(DatabaseFailedError, match="handlers schema database") as caught:
        await handler.check()
    assert word in str(caught.value)
    run = replace(run, outputs=(media(0),))
    answer = await handler.handle(run, context_of())
    assert isinstance(answer, Retry)
    assert "handlers schema database" in answer.reason
    if missing == "one table":
        assert place.execute("SELECT * FROM flora_runs") == []
    if missing == "column":
        place.program("ALTER TABLE flora_runs ADD COLUMN verdict TEXT;")
    place.program(Database.schema(DatabaseConfig.model_validate({"url": place.url})))
    assert isinstance(await handler.handle(run, context_of()), Done)


async def test_a_missing_key_is_reported(place: Place, open_handler: OpenHandler) -> None:
    """Tables without primary keys would accept rows twice."""
    place.program("CREATE TABLE plain (run_id TEXT, position INTEGER);")
    ddl = Database.schema(
        DatabaseConfig.model_validate({"url": place.url, "tables": {"runs": "flora_runs"}})
    )
    lines = ddl.splitlines()
    broken = [
        line for line in lines if not line.strip().startswith(("PRIMARY KEY (run_id, position)", "FOREIGN"))
    ]
    sql = "\n".join(broken).replace("text TEXT,\n", "text TEXT\n").replace("position),\n)", "position)\n)")
    place.program(
        sql.replace(
            "PRIMARY KEY (run_id, handler, position),\n", "PRIMARY KEY (run_id, handler, position)\n"
        )
    )
    with pytest.raises(DatabaseFailedError, match="handlers schema database"):
        await open_handler(place.url).check()


async def test_a_check_leaves_nothing(place: Place, open_handler: OpenHandler) -> None:
    """It writes a sample run and rolls it back; the user's constraints do not make it fail."""
    handler = open_handler(place.url, create=True)
    await handler.check()
    await handler.check()
    assert all_rows(place) == [[], [], []]


async def test_values_that_the_users_rules_refuse_are_rejected(
    place: Place, open_handler: OpenHandler, run: SettledRun, context_of: ContextOf
) -> None:
    """A retry would not help; the message names the constraint, and never the value."""
    ddl = Database.schema(DatabaseConfig.model_validate({"url": place.url}))
    place.program(ddl.replace("url TEXT,", "url TEXT CONSTRAINT short CHECK (length(url) < 9),"))
    handler = open_handler(place.url)
    await handler.check()
    answer = await handler.handle(replace(run, outputs=(media(0),)), context_of())
    assert isinstance(answer, Reject)
    assert "refuses the values" in answer.reason
    assert "media.example" not in answer.reason
    assert all_rows(place) == [[], [], []]


async def test_a_login_without_rights_says_so(
    postgres_place: Place, open_handler: OpenHandler, run: SettledRun, context_of: ContextOf
) -> None:
    await open_handler(postgres_place.url, create=True).check()
    role = f"reader_{next(NUMBERS)}"
    postgres_place.execute(f"CREATE ROLE {role} LOGIN")
    postgres_place.execute(f"GRANT SELECT, INSERT ON flora_runs, flora_outputs, flora_artifacts TO {role}")
    handler = open_handler(postgres_place.url.replace("flora@", f"{role}@"))
    with pytest.raises(DatabaseFailedError, match="permission denied"):
        await handler.check()
    assert "permission denied" in reason(await handler.handle(run, context_of()))


async def test_schemas_and_their_making(
    postgres_place: Place, open_handler: OpenHandler, run: SettledRun, context_of: ContextOf
) -> None:
    """`schema.table` names put the tables anywhere; `create` creates the schema too."""
    names = {"runs": "Sales.runs", "outputs": "Sales.outputs", "artifacts": "archive.artifacts"}
    handler = open_handler(postgres_place.url, create=True, tables=names)
    await handler.check()
    assert isinstance(await handler.handle(replace(run, outputs=(media(0),)), context_of()), Done)
    assert postgres_place.execute('SELECT run_id FROM "Sales".runs') == [("run_1",)]
    with pytest.raises(DatabaseFailedError, match="handlers schema database"):
        await open_handler(postgres_place.url, tables={"runs": "nowhere.runs"}).check()


async def test_a_database_that_is_away(
    place: Place, open_handler: OpenHandler, run: SettledRun, context_of: ContextOf, tmp_path: Path
) -> None:
    """If unreachable: a warning of the check, a retry of a run, and never the password."""
    if place.dialect == "sqlite":
        handler = open_handler(f"sqlite:///{tmp_path}/nowhere/runs.db")
        with pytest.raises(DatabaseFailedError, match="create = true"):
            await handler.check()
        assert not (tmp_path / "nowhere").exists()
    else:
        handler = open_handler(f"postgresql://flora:hunter2@127.0.0.1:1/{next(NUMBERS)}")
        with pytest.raises(TargetUnreachableError, match="does not answer") as caught:
            await handler.check()
        assert "hunter2" not in str(caught.value)
    answer = await handler.handle(run, context_of())
    assert isinstance(answer, Retry)
    assert "hunter2" not in answer.reason


async def test_a_missing_database_is_no_passing_trouble(
    postgres_place: Place, open_handler: OpenHandler
) -> None:
    with pytest.raises(DatabaseFailedError, match="refuses the login"):
        await open_handler(postgres_place.url.replace("/user_", "/nobody_")).check()


async def test_a_connection_that_died_meanwhile_is_made_anew(
    postgres_place: Place, open_handler: OpenHandler, run: SettledRun, context_of: ContextOf
) -> None:
    """A restart of the server between two runs does not even cause a retry."""
    handler = open_handler(postgres_place.url, create=True)
    await handler.handle(run, context_of())
    postgres_place.execute(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
        " WHERE datname = current_database() AND pid <> pg_backend_pid()"
    )
    assert isinstance(await handler.handle(replace(run, run_id="run_2"), context_of("run_2")), Done)


def backends(place: Place) -> Sequence[int]:
    """The server processes of the handlers in a database."""
    rows = place.execute(
        "SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
        " AND backend_type = 'client backend'"
    )
    return [pid for (pid,) in rows]


@pytest.fixture
def freeze_process() -> Iterator[Callable[[int], None]]:
    """Freeze server processes of our own; they thaw at the end."""
    stopped: list[int] = []

    def freeze(pid: int) -> None:
        os.kill(pid, signal.SIGSTOP)
        stopped.append(pid)

    yield freeze
    for pid in stopped:
        os.kill(pid, signal.SIGCONT)


async def test_a_cancelled_attempt_frees_the_thread(
    postgres_place: Place,
    open_handler: OpenHandler,
    run: SettledRun,
    context_of: ContextOf,
    freeze_process: Callable[[int], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A server that froze delays one attempt, until its timeout; the next one connects anew."""
    handler = open_handler(postgres_place.url, create=True)
    await handler.handle(run, context_of())
    (pid,) = backends(postgres_place)
    freeze_process(pid)
    writing, write = threading.Event(), handler._write

    def write_observed(*args: Any, **kwargs: Any) -> bool:
        writing.set()
        return write(*args, **kwargs)

    monkeypatch.setattr(handler, "_write", write_observed)
    waiting = asyncio.create_task(handler.handle(replace(run, run_id="run_2"), context_of("run_2")))
    queued = asyncio.create_task(handler.handle(replace(run, run_id="run_3"), context_of("run_3")))
    await asyncio.to_thread(writing.wait, 30)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert isinstance(await asyncio.wait_for(queued, PATIENCE_SECONDS), Done)
    assert postgres_place.execute("SELECT run_id FROM flora_runs ORDER BY 1") == [("run_1",), ("run_3",)]


async def test_a_locked_table_holds_an_attempt_only_for_a_while(
    place: Place,
    open_handler: OpenHandler,
    run: SettledRun,
    context_of: ContextOf,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With a long transaction of another program, an attempt fails, says so, and works later."""
    monkeypatch.setattr(
        "handlers.database.connections.STATEMENT_SECONDS", 0.2 if place.dialect == "sqlite" else 1
    )
    handler = open_handler(place.url, create=True)
    await handler.check()
    if place.dialect == "sqlite":
        holder: Any = sqlite3.connect(place.url.removeprefix("sqlite:///"), isolation_level=None)
        holder.execute("BEGIN IMMEDIATE")
    else:
        holder = psycopg.connect(place.url)
        holder.execute("LOCK TABLE flora_runs")
    answer = await handler.handle(run, context_of())
    with pytest.raises(TargetUnreachableError):
        await handler.check()
    holder.rollback()
    holder.close()
    assert isinstance(answer, Retry)
    assert "database" in answer.reason
    assert isinstance(await handler.handle(run, context_of()), Done)


async def test_behind_pgbouncer(
    pgbouncer: str, open_handler: OpenHandler, run: SettledRun, context_of: ContextOf
) -> None:
    """In transaction mode, where nothing may be set for a session."""
    names = {"runs": "behind.runs", "outputs": "behind.outputs", "artifacts": "behind.artifacts"}
    handler = open_handler(pgbouncer, create=True, tables=names)
    await handler.check()
    for version in range(3):
        assert isinstance(await handler.handle(replace(run, version=version), context_of()), Done)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"url": "mysql://u:hunter2@h/db"}, "must be postgresql"),
        ({"url": "postgresql://u:hunter2@h:port/db"}, "cannot be read"),
        ({"url": "hunter2"}, "cannot be read"),
        ({"url": "sqlite://"}, "must name a file"),
        ({"url": "sqlite:///:memory:"}, "must name a file"),
        ({"url": "sqlite:///x.db?mode=hunter2"}, "must name a file"),
        ({"url": "sqlite:///x.db", "tables": {"runs": "sales.runs"}}, "no schemas"),
        ({"url": "sqlite:///x.db", "tables": {"runs": "sqlite_runs"}}, "sqlite_"),
        ({"url": "sqlite:///x.db", "tables": {"runs": "a", "outputs": "A"}}, "three different names"),
        ({"url": "sqlite:///x.db", "tables": {"runs": 'x"; DROP TABLE users; --'}}, "pattern"),
        ({"url": "sqlite:///x.db", "tables": {"runs": "x" * 64}}, "pattern"),
        ({"url": "sqlite:///x.db", "tables": {"run": "x"}}, "Extra"),
        ({"url": "sqlite:///x.db", "schema": "x"}, "Extra"),
        ({}, "required"),
    ],
)
def test_a_wrong_configuration_is_refused_at_once(options: dict[str, Any], words: str) -> None:
    """Before the first run, and without the password."""
    with pytest.raises(ValidationError, match=words) as caught:
        DatabaseConfig.model_validate(options)
    details = caught.value.errors(include_url=False, include_input=False, include_context=False)
    assert "hunter2" not in "".join(detail["msg"] for detail in details)


def test_the_receivers_own_ledger_is_refused(tmp_path: Path) -> None:
    """A second writer could damage that file."""
    (tmp_path / "receiver.db.lock").touch()
    with pytest.raises(ValueError, match="a ledger of flora-receiver itself"):
        Database(
            DatabaseConfig.model_validate({"url": f"sqlite:///{tmp_path}/receiver.db", "create": True})
        )


def test_without_psycopg_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'flora-receiver\[postgres\]'"):
        Database(DatabaseConfig.model_validate({"url": "postgresql://h/db"}))


def test_the_password_shows_nowhere() -> None:
    config = DatabaseConfig.model_validate({"url": "postgresql://u:hunter2@h/db"})
    handler = Database(config)
    assert "hunter2" not in f"{config!r} {config.model_dump()} {handler._connections._engine!r}"
    assert "hunter2" not in Database.schema(config)
    assert isinstance(Database, DescribesSchema)


def test_a_view_of_a_run_has_its_version() -> None:
    """`version` distinguishes older views from newer ones."""
    run = Run("run_1", RunState.COMPLETED, Origin.STARTED, NOW, NOW, version=7)
    assert to_settled_run(run, ()).version == 7


@pytest.mark.parametrize(
    ("toml", "words"),
    [
        ("", "no configured handler is called 'database'"),
        ('[[handlers]]\nuse = "log"\nname = "database"', "log keeps no tables"),
        ('[[handlers]]\nuse = "database"', "handlers.0.url"),
        (
            "".join(
                f'[[handlers]]\nuse = "database"\nname = "{name}"\nurl = "sqlite:///x"\n' for name in "ab"
            ),
            "say which of a, b",
        ),
    ],
)
def test_the_command_says_what_is_wrong(toml: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "receiver.toml").write_text(toml, "utf-8")
    command = [str(Path(sys.executable).with_name("flora-receiver")), "handlers", "schema", "database"]
    done = subprocess.run(
        command, cwd=tmp_path, env={"PATH": os.environ["PATH"]}, capture_output=True, text=True, check=False
    )
    assert done.returncode in {1, 2}
    assert words in done.stderr
