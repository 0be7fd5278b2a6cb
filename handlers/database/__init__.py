"""Keeps runs in tables of the user's own. The handler is in `handler`, its tables in `tables`."""

from handlers.database.handler import Database, DatabaseConfig

__all__ = ["Database", "DatabaseConfig"]
