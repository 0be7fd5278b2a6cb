"""The app of the operations listener: the API, `/metrics` and `/healthz`, all behind one token.

`auth.py` decides who may use it, `views.py` fills the messages, and the other modules hold the
endpoints.
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
from receiver.web.ops.openapi import openapi_document
from receiver.web.ops.responses import handle_bug, handle_http_error, handle_receiver_error, json_response


class RequireToken:
    """Middleware that refuses a request, before its body is read, unless `Access` allows it."""

    def __init__(self, app: ASGIApp, access: Access) -> None:
        self._app = app
        self._access = access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        refusal = (
            self._access.refusal(scope["method"], Headers(scope=scope)) if scope["type"] == "http" else None
        )
        app = self._app if refusal is None else refusal.response()
        await app(scope, receive, send)


def ops_app(access: Access, *groups: Iterable[BaseRoute]) -> Starlette:
    """Return the app that serves these groups of routes, and the document that describes them."""
    app = Starlette(
        routes=[
            *(route for group in groups for route in group),
            Route("/api/openapi.json", _openapi, methods=["GET"]),
        ],
        middleware=[Middleware(RequireToken, access)],
        exception_handlers={
            HTTPException: handle_http_error,
            StoreUnavailableError: handle_receiver_error,
            FloraError: handle_receiver_error,
            Exception: handle_bug,
        },
    )
    app.router.redirect_slashes = False
    return app


async def _openapi(_: Request) -> Response:
    return json_response(openapi_document())
