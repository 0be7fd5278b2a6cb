"""The handler `storage` in Google Cloud Storage, with a server of what obstore needs."""

import asyncio
import hashlib
import json
import re
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import obstore
import pytest

from handlers.storage import Storage, StorageConfig
from handlers.storage.objects import ObjectStore
from handlers.storage.places import PlaceError
from receiver.handler import Done, Retry, SettledRun
from tests.support.media import MediaServer, page

ContextOf = Callable[..., Any]
BIG = bytes(range(256)) * 100_000
KEPT = ("content-type", "cache-control", "x-goog-meta-")


@dataclass
class Google:
    """One bucket named `bucket`: objects with their headers, and uploads in parts."""

    port: int = 0
    objects: dict[str, tuple[bytes, dict[str, str]]] = field(default_factory=dict)
    uploads: dict[str, tuple[str, dict[str, str], dict[int, bytes]]] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    refuses: bool = False

    def account(self) -> str:
        """Return a service account for this server, without a token."""
        place = {"gcs_base_url": f"http://127.0.0.1:{self.port}", "disable_oauth": True}
        return json.dumps({**place, "client_email": "", "private_key": "", "private_key_id": ""})

    def answer(
        self, method: str, target: str, headers: dict[str, str], body: bytes
    ) -> tuple[int, dict[str, str], bytes]:
        parts = urlsplit(target)
        _, bucket, *rest = parts.path.split("/", 2)
        key, query = unquote(rest[0]) if rest else "", parse_qs(parts.query, keep_blank_values=True)
        upload = query.get("uploadId", [""])[0]
        if self.refuses:
            return 403, {}, b"<Error><Code>AccessDenied</Code><Message>Access denied.</Message></Error>"
        if bucket != "bucket":
            return (
                404,
                {},
                b"<Error><Code>NoSuchBucket</Code><Message>The bucket does not exist.</Message></Error>",
            )
        match method:
            case "POST" if "uploads" in query:
                name = f"upload-{len(self.requests)}"
                self.uploads[name] = (key, _stored_headers(headers), {})
                return (
                    200,
                    {},
                    f"<InitiateMultipartUploadResult><UploadId>{name}</UploadId></InitiateMultipartUploadResult>".encode(),
                )
            case "PUT" if upload:
                self.uploads[upload][2][int(query["partNumber"][0])] = body
                return 200, {"ETag": '"part"'}, b""
            case "POST":
                name, kept, pieces = self.uploads.pop(upload)
                order = [int(number) for number in re.findall(rb"<PartNumber>(\d+)", body)]
                self.objects[name] = (b"".join(pieces[number] for number in order), kept)
                return (
                    200,
                    {},
                    b'<CompleteMultipartUploadResult><ETag>"whole"</ETag></CompleteMultipartUploadResult>',
                )
            case "PUT":
                self.objects[key] = (body, _stored_headers(headers))
                return 200, {"ETag": f'"{hashlib.md5(body, usedforsecurity=False).hexdigest()}"'}, b""
            case "DELETE":
                (self.uploads if upload else self.objects).pop(upload or key, None)
                return 204, {}, b""
            case _ if not key:
                return 200, {}, self._list_objects(query["prefix"][0])
            case _ if key not in self.objects:
                return 404, {}, b"<Error><Code>NoSuchKey</Code></Error>"
            case _:
                body, kept = self.objects[key]
                return 200, {"ETag": '"whole"', **kept}, body

    def _list_objects(self, prefix: str) -> bytes:
        rest = "<LastModified>2026-11-24T12:00:00Z</LastModified><ETag>e</ETag>"
        entry = f"<Contents><Key>{{}}</Key><Size>{{}}</Size>{rest}</Contents>"
        found = [
            entry.format(key, len(body))
            for key, (body, _) in self.objects.items()
            if key.startswith(prefix)
        ]
        return f"<ListBucketResult>{''.join(found)}</ListBucketResult>".encode()


def _stored_headers(headers: dict[str, str]) -> dict[str, str]:
    return {name: value for name, value in headers.items() if name.startswith(KEPT)}


