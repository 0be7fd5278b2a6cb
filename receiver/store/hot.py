"""Statements that run for every callback: written in SQLAlchemy's words, compiled once, then given to the driver as text.

SQLAlchemy's own execution converts and names every parameter of every row; for the door's inserts that cost more than
the database does. Rows are sequences, in the order of the names.
"""

from collections.abc import Callable, Collection, Sequence
from typing import Any

from sqlalchemy import Connection, Dialect, Executable
from sqlalchemy.sql.elements import ClauseElement

_STYLES = {"sqlite": "qmark", "postgresql": "format"}
"""Positional styles that each driver takes."""


class Many:
    """One statement for many rows."""

    def __init__(self, statement: ClauseElement, names: Sequence[str]) -> None:
        """`names` are the statement's parameters, in the order in which it has them: columns', or `bindparam`s'."""
        self._statement = statement
        self._names = tuple(names)
        self._texts: dict[str, str] = {}

    def __call__(self, tx: Connection, rows: Sequence[Sequence[Any]]) -> None:
        """Run it for every row."""
        if rows:
            text = self._texts.get(tx.dialect.name) or self._compile(tx.dialect)
            tx.exec_driver_sql(text, [tuple(row) for row in rows])

    def _compile(self, dialect: Dialect) -> str:
        compiled: Any = self._statement.compile(
            dialect=_positional(type(dialect), dialect.name), column_keys=self._names
        )
        if tuple(compiled.positiontup) != self._names:
            raise TypeError(f"the parameters stand in another order: {compiled.positiontup}")
        return self._texts.setdefault(dialect.name, str(compiled))


class Find:
    """A select by a list of keys. `make` returns it for that many keys."""

    def __init__(self, make: Callable[[int], Executable]) -> None:
        self._make = make
        self._texts: dict[tuple[str, int], str] = {}

    def __call__(self, tx: Connection, keys: Collection[str]) -> Sequence[Any]:
        """Return the rows of these keys."""
        wanted = sorted(keys)
        wanted += wanted[-1:] * (_rounded(len(wanted)) - len(wanted))  # few lengths: each is a statement of its own
        text = self._texts.get((tx.dialect.name, len(wanted))) or self._compile(tx.dialect, len(wanted))
        return tx.exec_driver_sql(text, tuple(wanted)).all()

    def _compile(self, dialect: Dialect, count: int) -> str:
        statement: Any = self._make(count)
        compiled = statement.compile(
            dialect=_positional(type(dialect), dialect.name), compile_kwargs={"render_postcompile": True}
        )
        return self._texts.setdefault((dialect.name, count), str(compiled))


def _rounded(count: int) -> int:
    return 1 << (count - 1).bit_length()


def _positional(dialect: type[Dialect], name: str) -> Dialect:
    return dialect(paramstyle=_STYLES[name])  # type: ignore[call-arg]
