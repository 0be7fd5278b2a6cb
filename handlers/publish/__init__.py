"""Publishes runs to a message broker. The handler is in `handler`, brokers in `broker_*`."""

from handlers.publish.handler import Publish, PublishConfig

__all__ = ["Publish", "PublishConfig"]
