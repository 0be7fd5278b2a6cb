"""Fixture: a receiver."""

from tests.support.tunnel_fixtures import stage

__all__ = ["stage"]
