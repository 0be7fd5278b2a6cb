"""A receiver that a tunnel leads to, and an SSH server to open one through."""

from tests.support.tunnel_fixtures import ssh_server, stage

__all__ = ["ssh_server", "stage"]
