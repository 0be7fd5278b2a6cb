"""The token of the operations listener: a setting, or generated into a file by the ledger."""

import os
import secrets
import tempfile
from pathlib import Path

from receiver.config.settings import Settings
from receiver.errors import ConfigError, Problem
from receiver.net.credentials import find_fault
from receiver.net.ownership import make_directory, match_owner

__all__ = ["ensure_token", "token_path"]


def token_path(settings: Settings) -> Path:
    """Return the file of a generated token: beside the SQLite file, else in `var`."""
    ledger = settings.database.location.path
    return (Path("var") if ledger is None else ledger.parent) / "ops-token"


def ensure_token(settings: Settings) -> str:
    """Return the token from the settings or the file; generate it if there is none.

    Raises ConfigError if the file cannot be used.
    """
    if settings.operations.token is not None:
        return settings.operations.token.get_secret_value()
    path = token_path(settings)
    try:
        if path.exists() and (token := path.read_text("utf-8-sig").strip()):
            if (fault := find_fault(token)) is not None:
                raise ConfigError([Problem("operations.token", f"in {path} {fault}")])
            path.chmod(0o600)
            return token
        make_directory(path.parent)
        return _write_token(path, secrets.token_urlsafe(32))
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text"
        message = f"cannot be stored in {path}: {reason}; set RECEIVER_OPS_TOKEN instead"
        raise ConfigError([Problem("operations.token", message)]) from error


def _write_token(path: Path, token: str) -> str:
    """Write the token atomically, readable by its owner only, and return it."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".ops-token.")  # with mode 0600
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        match_owner(handle, path.parent)
        file.write(f"{token}\n")
        file.flush()
        os.fsync(file.fileno())
    Path(temporary).replace(path)
    return token
