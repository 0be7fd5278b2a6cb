"""Moves a SQLite ledger to PostgreSQL: copies every row, then compares checksums of both sides.

The target is written in one transaction: if it fails, the target stays empty. The source is only
read.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Row, Table, exc, exists, func, insert, select

from receiver.errors import StoreError
from receiver.store.bulk import BulkInsert
from receiver.store.migrate import HEAD, current_revision, upgrade
from receiver.store.postgres import begin_writing, connect
from receiver.store.schema import delivery_bodies, leases, metadata, outputs, starts
from receiver.store.sqlite import open_read_only

TABLES: Sequence[Table] = tuple(table for table in metadata.sorted_tables if table is not leases)
"""In the order of their foreign keys. Leases belong to processes, not to the ledger."""
_LARGE = frozenset({delivery_bodies, outputs, starts})
"""Tables whose rows may be large: a body has up to 64 KiB, a text output more."""


@dataclass(frozen=True, slots=True)
class TableChecksum:
    """The contents of a table. The checksum adds up the SHA-256 of all rows, in any order."""

    rows: int
    checksum: str


@dataclass(frozen=True, slots=True)
class MoveResult:
    """The contents of the target by table. `copied` is False if it already had all of it."""

    tables: dict[str, TableChecksum]
    copied: bool


def move(ledger: Path, url: str) -> MoveResult:
    """Copy a SQLite ledger into an empty PostgreSQL database, or compare it with its copy there.

    Raises StoreInUseError while a service uses the source, StoreUnavailableError if a database
    cannot be reached, StoreError if the two do not fit. The target is unchanged then.
    """
    with open_read_only(ledger) as old, connect(url) as new:
        if (revision := current_revision(old)) != HEAD:
            raise StoreError(
                f"{ledger} is at revision {revision}, this version works on {HEAD}: `migrate` it first"
            )
        if (revision := current_revision(new)) is None:
            new.rollback()
            upgrade(new)
        elif revision != HEAD:
            raise StoreError(
                f"the target is at revision {revision}, this version works on {HEAD}: give it an empty one"
            )
        new.rollback()
        there = {table.name: checksum_table(old, table) for table in TABLES}
        with new.begin():
            begin_writing(new)
            # A service that already uses the target must not write now: it answers 503, and FLORA
            # retries.
            new.exec_driver_sql(f"LOCK TABLE {_table_names()} IN EXCLUSIVE MODE")
            copied = not any(new.execute(select(exists(table.select()))).scalar_one() for table in TABLES)
            if copied:
                for table in TABLES:
                    _copy(old, new, table)
            here = {table.name: checksum_table(new, table) for table in TABLES}
            _compare(there, here, copied=copied)
            if copied:
                _advance_sequences(new)
                new.exec_driver_sql(f"ANALYZE {_table_names()}")  # else plans are those of empty tables
    return MoveResult(here, copied)


def checksum_table(tx: Connection, table: Table) -> TableChecksum:
    """Return the row count and checksum of a table; both engines have the same for equal rows."""
    rows = total = 0
    for some in _parts(tx, table):
        rows += len(some)
        for row in some:
            total += int.from_bytes(hashlib.sha256(repr(tuple(row)).encode()).digest())
    return TableChecksum(rows, f"{total % (1 << 256):064x}")


def _copy(old: Connection, new: Connection, table: Table) -> None:
    try:
        for some in _parts(old, table):
            _insert(table)(new, some)
    except (exc.DataError, exc.IntegrityError) as error:
        reason = str(error.orig).splitlines()[0]  # the lines after it quote the row
        raise StoreError(f"{table.name} has a row that PostgreSQL does not accept: {reason}") from error


def _parts(tx: Connection, table: Table) -> Iterator[Sequence[Row[Any]]]:
    rows = 20 if table in _LARGE else 250
    return tx.execute(select(table), execution_options={"yield_per": rows}).partitions()


@cache
def _insert(table: Table) -> BulkInsert:
    names = [column.name for column in table.columns]
    return BulkInsert(list(table.columns), lambda rows: insert(table).from_select(names, select(rows)))


def _compare(there: dict[str, TableChecksum], here: dict[str, TableChecksum], *, copied: bool) -> None:
    wrong = [name for name in there if there[name] != here[name]]
    if not wrong:
        return
    if not copied:
        raise StoreError(f"the target is not empty, and has another ledger: {', '.join(wrong)} differ")
    counts = "; ".join(
        f"{name}: {there[name].rows} rows in the source, {here[name].rows} in the target" for name in wrong
    )
    raise StoreError(
        f"the copy differs from the source, so nothing was kept ({counts}): has the target triggers or rules?"
    )


def _advance_sequences(new: Connection) -> None:
    """Set each sequence to the highest number in use."""
    for table in TABLES:
        if (column := table.autoincrement_column) is not None:
            sequence = func.pg_get_serial_sequence(table.name, column.name)
            new.execute(select(func.setval(sequence, select(func.max(column)).scalar_subquery())))


def _table_names() -> str:
    return ", ".join(table.name for table in TABLES)
