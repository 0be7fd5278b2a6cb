"""Errors of the user's database, in words for operators. Pure; for the handler `database`.

The messages never hold a value: a database that quotes what it refuses may quote a media URL.
"""

from enum import Enum, auto

from sqlalchemy import exc

_FIX_TABLES = "compare its tables with what `flora-receiver handlers schema database` prints"
_MAX_LENGTH = 200
_TABLE_STATES = {"3F000", "42501", "42703", "42804", "42P01", "42P10"}
"""SQLSTATE of a missing schema, right, column; of a wrong type; of a missing table, key."""
_LOGIN = (
    "authentication failed",
    "does not exist",
    "no pg_hba.conf entry",
    "no password supplied",
    "not permitted",
)
_SQLITE_TABLES = (
    "no such table",
    "no such column",
    "has no column",
    "on conflict clause",
    "readonly",
    "read-only",
)
_SQLITE_BUSY = ("locked", "busy")


class FailureKind(Enum):
    """Who has to act when the database failed."""

    UNREACHABLE = auto()
    """It does not answer. This may pass."""
    BUSY = auto()
    """It answers, but is held up by other work. This may pass."""
    TABLES = auto()
    """The tables, the permissions or the login have to be fixed."""
    VALUES = auto()
    """It refuses the values, and will refuse them again."""


class DatabaseFailedError(Exception):
    """The database failed, and nothing was written. The message says what to do."""

    def __init__(self, kind: FailureKind, message: str) -> None:
        self.kind = kind
        super().__init__(message)


def to_failure(error: Exception) -> DatabaseFailedError:
    """Translate an error of SQLAlchemy or of a driver."""
    if isinstance(error, OverflowError):
        return DatabaseFailedError(FailureKind.VALUES, "the database refuses a number that is too large")
    cause: BaseException = error.orig if isinstance(error, exc.DBAPIError) and error.orig else error
    state = getattr(cause, "sqlstate", None)
    if isinstance(error, exc.IntegrityError | exc.DataError) or (state or "").startswith(("22", "23")):
        return DatabaseFailedError(FailureKind.VALUES, f"the database refuses the values: {_name(cause)}")
    message = _first_line(cause)
    if state in _TABLE_STATES:
        return DatabaseFailedError(FailureKind.TABLES, f"{message}: {_FIX_TABLES}")
    if state is not None:
        return DatabaseFailedError(FailureKind.BUSY, f"the database cannot do it now: {message}")
    return _from_message(message)


def _from_message(message: str) -> DatabaseFailedError:
    """Classify an error without SQLSTATE: SQLite's own, or one of connecting to PostgreSQL."""
    lower = message.lower()
    if any(sign in lower for sign in _SQLITE_TABLES):
        return DatabaseFailedError(FailureKind.TABLES, f"{message}: {_FIX_TABLES}")
    if "unable to open database file" in lower:
        return DatabaseFailedError(
            FailureKind.TABLES,
            "the file does not exist or cannot be opened: create it, or set create = true",
        )
    if any(sign in lower for sign in _LOGIN):
        return DatabaseFailedError(FailureKind.TABLES, f"the database refuses the login: {message}")
    if any(sign in lower for sign in _SQLITE_BUSY):
        return DatabaseFailedError(
            FailureKind.BUSY, f"the database is locked by another program: {message}"
        )
    return DatabaseFailedError(FailureKind.UNREACHABLE, f"the database does not answer: {message}")


def _name(cause: BaseException) -> str:
    """Return the error's type and, where the driver says so, the table, column and constraint."""
    diagnosis = getattr(cause, "diag", None)
    parts = ("table_name", "column_name", "constraint_name")
    where = ".".join(name for part in parts if (name := getattr(diagnosis, part, None)))
    return f"{type(cause).__name__} at {where}" if where else type(cause).__name__


def _first_line(error: BaseException) -> str:
    # Further lines hold the statement, its values, and hints.
    return (str(error).splitlines() or [type(error).__name__])[0][:_MAX_LENGTH]
