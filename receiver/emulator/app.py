"""Composes the emulator: one ASGI application for the API, the media and its own endpoints."""

import contextlib
import random
import time
from collections.abc import AsyncIterator, Callable, Sequence

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Mount

from receiver.emulator.api import Api
from receiver.emulator.callbacks import Callbacks, Delivery
from receiver.emulator.control import Control
from receiver.emulator.faults import FaultBook, parse_faults
from receiver.emulator.gate import Gate
from receiver.emulator.idempotency import KeyBook
from receiver.emulator.problems import ApiProblem, not_found
from receiver.emulator.runs import RunBook, run_to_json
from receiver.emulator.server import MediaServer
from receiver.emulator.settings import API_PATH, EmulatorSettings
from receiver.emulator.starts import Starter
from receiver.emulator.techniques import find_technique

__all__ = ["Emulator"]


class Emulator:
    """An emulated FLORA. A server runs `app`, whose lifespan calls `aclose` at its end.

    `public_origin` may be set once the port is known. While it is None, URLs have the origin of the
    request.
    """

    def __init__(
        self, settings: EmulatorSettings | None = None, *, clock: Callable[[], float] = time.time
    ) -> None:
        self.settings = settings or EmulatorSettings()
        self.public_origin = self.settings.public_origin
        # Separate generators: drawing a fault must not change the ids that follow.
        self.faults = FaultBook(random.Random(self.settings.seed), parse_faults(self.settings.faults))
        self.runs = RunBook(clock, random.Random(self.settings.seed))
        randomness = random.Random(self.settings.seed)
        self._callbacks = Callbacks(
            self.settings, self.runs, self.faults, clock=clock, randomness=randomness
        )
        self._starter = Starter(self.settings, self.runs, self.faults, self._callbacks, clock=clock)
        self._media = MediaServer(self.runs, self.faults)
        self._keys = KeyBook(clock, time_scale=self.settings.time_scale)
        self.gate = Gate(self.settings.api_key, self.faults, self.runs)
        self.app = self._application()

    @property
    def deliveries(self) -> list[Delivery]:
        """The callbacks so far, oldest first, each with its attempts."""
        return self._callbacks.deliveries

    def base_url(self, origin: str) -> str:
        """Return the value of `FLORA_BASE_URL` for an emulator that is served at `origin`."""
        return origin.rstrip("/") + API_PATH

    def start_run(
        self,
        technique: str = "emu-image",
        *,
        prompt: str = "a lighthouse",
        callback_url: str | None = None,
        faults: Sequence[dict[str, object]] = (),
    ) -> str:
        """Start a technique run without a request and return its id.

        A run with a callback URL needs a running event loop.
        """
        found = find_technique(technique)
        if found is None:
            raise not_found("Technique")
        body: dict[str, object] = {
            "mode": "async",
            "inputs": [{"id": "prompt", "type": "text", "value": prompt}],
            "callback_url": callback_url,
        }
        return self._starter.technique(found, body, parse_faults(list(faults))).run_id

    def read_run(self, run_id: str, origin: str) -> dict[str, object] | None:
        """Return the response to a read of this run now, or None for an unknown run."""
        run = self.runs.find(run_id)
        if run is None:
            return None
        return run_to_json(run, self.runs.clock(), origin=origin, api=self.base_url(origin))

    async def drain(self) -> None:
        """Wait until no callback is pending, retries included."""
        await self._callbacks.drain()

    async def aclose(self) -> None:
        """Cancel pending callbacks and end stalled downloads. May be called twice."""
        self._media.closing.set()
        await self._callbacks.aclose()

    def _application(self) -> Starlette:
        api = Api(self.settings, self.runs, self._keys, self._starter, self._origin)
        control = Control(self.runs, self.faults, self._callbacks, self._starter)

        @contextlib.asynccontextmanager
        async def lifespan(_app: Starlette) -> AsyncIterator[None]:
            yield
            await self.aclose()

        app = Starlette(
            routes=[
                Mount(API_PATH, routes=api.routes(self.gate)),
                Mount("/_emulator", routes=control.routes(self.gate)),
                *self._media.routes(),
            ],
            exception_handlers={HTTPException: self._refuse, Exception: self._fail},
            lifespan=lifespan,
        )
        app.router.redirect_slashes = False
        return app

    def _origin(self, request: Request) -> str:
        return (self.public_origin or f"{request.url.scheme}://{request.url.netloc}").rstrip("/")

    async def _refuse(self, _request: Request, error: Exception) -> Response:
        status = error.status_code if isinstance(error, HTTPException) else 500
        code = {404: "not_found", 405: "method_not_allowed"}.get(status, "input_validation_error")
        headers = error.headers if isinstance(error, HTTPException) else None
        return self.gate.stamp(
            ApiProblem(status, code, str(getattr(error, "detail", code)), headers=headers).response()
        )

    async def _fail(self, _request: Request, _error: Exception) -> Response:
        return self.gate.stamp(
            ApiProblem(500, "internal_error", "The emulator has failed: see its log").response()
        )
