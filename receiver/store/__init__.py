"""The ledger in a database: the only SQL of the service. Called by all rooms above it."""

from receiver.store.database import Database, open_database
from receiver.store.sqlite import SqliteDatabase

__all__ = ["Database", "SqliteDatabase", "open_database"]
