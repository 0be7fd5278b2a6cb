"""Keeps outputs. The handler is in `handler`, the way of one run in `keeping`, its places in `disk` and `objects`."""

from handlers.storage.handler import Storage, StorageConfig, open_place

__all__ = ["Storage", "StorageConfig", "open_place"]
