"""Fixtures: a receiver, and an sshd for tunnels."""

from tests.support.tunnel_fixtures import ssh_server, stage

__all__ = ["ssh_server", "stage"]
