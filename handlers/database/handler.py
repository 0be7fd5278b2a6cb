"""The handler that keeps runs, outputs and artifacts in tables of the user's. Found by its entry point `database`.

One attempt is one transaction of upserts by primary key, which may be repeated, and which change nothing where the
tables know newer facts already. So a crash anywhere, a stale worker and a late retry all end in the same rows.
All database work happens in one thread of the handler's own; an attempt that is cancelled hangs up, and frees it.
"""

from datetime import UTC, datetime
from functools import partial
from typing import Annotated, ClassVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator
from sqlalchemy import Connection, inspect
from sqlalchemy.schema import CreateSchema

from handlers.database.connections import Connections, address_of, dialect_of
from handlers.database.errors import Refusal, Why
from handlers.database.tables import Rows, Tables
from handlers.dependencies import unfinished
from receiver.handler import (
    Answer,
    Artifact,
    Context,
    Done,
    Event,
    Output,
    Reject,
    Retry,
    Secret,
    SettledRun,
    TargetUnreachableError,
    When,
)

_LOCK = 0x666C6F7261  # one replica makes the tables, the others wait for it


def _usable_url(secret: Secret) -> Secret:
    address_of(secret)
    return secret


TableName = Annotated[str, Field(pattern=r"^([A-Za-z_][A-Za-z0-9_]{0,62}\.)?[A-Za-z_][A-Za-z0-9_]{0,62}$")]


class TableNames(BaseModel):
    """What the tables are called."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    runs: TableName = "flora_runs"
    """One row for each run."""
    outputs: TableName = "flora_outputs"
    """One row for each output of a run."""
    artifacts: TableName = "flora_artifacts"
    """One row for each thing that a handler has stored of a run."""

    @model_validator(mode="after")
    def _three(self) -> "TableNames":
        if len({name.lower() for name in (self.runs, self.outputs, self.artifacts)}) < 3:
            raise ValueError("needs three different names")
        return self


class DatabaseConfig(BaseModel):
    """Where the tables are, and what they hold."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    url: Annotated[Secret, AfterValidator(_usable_url)]
    """`postgresql://user:password@host/name` or `sqlite:///path/to/file.db` (four slashes for an absolute path)."""
    tables: TableNames = TableNames()
    """Names of the tables `runs`, `outputs` and `artifacts`; on PostgreSQL `schema.table` is fine, too."""
    create: bool = False
    """Whether to make the tables where they are missing."""
    text: bool = True
    """Whether to keep the text of text outputs."""
    wait_for: tuple[str, ...] = ()
    """Names of handlers whose files must be in `artifacts` before a completed run is done; default: what is there."""

    @model_validator(mode="after")
    def _fits(self) -> "DatabaseConfig":
        names = (self.tables.runs, self.tables.outputs, self.tables.artifacts)
        if dialect_of(address_of(self.url)) == "sqlite" and any("." in name for name in names):
            raise ValueError("SQLite has no schemas: leave the dot out of the tables' names")
        if dialect_of(address_of(self.url)) == "sqlite" and any(name.lower().startswith("sqlite_") for name in names):
            raise ValueError("SQLite keeps names that begin with sqlite_ to itself")
        return self


class Database:
    """Upserts every run that ends, and again when its cost is known or its callback contradicts it."""

    Config: ClassVar[type[BaseModel]] = DatabaseConfig
    on: ClassVar[tuple[Event, ...]] = (Event.SETTLED, Event.COST_FINAL, Event.LOST, Event.DIVERGED)
    when: ClassVar[When] = When()
    timeout_seconds: ClassVar[float] = 60

    def __init__(self, config: DatabaseConfig) -> None:
        """Connect to nothing yet. ValueError where the URL leads to a ledger of ours."""
        self._config = config
        self._tables = tables_of(config)
        self._connections = Connections(address_of(config.url), create=config.create)
        self._made = not config.create

    @classmethod
    def schema(cls, config: DatabaseConfig) -> str:
        """Return the DDL of the tables, as the configuration names them, in the dialect of its URL."""
        return tables_of(config).ddl()

    async def handle(self, run: SettledRun, context: Context) -> Answer:
        artifacts = await context.stored()
        rows = self._tables.rows(run, artifacts, text=self._config.text)
        try:
            newest = await self._connections.run(partial(self._write, rows=rows))
        except Refusal as refusal:
            self._made = not self._config.create  # somebody may have dropped them
            return Reject(str(refusal)) if refusal.why is Why.VALUES else Retry(str(refusal))
        awaited = unfinished(self._config.wait_for, run, artifacts)
        if awaited:
            return Retry(f"written; {', '.join(awaited)} has not stored every output yet")
        return Done({"outputs": len(rows.outputs), "artifacts": len(rows.artifacts), "newest": newest})

    async def check(self) -> None:
        """Write a run that does not exist, and take it back: whatever is missing, that finds it."""
        try:
            await self._connections.run(self._try)
        except Refusal as refusal:
            if refusal.why in {Why.AWAY, Why.BUSY}:
                raise TargetUnreachableError(str(refusal)) from refusal
            if refusal.why is not Why.VALUES:  # rules of the user's own: a made-up run cannot know them
                raise

    async def close(self) -> None:
        await self._connections.close()

    def _write(self, connection: Connection, rows: Rows) -> bool:
        """Bring the tables up to date; return whether nothing newer was there already."""
        self._make(connection)
        tables = self._tables
        newest = connection.execute(tables.upsert_run, rows.run).first() is not None  # PostgreSQL locks the row, too
        if newest:
            if rows.outputs:
                connection.execute(tables.upsert_output, rows.outputs)
            kept = {"_run_id": rows.run["run_id"], "_positions": [row["position"] for row in rows.outputs]}
            connection.execute(tables.drop_outputs, kept)
        if rows.artifacts:
            connection.execute(tables.upsert_artifact, rows.artifacts)
        return newest

    def _try(self, connection: Connection) -> None:
        self._make(connection)
        connection.commit()
        self._write(connection, self._tables.rows(_SAMPLE_RUN, _SAMPLE_ARTIFACTS, text=True))
        connection.rollback()

    def _make(self, connection: Connection) -> None:
        if self._made:
            return
        if self._tables.dialect == "postgresql":
            connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({_LOCK})")
            for name in self._tables.schemas():
                if not inspect(connection).has_schema(name):
                    connection.execute(CreateSchema(name, if_not_exists=True))
        self._tables.metadata.create_all(connection)
        connection.commit()
        self._made = True


def tables_of(config: DatabaseConfig) -> Tables:
    names = config.tables
    return Tables(names.runs, names.outputs, names.artifacts, dialect_of(address_of(config.url)))


_SAMPLE_AT = datetime(2026, 1, 1, tzinfo=UTC)
_SAMPLE_RUN = SettledRun(
    run_id="flora-receiver check",
    run_type="generation",
    status="completed",
    technique_id=None,
    workspace_id=None,
    project_id=None,
    outputs=(Output(position=0, output_id="check", type="text", value="check"),),
    metadata={},
    charged_cost=0.0,
    error_code=None,
    error_message=None,
    created_at=None,
    started_at=None,
    completed_at=_SAMPLE_AT,
    settled_at=_SAMPLE_AT,
    settled_by="poll",
    verdict=None,
)
_SAMPLE_ARTIFACTS = (
    Artifact(
        run_id=_SAMPLE_RUN.run_id,
        handler="check",
        position=0,
        output_id="check",
        location="file:///check",
        size=0,
        sha256=None,
        content_type=None,
        stored_at=_SAMPLE_AT,
    ),
)
