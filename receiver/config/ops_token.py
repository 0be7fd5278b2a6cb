"""Where the token of the operations listener is: in the settings, else in a file beside the ledger."""

import os
import secrets
import tempfile
from pathlib import Path

from receiver.config.settings import Settings
from receiver.errors import ConfigError, Problem

__all__ = ["ensure_token", "token_path"]


def token_path(settings: Settings) -> Path:
    """Return where a generated token lies: beside the SQLite file, else in `var`."""
    scheme, _, rest = settings.database.url.partition(":///")
    directory = Path(rest.partition("?")[0]).parent if scheme == "sqlite" else Path("var")
    return directory / "ops-token"


def ensure_token(settings: Settings) -> str:
    """Return the configured token, else the one in the file, which is made where there is none. Raises ConfigError."""
    if settings.operations.token is not None:
        return settings.operations.token.get_secret_value()
    path = token_path(settings)
    try:
        if path.exists() and (found := path.read_text("utf-8").strip()):
            path.chmod(0o600)
            return found
        path.parent.mkdir(parents=True, exist_ok=True)
        return _written(path, secrets.token_urlsafe(32))
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text"
        problem = f"cannot be kept in {path}: {reason}; set RECEIVER_OPS_TOKEN instead"
        raise ConfigError([Problem("operations.token", problem)]) from error


def _written(path: Path, token: str) -> str:
    """Write the token so that nobody else reads it, and nobody reads half of it."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".ops-token.")  # mkstemp makes it 0600
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        file.write(f"{token}\n")
        file.flush()
        os.fsync(file.fileno())
    Path(temporary).replace(path)
    return token
