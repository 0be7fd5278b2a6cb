"""The CA that `--ca` names: looked at before anything else is done."""

import ssl
from pathlib import Path

from receiver.errors import ConfigError, Problem


def check_ca(ca: Path | None) -> None:
    """Raise ConfigError where the file cannot be trusted, since there is nothing in it."""
    if ca is None:
        return
    try:
        ssl.create_default_context(cafile=ca)
    except (OSError, ssl.SSLError) as error:
        raise ConfigError([Problem("--ca", f"{ca} holds no certificate in PEM form")]) from error
