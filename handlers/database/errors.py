"""What a database says when it does not do as asked, in words for operators. Pure; for `handlers.database`.

The words never hold a value: a database that quotes what it refuses may quote a media URL.
"""

from enum import Enum, auto

from sqlalchemy import exc

MAKE_TABLES = "compare its tables with what `flora-receiver handlers schema database` prints"
_LENGTH = 200
_TABLES = {"3F000", "42501", "42703", "42804", "42P01", "42P10"}
"""Missing schema, right, column; wrong type; missing table, key."""
_LOGIN = ("authentication failed", "does not exist", "no pg_hba.conf entry", "no password supplied", "not permitted")
_SQLITE_TABLES = ("no such table", "no such column", "has no column", "on conflict clause", "readonly", "read-only")
_SQLITE_BUSY = ("locked", "busy")


class Why(Enum):
    """Who has to do something about it."""

    AWAY = auto()
    """Nobody answers, or not now."""
    BUSY = auto()
    """It answers, and is held up by somebody else's work."""
    TABLES = auto()
    """The tables, the rights or the login are not as they must be."""
    VALUES = auto()
    """It refuses what was to be written."""


class Refusal(Exception):  # noqa: N818 - a value that travels by raising
    """The database did not do it, and nothing was written."""

    def __init__(self, why: Why, words: str) -> None:
        self.why = why
        super().__init__(words)


def explained(error: Exception) -> Refusal:
    """Put any error of the driver, or of SQLAlchemy, into words."""
    if isinstance(error, OverflowError):
        return Refusal(Why.VALUES, "the database refuses a number that is too large")
    cause: BaseException = error.orig if isinstance(error, exc.DBAPIError) and error.orig else error
    state = getattr(cause, "sqlstate", None)
    kind = type(cause).__name__
    if isinstance(error, exc.IntegrityError | exc.DataError) or (state or "").startswith(("22", "23")):
        diagnosis = getattr(cause, "diag", None)
        named = [getattr(diagnosis, name, None) for name in ("table_name", "column_name", "constraint_name")]
        where = ".".join(name for name in named if name)
        return Refusal(Why.VALUES, f"the database refuses the values: {kind}{f' at {where}' if where else ''}")
    words = _first_line(cause)
    if state is not None:
        if state in _TABLES:
            return Refusal(Why.TABLES, f"{words}: {MAKE_TABLES}")
        return Refusal(Why.BUSY, f"the database could not do it now: {words}")
    lower = words.lower()
    if any(sign in lower for sign in _SQLITE_TABLES):
        return Refusal(Why.TABLES, f"{words}: {MAKE_TABLES}")
    if "unable to open database file" in lower:
        return Refusal(Why.TABLES, "there is no such file, or it cannot be opened: make it, or set create = true")
    if any(sign in lower for sign in _LOGIN):
        return Refusal(Why.TABLES, f"the database refuses the login: {words}")
    if any(sign in lower for sign in _SQLITE_BUSY):
        return Refusal(Why.BUSY, f"the database is held by another program: {words}")
    return Refusal(Why.AWAY, f"the database does not answer: {words}")


def _first_line(error: BaseException) -> str:
    # Further lines hold the statement, its values, and hints.
    return (str(error).splitlines() or [type(error).__name__])[0][:_LENGTH]
