"""The settings: where they come from, what they may be, what is wrong with them. A leaf: imports no other room."""

from receiver.config.loading import load, variables
from receiver.config.sections import HandlerEntry, Workspace
from receiver.config.settings import Setting, Settings, describe, redacted

__all__ = ["HandlerEntry", "Setting", "Settings", "Workspace", "describe", "load", "redacted", "variables"]
