"""An emulated FLORA for `dev --emulator`, with the settings that belong to it."""

import contextlib
import secrets
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pydantic import SecretStr

from receiver.config import Settings, ensure_token
from receiver.emulator import Emulator, EmulatorSettings
from receiver.net import certificates
from receiver.web.server import Server, bind

__all__ = ["EmulatedFlora", "replace_settings", "run_emulator"]


@dataclass(frozen=True, slots=True)
class EmulatedFlora:
    """A running emulator: its API, the settings that use it, and the CA that canaries trust."""

    base_url: str
    settings: Settings
    ca: Path | None


@contextlib.asynccontextmanager
async def run_emulator(
    settings: Settings, directory: Path, *, ca: Path | None, tls_host: str | None
) -> AsyncIterator[EmulatedFlora]:
    """Run an emulator until the block ends; its settings have its keys and a ledger in `directory`.

    With `tls_host`, the receiver gets a certificate for that host, by a new CA that only the
    emulator trusts.
    """
    tls: dict[str, Any] = {}
    if tls_host is not None:
        authority = certificates.make_authority()
        ca = directory / "ca.pem"
        ca.write_bytes(authority.pem)
        hosts = sorted({tls_host, *certificates.LOCAL_HOSTS})
        cert, key = certificates.write(certificates.issue(authority, *hosts), directory)
        tls = {"cert": cert, "key": key}
    emulator = Emulator(
        EmulatorSettings(
            webhook_secrets=(f"whsec_{secrets.token_hex(16)}",),
            api_key=f"sk_test_{secrets.token_hex(16)}",
            allow_private_callbacks=True,
            callback_ca=ca,
        )
    )
    server = Server(emulator.app, bind("127.0.0.1", 0))
    await server.start()
    emulator.public_origin = origin = f"http://127.0.0.1:{server.port}"
    try:
        used = _use_emulator(settings, emulator, origin, directory, tls)
        yield EmulatedFlora(used.flora.base_url, used, ca)
    finally:
        await emulator.aclose()
        await server.stop()


def _use_emulator(
    settings: Settings, emulator: Emulator, origin: str, directory: Path, tls: dict[str, Any]
) -> Settings:
    """Return the settings with the emulator in place of FLORA, and with a ledger in `directory`."""
    # The token stays in its usual file, where other commands read it.
    token = ensure_token(settings)
    media_host = urlsplit(origin).netloc
    values: dict[str, dict[str, Any]] = {
        "flora": {
            "base_url": emulator.base_url(origin),
            "api_key": SecretStr(emulator.settings.api_key),
            "webhook_secrets": tuple(map(SecretStr, emulator.settings.webhook_secrets)),
        },
        "database": {"url": f"sqlite:///{directory / 'receiver.db'}"},
        "operations": {"token": SecretStr(token)},
        "downloads": {"allow_private_hosts": (*settings.downloads.allow_private_hosts, media_host)},
        "tls": tls,
    }
    return replace_settings(settings, values).model_copy(update={"workspaces": ()})


def replace_settings(settings: Settings, values: dict[str, dict[str, Any]]) -> Settings:
    """Return the settings with `values` by section and key, where not None, and no public URL."""
    sections = {
        name: getattr(settings, name).model_copy(
            update={key: value for key, value in section.items() if value is not None}
        )
        for name, section in values.items()
    }
    return settings.model_copy(update={"public_url": None, **sections})
