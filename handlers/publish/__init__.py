"""Publishes runs to a message broker. The handler is in `handler`, each broker in its own module."""

from handlers.publish.handler import Publish, PublishConfig

__all__ = ["Publish", "PublishConfig"]
