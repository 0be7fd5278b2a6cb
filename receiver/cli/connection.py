"""Connecting from a command: to the running service, and with the CA that `--ca` names."""

import os
import ssl
from pathlib import Path

from receiver.client.client import ReceiverClient
from receiver.config import Settings, load_settings, token_path
from receiver.errors import ConfigError, Problem
from receiver.net.addresses import http_origin, is_loopback, local_host


def connect() -> ReceiverClient:
    """Return a client of the running service. Raises ConfigError where its token cannot be found."""
    ca = os.environ.get("RECEIVER_OPS_CA")
    url, token = os.environ.get("RECEIVER_OPS_URL"), os.environ.get("RECEIVER_OPS_TOKEN")
    if not (url and token):
        settings = load_settings(None, os.environ, need_secrets=False)
        url, token = url or _url(settings), token or _token(settings)
    return ReceiverClient(url, token, ca=Path(ca) if ca else None)


def _url(settings: Settings) -> str:
    operations = settings.operations
    tls = settings.tls.cert is not None and not operations.allow_plaintext and not is_loopback(operations.host)
    return http_origin(local_host(operations.host), operations.port, tls=tls)


def _token(settings: Settings) -> str:
    if settings.operations.token is not None:
        return settings.operations.token.get_secret_value()
    path = token_path(settings)
    try:
        if token := path.read_text("utf-8").strip():
            return token
        reason = "is empty"
    except (OSError, UnicodeDecodeError) as error:
        reason = f"cannot be read ({error.strerror if isinstance(error, OSError) else 'not text'})"
    raise ConfigError(
        [
            Problem(
                "RECEIVER_OPS_TOKEN",
                f"is not set, and {path} {reason}: `flora-receiver serve` writes it when it starts; "
                "run this command in the same directory, or set the variable",
            )
        ]
    )


def check_ca(ca: Path | None) -> None:
    """Raise ConfigError if the file holds no certificate."""
    if ca is None:
        return
    try:
        ssl.create_default_context(cafile=ca)
    except (OSError, ssl.SSLError) as error:
        raise ConfigError([Problem("--ca", f"{ca} holds no certificate in PEM form")]) from error
