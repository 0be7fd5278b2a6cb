"""The handler `database`: keeps runs, outputs and artifacts in tables of the user's.

Each attempt is one transaction of upserts by primary key, which can be repeated, and which change
nothing where the tables hold a newer version. A crash, a stale worker or a late retry therefore end
in the same rows. All database work runs in the handler's own thread.
"""

from datetime import UTC, datetime
from functools import partial
from typing import Annotated, ClassVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator
from sqlalchemy import Connection, inspect
from sqlalchemy.schema import CreateSchema

from handlers.database.connections import Connections, dialect_of, to_url
from handlers.database.errors import DatabaseFailedError, FailureKind
from handlers.database.tables import Rows, Tables
from handlers.dependencies import pending_handlers
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

_ADVISORY_LOCK = 0x666C6F7261  # one replica creates the tables, the others wait for it


def _usable_url(secret: Secret) -> Secret:
    to_url(secret)
    return secret


TableName = Annotated[str, Field(pattern=r"^([A-Za-z_][A-Za-z0-9_]{0,62}\.)?[A-Za-z_][A-Za-z0-9_]{0,62}$")]


class TableNames(BaseModel):
    """The names of the tables."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    runs: TableName = "flora_runs"
    """One row for each run."""
    outputs: TableName = "flora_outputs"
    """One row for each output of a run."""
    artifacts: TableName = "flora_artifacts"
    """One row for each file that a handler has stored of a run."""

    @model_validator(mode="after")
    def _check_names_differ(self) -> "TableNames":
        if len({name.lower() for name in (self.runs, self.outputs, self.artifacts)}) < 3:
            raise ValueError("must be three different names")
        return self


class DatabaseConfig(BaseModel):
    """Where the tables are, and what they hold."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    url: Annotated[Secret, AfterValidator(_usable_url)]
    """`postgresql://user:password@host/name` or `sqlite:///to/file.db` (absolute: four slashes)."""
    tables: TableNames = TableNames()
    """Names of the tables `runs`, `outputs` and `artifacts`; on PostgreSQL also `schema.table`."""
    create: bool = False
    """Whether to create the tables where they do not exist."""
    text: bool = True
    """Whether to keep the text of text outputs."""
    wait_for: tuple[str, ...] = ()
    """Handlers whose files must be in `artifacts` before a completed run is done. Default: none."""

    @model_validator(mode="after")
    def _fits(self) -> "DatabaseConfig":
        names = (self.tables.runs, self.tables.outputs, self.tables.artifacts)
        if dialect_of(to_url(self.url)) == "sqlite" and any("." in name for name in names):
            raise ValueError("SQLite has no schemas: leave the dot out of the tables' names")
        if dialect_of(to_url(self.url)) == "sqlite" and any(
            name.lower().startswith("sqlite_") for name in names
        ):
            raise ValueError("SQLite keeps names that begin with sqlite_ to itself")
        return self


class Database:
    """Upserts every run that ends, and again when its cost is final or it diverged."""

    Config: ClassVar[type[BaseModel]] = DatabaseConfig
    on: ClassVar[tuple[Event, ...]] = (Event.SETTLED, Event.COST_FINAL, Event.LOST, Event.DIVERGED)
    when: ClassVar[When] = When()
    timeout_seconds: ClassVar[float] = 60

    def __init__(self, config: DatabaseConfig) -> None:
        """Does not connect yet. ValueError if the URL names a ledger of the receiver itself."""
        self._config = config
        self._tables = to_tables(config)
        self._connections = Connections(to_url(config.url), create=config.create)
        self._are_tables_ready = not config.create

    @classmethod
    def schema(cls, config: DatabaseConfig) -> str:
        """Return the DDL of the tables, with the configured names, in the dialect of the URL."""
        return to_tables(config).ddl()

    async def handle(self, run: SettledRun, context: Context) -> Answer:
        artifacts = await context.stored()
        rows = self._tables.rows(run, artifacts, text=self._config.text)
        try:
            is_newest = await self._connections.run(partial(self._write, rows=rows))
        except DatabaseFailedError as error:
            self._are_tables_ready = not self._config.create  # they may have been dropped
            return Reject(str(error)) if error.kind is FailureKind.VALUES else Retry(str(error))
        pending = pending_handlers(self._config.wait_for, run, artifacts)
        if pending:
            return Retry(f"written; {', '.join(pending)} has not stored every output yet")
        return Done({"outputs": len(rows.outputs), "artifacts": len(rows.artifacts), "newest": is_newest})

    async def check(self) -> None:
        """Write a sample run and roll it back, which finds missing tables and permissions."""
        try:
            await self._connections.run(self._write_sample)
        except DatabaseFailedError as error:
            if error.kind in {FailureKind.UNREACHABLE, FailureKind.BUSY}:
                raise TargetUnreachableError(str(error)) from error
            if (
                error.kind is not FailureKind.VALUES
            ):  # constraints of the user's, which a sample cannot know
                raise

    async def close(self) -> None:
        await self._connections.close()

    def _write(self, connection: Connection, rows: Rows) -> bool:
        """Bring the tables up to date; return whether this version is the newest."""
        self._create_tables(connection)
        tables = self._tables
        # On PostgreSQL this also locks the row.
        is_newest = connection.execute(tables.upsert_run, rows.run).first() is not None
        if is_newest:
            if rows.outputs:
                connection.execute(tables.upsert_output, rows.outputs)
            positions = [row["position"] for row in rows.outputs]
            connection.execute(
                tables.drop_outputs, {"_run_id": rows.run["run_id"], "_positions": positions}
            )
        if rows.artifacts:
            connection.execute(tables.upsert_artifact, rows.artifacts)
        return is_newest

    def _write_sample(self, connection: Connection) -> None:
        self._create_tables(connection)
        connection.commit()
        self._write(connection, self._tables.rows(_SAMPLE_RUN, _SAMPLE_ARTIFACTS, text=True))
        connection.rollback()

    def _create_tables(self, connection: Connection) -> None:
        if self._are_tables_ready:
            return
        if self._tables.dialect == "postgresql":
            connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({_ADVISORY_LOCK})")
            for name in self._tables.schemas():
                if not inspect(connection).has_schema(name):
                    connection.execute(CreateSchema(name, if_not_exists=True))
        self._tables.metadata.create_all(connection)
        connection.commit()
        self._are_tables_ready = True


def to_tables(config: DatabaseConfig) -> Tables:
    names = config.tables
    return Tables(names.runs, names.outputs, names.artifacts, dialect_of(to_url(config.url)))


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
