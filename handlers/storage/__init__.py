"""Stores outputs. The handler is in `handler`, the work on one run in `writer`, places in `disk` and `objects`."""

from handlers.storage.handler import Storage, StorageConfig, open_place

__all__ = ["Storage", "StorageConfig", "open_place"]
