"""Runs a program for each run. The handler is in `handler`, what a program is in `process`."""

from handlers.command.handler import Command, CommandConfig

__all__ = ["Command", "CommandConfig"]
