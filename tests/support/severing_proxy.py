"""A way to PostgreSQL that hangs, is cut, or is cut at the one moment that matters: around the answer to a COMMIT."""

import asyncio
import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from tests.support.patience import PATIENCE_SECONDS
from tests.support.postgres import Postgres

Moment = Literal["before COMMIT", "after COMMIT"]
_COMMIT = b"Q\x00\x00\x00\x0bCOMMIT\x00"
"""A simple query as it stands on the wire: kind, length, text."""


@dataclass
class SeveringProxy:
    """A relay on loopback. `cut_next` names the moment at which the next transaction's connection is reset."""

    server: Postgres
    url: str = ""
    cut_next: Moment | None = None
    cuts: int = 0
    refusing: bool = False
    """Whether connections are reset as soon as they are made, as of a host whose server is down."""
    holding: bool = False
    """Whether the server's answers are kept back, as of a host that hangs."""
    _writers: set[asyncio.StreamWriter] = field(default_factory=set)
    _loop: asyncio.AbstractEventLoop = field(init=False)
    _end: asyncio.Event = field(init=False)

    async def relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self.refusing:
            writer.transport.abort()
            return
        there, to_server = await asyncio.open_unix_connection(f"{self.server.directory}/.s.PGSQL.5432")
        self._writers |= {writer, to_server}
        cutting = asyncio.Event()
        back = asyncio.create_task(self._answers(there, writer, cutting))
        try:
            with contextlib.suppress(ConnectionError):
                while data := await reader.read(65_536):
                    if data.endswith(_COMMIT) and self.cut_next is not None:
                        moment, self.cut_next = self.cut_next, None
                        self.cuts += 1
                        if moment == "before COMMIT":
                            break
                        cutting.set()
                    to_server.write(data)
                    await to_server.drain()
                    if cutting.is_set():
                        await back
                        break
        finally:
            back.cancel()
            for each in (writer, to_server):
                each.transport.abort()
                self._writers.discard(each)
            await asyncio.wait({back})

    async def _answers(
        self, there: asyncio.StreamReader, writer: asyncio.StreamWriter, cutting: asyncio.Event
    ) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await there.read(65_536):
                if cutting.is_set():
                    return  # it is committed, and nobody hears of it
                if not self.holding:
                    writer.write(data)
                    await writer.drain()
        writer.close()

    def sever(self) -> None:
        """Reset every connection."""
        self._loop.call_soon_threadsafe(self._abort)

    def _abort(self) -> None:
        for writer in self._writers:
            writer.transport.abort()

    async def run(self, database: str, ready: threading.Event) -> None:
        """Relay until told to end."""
        self._loop, self._end = asyncio.get_running_loop(), asyncio.Event()
        listener = await asyncio.start_server(self.relay, "127.0.0.1", 0)
        self.url = f"postgresql://flora@127.0.0.1:{listener.sockets[0].getsockname()[1]}/{database}"
        ready.set()
        await self._end.wait()
        listener.close()
        self._abort()
        relays = asyncio.all_tasks() - {asyncio.current_task()}
        if relays:
            await asyncio.wait(relays)

    def end(self) -> None:
        self._loop.call_soon_threadsafe(self._end.set)


@contextlib.contextmanager
def run_severing_proxy(server: Postgres, database: str) -> Iterator[SeveringProxy]:
    """Relay inside the block, on a thread of its own: whoever connects may block the test's loop meanwhile."""
    made, ready = SeveringProxy(server), threading.Event()
    thread = threading.Thread(target=lambda: asyncio.run(made.run(database, ready)), name="severing")
    thread.start()
    assert ready.wait(PATIENCE_SECONDS)
    try:
        yield made
    finally:
        made.end()
        thread.join()
