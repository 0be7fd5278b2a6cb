"""A bare Starlette route: it reads the body and answers with the same bytes, through the same server and the same guard."""

import asyncio
import os

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from receiver.cli.serve import find_loop_factory
from receiver.config import Settings
from receiver.config.callback_url import CALLBACK_PATH
from receiver.service.wiring import build_public_guard
from receiver.telemetry import Metrics
from receiver.web.server import Server, bind


async def _callback(request: Request) -> Response:
    await request.body()
    return Response(b'{"status":"accepted"}', media_type="application/json")


async def _serve() -> None:
    app = Starlette(routes=[Route(CALLBACK_PATH, _callback, methods=["POST"])])
    server = Server(
        app, bind("127.0.0.1", int(os.environ["PORT"])), guard=build_public_guard(Settings(), Metrics())
    )
    await server.start()
    await asyncio.Event().wait()


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=find_loop_factory()) as runner:
        runner.run(_serve())
