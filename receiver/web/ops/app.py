"""The operations listener: the API under `/api`, `/metrics` and `/healthz`, all behind one token and one guard.

Who gets in is decided in `access.py`; what is asked for and answered in `runs.py`, `ledger.py` and `openapi.py`.
"""

from collections.abc import Iterable

from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route
from starlette.types import ASGIApp, Receive, Scope, Send

from receiver.errors import FloraError, StoreUnavailableError
from receiver.web.ops.auth import Access
from receiver.web.ops.openapi import document
from receiver.web.ops.responses import answered, on_bug, on_http_error, on_trouble


class Guard:
    """Lets through what `Access` lets through, before anything of the request's body is read."""

    def __init__(self, app: ASGIApp, access: Access) -> None:
        self._app = app
        self._access = access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        refusal = self._access.refusal(scope["method"], Headers(scope=scope)) if scope["type"] == "http" else None
        app = self._app if refusal is None else refusal.response()
        await app(scope, receive, send)


def ops_app(access: Access, *rooms: Iterable[BaseRoute]) -> Starlette:
    """Build the app from the routes of its rooms."""
    app = Starlette(
        routes=[*(route for room in rooms for route in room), Route("/api/openapi.json", _openapi, methods=["GET"])],
        middleware=[Middleware(Guard, access)],
        exception_handlers={
            HTTPException: on_http_error,
            StoreUnavailableError: on_trouble,
            FloraError: on_trouble,
            Exception: on_bug,
        },
    )
    app.router.redirect_slashes = False
    return app


async def _openapi(_: Request) -> Response:
    return answered(document())
