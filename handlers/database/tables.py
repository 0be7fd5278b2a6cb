"""The user's tables: their definition and DDL, a run as rows, and the upserts. Pure.

For the handler `database`. Every row is written by its primary key. A run's row is replaced only by
a version that is as new or newer, so attempts may be repeated, late and in any order. Columns that
the user adds are left alone.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal

from sqlalchemy import (
    JSON,
    BigInteger,
    Column,
    ColumnElement,
    DateTime,
    Delete,
    Dialect,
    ForeignKey,
    Integer,
    MetaData,
    Numeric,
    Table,
    Text,
    bindparam,
    delete,
    func,
    or_,
    tuple_,
)
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.schema import CreateSchema, CreateTable, DDLElement
from sqlalchemy.sql.dml import ReturningInsert

from receiver.handler import Artifact, Output, SettledRun, storable_text

DialectName = Literal["postgresql", "sqlite"]
Row = dict[str, Any]
Upsert = postgresql.Insert | sqlite.Insert

_MAX_DEPTH = 100
_TIME = Text().with_variant(DateTime(timezone=True), "postgresql")
_DIALECTS: Mapping[DialectName, Callable[[], Dialect]] = {
    "postgresql": postgresql.dialect,
    "sqlite": sqlite.dialect,
}
_JSON = JSON().with_variant(postgresql.JSONB(), "postgresql")


@dataclass(frozen=True, slots=True)
class Rows:
    """The rows of one run."""

    run: Row
    outputs: Sequence[Row]
    artifacts: Sequence[Row]


class Tables:
    """The three tables and the statements that fill them. Names are `table` or `schema.table`."""

    def __init__(self, runs: str, outputs: str, artifacts: str, dialect: DialectName) -> None:
        self.dialect = dialect
        self.metadata = MetaData()
        self.runs = _table(self.metadata, runs, _run_columns())
        self.outputs = _table(self.metadata, outputs, _output_columns(self.runs))
        self.artifacts = _table(self.metadata, artifacts, _artifact_columns(self.runs))
        self.upsert_run = self._upsert_run()
        self.upsert_output = self._upsert(self.outputs)
        self.upsert_artifact = self._upsert(self.artifacts, newer_by="stored_at")
        self.drop_outputs: Delete = delete(self.outputs).where(
            self.outputs.c.run_id == bindparam("_run_id"),
            self.outputs.c.position.not_in(bindparam("_positions", expanding=True)),
        )

    def schemas(self) -> list[str]:
        """Return the schemas that the names of the tables mention, sorted."""
        return sorted({table.schema for table in self.metadata.tables.values() if table.schema})

    def ddl(self) -> str:
        """Return the SQL that creates the tables where they do not exist."""
        dialect: Dialect = _DIALECTS[self.dialect]()
        steps: list[DDLElement] = [
            *(CreateSchema(name, if_not_exists=True) for name in self.schemas()),
            *(CreateTable(table, if_not_exists=True) for table in self.metadata.sorted_tables),
        ]
        statements = (str(step.compile(dialect=dialect)).strip().replace("\t", "    ") for step in steps)
        return "\n\n".join(
            "\n".join(line.rstrip() for line in each.splitlines()) + ";" for each in statements
        )

    def rows(self, run: SettledRun, artifacts: Sequence[Artifact], *, text: bool) -> Rows:
        """Return a run as rows. In text, only what no database can store is replaced."""
        run_id = _to_storable(run.run_id)
        return Rows(
            run={
                "run_id": run_id,
                "run_type": _to_storable(run.run_type),
                "status": run.status,
                "technique_id": _to_storable(run.technique_id),
                "workspace_id": _to_storable(run.workspace_id),
                "project_id": _to_storable(run.project_id),
                "metadata": _to_storable(run.metadata),
                "charged_cost": _to_storable(run.charged_cost),
                "error_code": _to_storable(run.error_code),
                "error_message": _to_storable(run.error_message),
                "created_at": self._to_time(run.created_at),
                "started_at": self._to_time(run.started_at),
                "completed_at": self._to_time(run.completed_at),
                "settled_at": self._to_time(run.settled_at),
                "settled_by": run.settled_by,
                "verdict": run.verdict,
                "version": run.version,
            },
            outputs=[_output_row(run_id, output, text=text) for output in run.outputs],
            artifacts=[
                {
                    "run_id": run_id,
                    "handler": _to_storable(artifact.handler),
                    "position": artifact.position,
                    "output_id": _to_storable(artifact.output_id),
                    "location": _to_storable(artifact.location),
                    "size": artifact.size,
                    "sha256": artifact.sha256,
                    "content_type": _to_storable(artifact.content_type),
                    "stored_at": self._to_time(artifact.stored_at),
                }
                for artifact in artifacts
                if artifact.stored_at is not None
            ],
        )

    def _to_time(self, at: datetime | None) -> datetime | str | None:
        """Return a timestamptz for PostgreSQL; for SQLite, text that sorts and that it parses."""
        if at is None or self.dialect == "postgresql":
            return at
        return at.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")

    def _insert(self, table: Table) -> Upsert:
        return postgresql.insert(table) if self.dialect == "postgresql" else sqlite.insert(table)

    def _upsert(self, table: Table, *, newer_by: str | None = None) -> Upsert:
        statement = self._insert(table)
        new: Mapping[str, ColumnElement[Any]] = {
            column.name: statement.excluded[column.name]
            for column in table.columns
            if not column.primary_key
        }
        newer = None
        if newer_by is not None:
            newer = or_(table.c[newer_by].is_(None), new[newer_by] >= table.c[newer_by])
        key = [column.name for column in table.primary_key]
        return statement.on_conflict_do_update(index_elements=key, set_=new, where=newer)

    def _upsert_run(self) -> ReturningInsert[Any]:
        """Return the upsert of a run, which returns a row if it wrote one.

        A version is newer if it was settled later, then by its number. A known cost is never
        erased.
        """
        table, statement = self.runs, self._insert(self.runs)
        new: dict[str, ColumnElement[Any]] = {
            column.name: statement.excluded[column.name]
            for column in table.columns
            if not column.primary_key
        }
        newer = tuple_(new["settled_at"], new["version"]) >= tuple_(table.c.settled_at, table.c.version)
        new["charged_cost"] = func.coalesce(new["charged_cost"], table.c.charged_cost)
        return statement.on_conflict_do_update(
            index_elements=["run_id"], set_=new, where=or_(table.c.settled_at.is_(None), newer)
        ).returning(table.c.run_id)


def _table(metadata: MetaData, name: str, columns: list[Column[Any]]) -> Table:
    schema, _, name = name.rpartition(".")
    return Table(name, metadata, *columns, schema=schema or None)


def _run_columns() -> list[Column[Any]]:
    return [
        Column("run_id", Text, primary_key=True),
        Column("run_type", Text, nullable=False),
        Column("status", Text, nullable=False),
        Column("technique_id", Text),
        Column("workspace_id", Text),
        Column("project_id", Text),
        Column("metadata", _JSON, nullable=False),
        Column("charged_cost", Numeric(asdecimal=False)),
        Column("error_code", Text),
        Column("error_message", Text),
        Column("created_at", _TIME),
        Column("started_at", _TIME),
        Column("completed_at", _TIME, nullable=False),
        Column("settled_at", _TIME, nullable=False),
        Column("settled_by", Text, nullable=False),
        Column("verdict", Text),
        Column("version", BigInteger, nullable=False),
    ]


def _output_columns(runs: Table) -> list[Column[Any]]:
    return [
        Column("run_id", Text, ForeignKey(runs.c.run_id, ondelete="CASCADE"), primary_key=True),
        Column("position", Integer, primary_key=True, autoincrement=False),
        Column("output_id", Text, nullable=False),
        Column("type", Text, nullable=False),
        Column("url", Text),
        Column("text", Text),
    ]


def _artifact_columns(runs: Table) -> list[Column[Any]]:
    return [
        Column("run_id", Text, ForeignKey(runs.c.run_id, ondelete="CASCADE"), primary_key=True),
        Column("handler", Text, primary_key=True),
        Column("position", Integer, primary_key=True, autoincrement=False),
        Column("output_id", Text, nullable=False),
        Column("location", Text, nullable=False),
        Column("size", BigInteger),
        Column("sha256", Text),
        Column("content_type", Text),
        Column("stored_at", _TIME, nullable=False),
    ]


def _output_row(run_id: str, output: Output, *, text: bool) -> Row:
    return {
        "run_id": run_id,
        "position": output.position,
        "output_id": _to_storable(output.output_id),
        "type": _to_storable(output.type),
        "url": None if output.is_text else _to_storable(output.value),
        "text": _to_storable(output.value) if output.is_text and text else None,
    }


def _to_storable(value: Any, depth: int = 0) -> Any:
    """Return what PostgreSQL and JSON can store of a value; nesting beyond _MAX_DEPTH is cut."""
    match value:
        case str():
            return storable_text(value)
        case float():
            return value if math.isfinite(value) else None
        case None | bool() | int():
            return value
        case Mapping() | list() | tuple() if depth >= _MAX_DEPTH:
            return None
        case Mapping():
            return {storable_text(str(key)): _to_storable(each, depth + 1) for key, each in value.items()}
        case list() | tuple():
            return [_to_storable(each, depth + 1) for each in value]
        case _:
            return storable_text(str(value))
