"""Runs a program for each run. The handler is in `handler`, the life of a program in `process`."""

from handlers.command.handler import Command, CommandConfig

__all__ = ["Command", "CommandConfig"]
