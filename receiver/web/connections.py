"""What the two HTTP parsers share: how requests that are not HTTP are refused, and who is the peer.

uvicorn refuses them in plain text. Here they get the form that all refusals have.
"""

import asyncio
import json
import socket
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

MALFORMED = "malformed_request"
"""The code of the refusal. Its status is 400, and the connection is closed after it."""
UNIX_PEER = ("unix", 0)
"""The client of a connection on a Unix socket, in place of host and port."""
_STATUS_LINE = b"HTTP/1.1 400 Bad Request\r\n"


def malformed_body(message: str) -> bytes:
    """Return the body of the refusal."""
    return json.dumps({"error": {"code": MALFORMED, "message": message}}, separators=(",", ":")).encode()


def malformed_response(message: str, headers: list[tuple[bytes, bytes]]) -> bytes:
    """Return the whole refusal, with the headers that every response has."""
    body = malformed_body(message)
    fields = [*headers, (b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    head = b"".join(b"%s: %s\r\n" % field for field in (*fields, (b"connection", b"close")))
    return _STATUS_LINE + head + b"\r\n" + body


def is_unix(transport: asyncio.BaseTransport) -> bool:
    """Return whether a connection came over a Unix socket."""
    connection = transport.get_extra_info("socket")
    return connection is not None and connection.family == socket.AF_UNIX


class H11Connection(H11Protocol):
    """One connection that h11 parses: without limits of its own, for development and as a fallback."""

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        if self.client is None and is_unix(transport):
            self.client = UNIX_PEER

    def _unsupported_upgrade_warning(self) -> None:
        pass  # the offer of another protocol is ignored, and uvicorn's advice does not apply

    def send_400_response(self, msg: str) -> None:
        """Refuse what is not HTTP, unless a response has begun: then the connection is cut."""
        if self.conn.our_state not in {h11.IDLE, h11.SEND_RESPONSE}:
            self.transport.abort()
            return
        body = malformed_body("this is not valid HTTP/1.1")
        length = b"%d" % len(body)
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", length),
            (b"connection", b"close"),
        ]
        headers = [*self.server_state.default_headers, *headers]
        response = h11.Response(status_code=400, headers=headers, reason=b"Bad Request")
        for event in (response, h11.Data(data=body), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()
