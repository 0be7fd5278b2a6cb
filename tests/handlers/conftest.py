"""The fixtures of the kit for handlers."""

from tests.support.handler_kit import context_of, media, run, tls

__all__ = ["context_of", "media", "run", "tls"]
