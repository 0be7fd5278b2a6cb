"""The command `flora-receiver`. Modules here load what they need when a command runs: `--help` must be quick."""

from receiver.cli.app import main

__all__ = ["main"]
