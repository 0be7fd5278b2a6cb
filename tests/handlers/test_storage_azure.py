"""The handler `storage` in Azure Blob, with Microsoft's emulator Azurite from npm."""

import asyncio
import base64
import datetime as dt
import hashlib
import hmac
import json
import os
import shutil
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import obstore
import pytest

from handlers.storage import Storage, StorageConfig
from handlers.storage.objects import ObjectStore
from handlers.storage.places import PlaceError
from receiver.handler import Done, SettledRun
from tests.support.media import MediaServer, page

ContextOf = Callable[..., Any]
AZURITE = Path(__file__).parent / "azurite"
ACCOUNT = "receiver"
KEY = base64.b64encode(b"a key for tests, and for nothing else").decode()
BIG = bytes(range(256)) * 100_000


@pytest.fixture(scope="session")
def azurite(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Azurite's endpoint, with one container named `container`."""
    for program in ("node", "npm"):
        assert shutil.which(program), (
            f"{program} is missing: install nodejs and npm to check against Azurite"
        )
    folder = tmp_path_factory.mktemp("azurite")
    for name in ("package.json", "package-lock.json"):
        shutil.copy(AZURITE / name, folder)
    subprocess.run(
        ["npm", "ci", "--no-audit", "--no-fund", "--ignore-scripts", "--silent"], cwd=folder, check=True
    )
    command = [
        "node",
        "node_modules/azurite/dist/src/blob/main.js",
        "--blobPort",
        "0",
        "--location",
        "data",
    ]
    environment = {"PATH": os.environ["PATH"], "AZURITE_ACCOUNTS": f"{ACCOUNT}:{KEY}"}
    options = ["--skipApiVersionCheck", "--silent", "--disableTelemetry"]
    with subprocess.Popen(
        [*command, *options], cwd=folder, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        try:
            assert process.stdout is not None
            said = next(line for line in process.stdout if "listening on" in line or "listens on" in line)
            endpoint = f"http://{said.rpartition('http://')[2].strip()}/{ACCOUNT}"
            _make_container(endpoint)
            yield endpoint
        finally:
            process.kill()


def _make_container(endpoint: str) -> None:
    now = dt.datetime.now(dt.UTC).strftime("%a, %d %b %Y %H:%M:%S GMT")
    headers = {"x-ms-date": now, "x-ms-version": "2021-08-06"}
    named = "".join(f"{name}:{value}\n" for name, value in headers.items())
    text = "PUT" + "\n" * 12 + f"{named}/{ACCOUNT}/{ACCOUNT}/container\nrestype:container"
    signature = base64.b64encode(hmac.digest(base64.b64decode(KEY), text.encode(), "sha256")).decode()
    headers["Authorization"] = f"SharedKey {ACCOUNT}:{signature}"
    answer = httpx.put(f"{endpoint}/container?restype=container", headers=headers, trust_env=False)
    assert answer.status_code == 201, answer.text


def storage(endpoint: str, url: str = "az://container/pre", *, key: str = KEY, **more: Any) -> Storage:
    store = {"account_name": ACCOUNT, "account_key": key, "endpoint": endpoint, "allow_http": True}
    return Storage(StorageConfig.model_validate({"url": url, "store": store, **more}))


async def chunks(body: bytes) -> AsyncIterator[bytes]:
    for start in range(0, len(body), 500_000):
        yield body[start : start + 500_000]


async def test_a_run_becomes_labelled_blobs(
    azurite: str, run: SettledRun, media: MediaServer, context_of: ContextOf
) -> None:
    """One request for small objects, blocks for large ones; with metadata; repeated, nothing."""
    big = media.output("/big", page(BIG, "video/mp4"), position=1, output_id="Größe 1", kind="videoUrl")
    run = replace(run, outputs=(media.output("/a", page(b"small")), big))
    handler, context = storage(azurite, cache_control="no-cache"), context_of()
    await handler.check()
    assert await handler.handle(run, context) == Done({"files": 2, "bytes": 5 + len(BIG)})
    place = handler._place
    assert isinstance(place, ObjectStore)
    for key, body, labels in [
        (
            "out.png",
            b"small",
            {"Content-Type": "image/png", "output": "out", "sha256": hashlib.sha256(b"small").hexdigest()},
        ),
        ("Größe 1.mp4", BIG, {"Content-Type": "video/mp4", "output": "Gr%C3%B6%C3%9Fe 1"}),
    ]:
        found = await obstore.get_async(place._store, f"2026-11-24/run_1/{key}")
        assert bytes(await found.bytes_async()) == body
        expected = {"Cache-Control": "no-cache", "run": "run_1", "technique": "tech_1", **labels}
        assert {str(name): text for name, text in found.attributes.items()} == expected
    manifest = b"".join([chunk async for chunk in place.read("2026-11-24/run_1/run.json")])
    assert len(json.loads(manifest)["outputs"]) == 2
    requests = len(media.requests)
    await handler.handle(run, context)
    assert (len(media.requests), context.stores) == (requests, 3)


async def test_wrong_key_and_missing_container(azurite: str) -> None:
    """Each is named, and no key is shown."""
    wrong = base64.b64encode(b"another").decode()
    with pytest.raises(PlaceError, match="check credentials and permissions") as caught:
        await storage(azurite, key=wrong).check()
    assert wrong not in str(caught.value)
    with pytest.raises(PlaceError, match=r"ContainerNotFound.*does the bucket exist"):
        await storage(azurite, "az://nowhere/pre").check()


async def test_failures_and_cancellation_in_the_middle(azurite: str) -> None:
    """No blob exists after an upload that failed or was cancelled."""
    place, begun, never = storage(azurite)._place, asyncio.Event(), asyncio.Event()

    async def source(failure: Exception | None) -> AsyncIterator[bytes]:
        async for chunk in chunks(BIG):
            yield chunk
        begun.set()
        if failure is not None:
            raise failure
        await never.wait()

    with pytest.raises(ConnectionResetError, match="mine"):
        await place.write("a", source(ConnectionResetError("mine")), content_type=None, expected=None)
    begun.clear()
    task = asyncio.create_task(place.write("a", source(None), content_type=None, expected=None))
    await begun.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await place.size("a") is None
    stored = await place.write("a", chunks(BIG), content_type=None, expected=None)
    assert stored.sha256 == hashlib.sha256(BIG).hexdigest()
    assert await place.size("a") == len(BIG)
