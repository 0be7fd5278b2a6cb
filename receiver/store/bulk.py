"""Bulk statements of the intake: built with SQLAlchemy, compiled once, run by the driver as text.

SQLAlchemy's own execution converts and names every parameter of every row, which costs more than
the database does. Rows are sequences in the order of the columns.
"""

from collections.abc import Callable, Collection, Sequence
from itertools import chain
from typing import Any

from sqlalchemy import (
    Column,
    Connection,
    Dialect,
    Executable,
    FromClause,
    Insert,
    bindparam,
    column,
    func,
    values,
)
from sqlalchemy.dialects import postgresql

_STYLES = {"sqlite": "qmark", "postgresql": "format"}
"""The positional parameter style of each driver."""
_MAX_ROWS = 256
"""Rows of one statement."""


class BulkInsert:
    """Inserts many rows by one statement, so that the driver releases the GIL only once."""

    def __init__(self, columns: Sequence[Column[Any]], make: Callable[[FromClause], Insert]) -> None:
        """`make` returns the insert from a table with these columns.

        PostgreSQL receives arrays. SQLite receives VALUES, their number rounded up with rows of
        NULLs: the insert must leave out rows whose first column is NULL.
        """
        self._columns = tuple(columns)
        self._make = make
        self._texts: dict[tuple[str, int], str] = {}

    def __call__(self, tx: Connection, rows: Sequence[Sequence[Any]]) -> None:
        """Insert the rows."""
        for first in range(0, len(rows), _MAX_ROWS):
            some = rows[first : first + _MAX_ROWS]
            parameters: tuple[Any, ...]
            if tx.dialect.name == "postgresql":
                count, parameters = 0, tuple(list(column) for column in zip(*some, strict=True))
            else:
                count = _round_up(len(some))
                parameters = (
                    *chain.from_iterable(some),
                    *(None,) * (len(self._columns) * (count - len(some))),
                )
            text = self._texts.get((tx.dialect.name, count)) or self._compile(tx.dialect, count)
            tx.exec_driver_sql(text, parameters)

    def _compile(self, dialect: Dialect, count: int) -> str:
        columns = [column(each.name, each.type) for each in self._columns]
        given: FromClause
        if dialect.name == "postgresql":
            arrays = (bindparam(each.name, type_=postgresql.ARRAY(each.type)) for each in columns)
            given = func.unnest(*arrays).table_valued(*columns).render_derived()
        else:
            row = tuple(bindparam(None, type_=each.type) for each in columns)
            given = values(*columns, name="given").data([row] * count).cte()
        compiled: Any = self._make(given).compile(dialect=_positional(dialect))
        return self._texts.setdefault((dialect.name, count), str(compiled))


class SelectByKeys:
    """Selects rows by keys. `make` returns the select for a number of keys."""

    def __init__(self, make: Callable[[int], Executable]) -> None:
        self._make = make
        self._texts: dict[tuple[str, int], str] = {}

    def __call__(self, tx: Connection, keys: Collection[str]) -> Sequence[Any]:
        """Return the rows of these keys."""
        wanted = sorted(keys)
        wanted += wanted[-1:] * (_round_up(len(wanted)) - len(wanted))  # each length is compiled once
        text = self._texts.get((tx.dialect.name, len(wanted))) or self._compile(tx.dialect, len(wanted))
        return tx.exec_driver_sql(text, tuple(wanted)).all()

    def _compile(self, dialect: Dialect, count: int) -> str:
        statement: Any = self._make(count)
        compiled = statement.compile(
            dialect=_positional(dialect), compile_kwargs={"render_postcompile": True}
        )
        return self._texts.setdefault((dialect.name, count), str(compiled))


def _round_up(count: int) -> int:
    return 1 << (count - 1).bit_length()


def _positional(dialect: Dialect) -> Dialect:
    make: Any = type(dialect)
    positional: Dialect = make(paramstyle=_STYLES[dialect.name])
    return positional
