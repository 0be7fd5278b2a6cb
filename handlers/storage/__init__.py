"""Stores outputs. `handler` has the handler, `writer` a run's work, `disk` and `objects` places."""

from handlers.storage.handler import Storage, StorageConfig, open_place

__all__ = ["Storage", "StorageConfig", "open_place"]
