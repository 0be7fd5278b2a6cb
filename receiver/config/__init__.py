"""The settings: where they come from, what they may be, what is wrong with them. A leaf: imports no other room."""

from receiver.config.loader import load, operations_problem, variables
from receiver.config.ops_token import ensure_token, token_path
from receiver.config.reference import Setting, described
from receiver.config.sections import HandlerEntry, Workspace
from receiver.config.settings import Settings, describe, redacted

__all__ = [
    "HandlerEntry",
    "Setting",
    "Settings",
    "Workspace",
    "describe",
    "described",
    "ensure_token",
    "load",
    "operations_problem",
    "redacted",
    "token_path",
    "variables",
]
