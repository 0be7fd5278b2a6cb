"""An emulated FLORA and a receiver beside it, both real servers in this process."""

import asyncio
import secrets
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx

from receiver.client.client import ReceiverClient
from receiver.client.messages import RunView
from receiver.config import HandlerEntry, Settings
from receiver.config.callback_url import CALLBACK_PATH
from receiver.emulator import Emulator, EmulatorSettings
from receiver.net import certificates
from receiver.net.clients import probe_client
from receiver.service.service import Service
from receiver.testing.runs import signed_callback
from receiver.web.server import Server, bind

_PROMPT = {"id": "prompt", "type": "text", "value": "a lighthouse"}
_WAIT_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class Stand:
    """A running receiver beside a running emulator."""

    emulator: Emulator
    """The emulated FLORA."""
    service: Service
    """The receiver."""
    secret: str
    """The secret that signs callbacks."""
    ca: Path
    """The PEM file of the CA behind the receiver's certificate."""
    token: str
    """The token of the operations API."""

    @property
    def url(self) -> str:
        """The callback URL of the receiver."""
        return f"https://127.0.0.1:{self.service.address[1]}{CALLBACK_PATH}"

    async def run(
        self, technique: str = "emu-image", *, metadata: Mapping[str, Any] | None = None, wait: bool = True
    ) -> RunView:
        """Start a run of an emulated technique; return it once its handlers are done or dead.

        The techniques are `emu-image`, `emu-two-images`, `emu-video`, `emu-audio`, `emu-document`,
        `emu-text`, `emu-everything` and `emu-fail`. Without `wait` the run is returned at once.
        """

        def start() -> RunView:
            with self.client() as receiver:
                started = receiver.start(technique, [_PROMPT], metadata=metadata)
                assert started.run_id is not None, started
                return receiver.wait(started.run_id, timeout_seconds=_WAIT_SECONDS if wait else 0)

        return await asyncio.to_thread(start)

    async def look(self, run_id: str) -> RunView:
        """Return a run as it is now."""

        def read() -> RunView:
            with self.client() as receiver:
                return receiver.run(run_id)

        return await asyncio.to_thread(read)

    async def callback(self, run_id: str, **options: Any) -> httpx.Response:
        """Send a callback as FLORA does; `options` are those of `signed_callback`."""
        body, headers = signed_callback(run_id, self.secret, **options)
        async with probe_client(ca=self.ca) as client:
            return await client.post(self.url, content=body, headers=headers)

    def client(self) -> ReceiverClient:
        """Return a client of the operations API. It blocks: call it in a thread."""
        host, port = self.service.operations_address
        return ReceiverClient(f"http://{host}:{port}", self.token)


@asynccontextmanager
async def run_stand(
    directory: Path, handlers: Sequence[Mapping[str, Any]], **sections: Any
) -> AsyncIterator[Stand]:
    """Run an emulated FLORA and a receiver, with their files in `directory`.

    `handlers` are entries as in receiver.toml, `sections` further settings.
    """
    authority = certificates.make_authority()
    ca = directory / "ca.pem"
    ca.write_bytes(authority.pem)
    cert, key = certificates.write(certificates.issue(authority), directory)
    secret, token = f"whsec_{secrets.token_hex(16)}", secrets.token_hex(16)
    emulator = Emulator(
        EmulatorSettings(
            run_seconds=0.1,
            time_scale=20.0,
            allow_private_callbacks=True,
            callback_ca=ca,
            webhook_secrets=(secret,),
        )
    )
    flora = Server(emulator.app, bind("127.0.0.1", 0))
    await flora.start()
    emulator.public_origin = f"http://127.0.0.1:{flora.port}"
    sockets = bind("127.0.0.1", 0)
    port = sockets[0].getsockname()[1]
    for each in sockets:
        each.close()
    document: dict[str, Any] = {
        "public_url": f"https://127.0.0.1:{port}",
        "public": {"host": "127.0.0.1", "port": port},
        "operations": {"port": 0, "token": token},
        "tls": {"cert": str(cert), "key": str(key)},
        "database": {"url": f"sqlite:///{directory / 'receiver.db'}"},
        "flora": {
            "base_url": emulator.base_url(emulator.public_origin),
            "api_key": emulator.settings.api_key,
            "webhook_secrets": [secret],
        },
        "reconcile": {"first_poll_seconds": 1.0, "max_gap_seconds": 1.0, "callback_window_seconds": 5.0},
        "downloads": {"allow_private_hosts": [urlsplit(emulator.public_origin).netloc]},
        "handlers": [_entry(handler) for handler in handlers],
    }
    try:
        service = Service(Settings.model_validate(document | sections))
        async with service.running():
            yield Stand(emulator, service, secret, ca, token)
    finally:
        await emulator.aclose()
        await flora.stop()


def _entry(handler: Mapping[str, Any]) -> dict[str, Any]:
    """Return an entry whose handler's own options stand in `options`."""
    own = {name: value for name, value in handler.items() if name not in HandlerEntry.model_fields}
    general = {name: value for name, value in handler.items() if name not in own}
    return {**general, "options": {**handler.get("options", {}), **own}}


standing = run_stand
"""The former name of `run_stand`."""
