"""The connection to the running service: its URL and token, from the environment or the settings.

The client is imported when a command connects, so that `--help` does not wait for it.
"""

import os
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from receiver.cli.output import report_errors
from receiver.errors import ConfigError, Problem
from receiver.net.addresses import is_loopback, local_origin, to_unix_path
from receiver.net.credentials import find_fault

if TYPE_CHECKING:
    from receiver.client.client import ReceiverClient
    from receiver.config import Settings


@contextmanager
def api_client(*, json: bool) -> Iterator["ReceiverClient"]:
    """Yield a client of the running service; report an error of the block and exit."""
    with report_errors(as_json=json), connect() as receiver:
        yield receiver


def connect() -> "ReceiverClient":
    """Return a client of the running service. Raises ConfigError if its token cannot be read."""
    from receiver.client.client import ReceiverClient
    from receiver.config import load_settings

    ca = os.environ.get("RECEIVER_OPS_CA")
    url, token = os.environ.get("RECEIVER_OPS_URL"), os.environ.get("RECEIVER_OPS_TOKEN")
    if not (url and token):
        settings = load_settings(None, os.environ, need_secrets=False)
        url, token = url or _url(settings), token or _token(settings)
    elif (fault := find_fault(token)) is not None:
        raise ConfigError([Problem("RECEIVER_OPS_TOKEN", fault)])
    return ReceiverClient(url, token, ca=Path(ca) if ca else None)


def _url(settings: "Settings") -> str:
    operations = settings.operations
    if to_unix_path(operations.host) is not None:
        return operations.host
    plaintext = operations.allow_plaintext or is_loopback(operations.host)
    tls = settings.tls.cert is not None and not plaintext
    return local_origin(operations.host, operations.port, tls=tls)


def _token(settings: "Settings") -> str:
    from receiver.config import token_path

    if settings.operations.token is not None:
        return settings.operations.token.get_secret_value()
    path = token_path(settings)
    try:
        token = path.read_text("utf-8-sig").strip()
        fault = find_fault(token)
        if fault is None:
            return token
        reason = fault.partition(";")[0]
    except OSError as error:
        reason = f"cannot be read ({error.strerror})"
    except UnicodeDecodeError:
        reason = "cannot be read (not text)"
    message = (
        f"is not set, and {path} {reason}. `flora-receiver serve` writes that file when it starts: "
        "run this command in the same directory, or set the variable"
    )
    raise ConfigError([Problem("RECEIVER_OPS_TOKEN", message)])


def check_ca(ca: Path | None) -> None:
    """Raise ConfigError if the file holds no certificate."""
    if ca is None:
        return
    try:
        ssl.create_default_context(cafile=ca)
    except (OSError, ssl.SSLError) as error:
        raise ConfigError([Problem("--ca", f"{ca} holds no certificate in PEM form")]) from error