@asynccontextmanager
async def serve_google() -> AsyncIterator[Google]:
    google = Google()

    async def handle_connection(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                first, *lines = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
                headers = {
                    name.lower(): value.strip()
                    for name, _, value in (line.partition(":") for line in lines)
                }
                method, target, _ = first.split(" ")
                google.requests.append(f"{method} {target}")
                body = await reader.readexactly(int(headers.get("content-length", 0)))
                status, more, said = google.answer(method, target, headers, body)
                head = {
                    "Content-Length": str(len(said)),
                    "Last-Modified": "Tue, 24 Nov 2026 12:00:00 GMT",
                    **more,
                }
                text = "\r\n".join(
                    [f"HTTP/1.1 {status} OK", *(f"{name}: {value}" for name, value in head.items())]
                )
                writer.write(text.encode() + b"\r\n\r\n" + (b"" if method == "HEAD" else said))
                await writer.drain()
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(handle_connection, "127.0.0.1", 0, limit=2**20)
    google.port = server.sockets[0].getsockname()[1]
    try:
        yield google
    finally:
        server.close()


@pytest.fixture
async def google() -> AsyncIterator[Google]:
    async with serve_google() as server:
        yield server


def storage(google: Google, url: str = "gs://bucket/pre", **more: Any) -> Storage:
    store = {"service_account_key": google.account(), "allow_http": True}
    return Storage(StorageConfig.model_validate({"url": url, "store": store, **more}))


async def test_a_run_becomes_labelled_objects(
    google: Google, run: SettledRun, media: MediaServer, context_of: ContextOf
) -> None:
    """Put, head, get and list; large objects in parts; repeated, nothing."""
    big = media.output("/big", page(BIG, "video/mp4"), position=1, output_id="big", kind="videoUrl")
    run = replace(run, outputs=(media.output("/a", page(b"small")), big))
    handler, context = storage(google, cache_control="no-cache"), context_of()
    await handler.check()
    assert not google.objects
    assert await handler.handle(run, context) == Done({"files": 2, "bytes": 5 + len(BIG)})
    body, labels = google.objects["pre/2026-11-24/run_1/out.png"]
    assert body == b"small"
    assert labels == {
        "content-type": "image/png",
        "cache-control": "no-cache",
        "x-goog-meta-run": "run_1",
        "x-goog-meta-output": "out",
        "x-goog-meta-technique": "tech_1",
        "x-goog-meta-sha256": hashlib.sha256(b"small").hexdigest(),
    }
    assert google.objects["pre/2026-11-24/run_1/big.mp4"][0] == BIG
    assert sum("partNumber=" in request for request in google.requests) == 4
    assert not google.uploads

    place = handler._place
    assert isinstance(place, ObjectStore)
    assert b"".join([chunk async for chunk in place.read("2026-11-24/run_1/big.mp4")]) == BIG
    listed = await obstore.list(place._store).collect_async()
    assert {each["path"].rpartition("/")[2] for each in listed} == {"out.png", "big.mp4", "run.json"}
    requests = len(media.requests)
    await handler.handle(run, context)
    assert (len(media.requests), context.stores) == (requests, 3)


async def test_a_source_that_fails_is_aborted(google: Google) -> None:
    """No object, and no invisible parts."""

    async def source() -> AsyncIterator[bytes]:
        for start in range(0, len(BIG), 500_000):
            yield BIG[start : start + 500_000]
        raise ConnectionResetError("mine")

    with pytest.raises(ConnectionResetError, match="mine"):
        await storage(google)._place.write("a", source(), content_type=None, expected=None)
    assert not google.objects
    assert not google.uploads


async def test_refusals_are_reported(
    google: Google, run: SettledRun, media: MediaServer, context_of: ContextOf
) -> None:
    """A missing bucket, and a service account without permission."""
    with pytest.raises(PlaceError, match=r"NoSuchBucket, .*does the bucket exist"):
        await storage(google, "gs://nowhere/pre").check()
    google.refuses = True
    with pytest.raises(PlaceError, match="cannot write to gs://bucket/pre: AccessDenied, Access denied"):
        await storage(google).check()
    run = replace(run, outputs=(media.output("/a", page(b"x")),))
    assert isinstance(await storage(google).handle(run, context_of()), Retry)
