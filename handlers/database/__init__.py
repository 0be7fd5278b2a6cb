"""Keeps runs in the user's own tables. The handler is in `handler`, the tables in `tables`."""

from handlers.database.handler import Database, DatabaseConfig

__all__ = ["Database", "DatabaseConfig"]
