"""What one would write first: a Starlette route that verifies, and inserts with aiosqlite, a commit for each request."""

import json
import os
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import aiosqlite  # type: ignore[import-not-found]  # the benchmark installs it aside
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from receiver.config.callback_url import CALLBACK_PATH
from receiver.flora.signature import HEADER, verify

_SECRETS = (os.environ["SECRET"],)


@asynccontextmanager
async def _lifespan(app: Starlette) -> AsyncIterator[None]:
    async with aiosqlite.connect(os.environ["DATABASE"]) as database:
        await database.execute("PRAGMA journal_mode = WAL")
        await database.execute("PRAGMA synchronous = FULL")
        await database.execute("CREATE TABLE deliveries (id TEXT PRIMARY KEY, run_id TEXT, body BLOB)")
        app.state.database = database
        yield


async def _callback(request: Request) -> JSONResponse:
    body = await request.body()
    verify(body, request.headers.get(HEADER), _SECRETS, now=int(time.time()))
    message = json.loads(body)
    database = request.app.state.database
    await database.execute(
        "INSERT INTO deliveries VALUES (?, ?, ?) ON CONFLICT DO NOTHING",
        (message["id"], message["data"]["run_id"], body),
    )
    await database.commit()
    return JSONResponse({"status": "accepted"})


if __name__ == "__main__":
    app = Starlette(routes=[Route(CALLBACK_PATH, _callback, methods=["POST"])], lifespan=_lifespan)
    uvicorn.run(app, port=int(os.environ["PORT"]), http="httptools", access_log=False, log_level="error")
