"""The settings: where their values come from, what is allowed, and how mistakes are reported.

Used by `cli`, `service` and `plugins`; imports only `net.addresses`, `model` and `errors`.
"""

from receiver.config.changes import SettingsSource, find_changes, take_over
from receiver.config.loader import check_operations, environment_variables, load_settings
from receiver.config.ops_token import ensure_token, token_path
from receiver.config.reference import Setting, describe_model
from receiver.config.sections import HandlerEntry, Tls, Workspace
from receiver.config.settings import Settings, describe, redact

__all__ = [
    "HandlerEntry",
    "Setting",
    "Settings",
    "SettingsSource",
    "Tls",
    "Workspace",
    "check_operations",
    "describe",
    "describe_model",
    "ensure_token",
    "environment_variables",
    "find_changes",
    "load_settings",
    "redact",
    "take_over",
    "token_path",
]
