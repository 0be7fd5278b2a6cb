"""The handler `storage` in S3: moto, bad links, wrong credentials, stores that lie."""

import asyncio
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace
from typing import Any
from urllib.parse import unquote

import obstore
import pytest

import handlers.storage.clouds
import handlers.storage.objects
from handlers.storage import Storage, StorageConfig
from handlers.storage.objects import PART_BYTES, ObjectStore
from handlers.storage.places import PlaceDegradedError, PlaceError, PlaceUnreachableError
from receiver.handler import (
    THUMBNAIL,
    Done,
    Output,
    Reject,
    Retry,
    SettledRun,
    TargetDegradedError,
    TargetUnreachableError,
)
from tests.handlers.test_storage_thumbnails import picture
from tests.support.clouds import SECRET, Bucket, link, moto, scripted_store
from tests.support.media import MediaServer, Page, page
from tests.support.patience import PATIENCE_SECONDS

ContextOf = Callable[..., Any]
BIG = bytes(range(256)) * 100_000


@pytest.fixture(scope="module")
def server() -> Iterator[Bucket]:
    with moto() as bucket:
        yield bucket


@pytest.fixture
async def bucket(server: Bucket) -> Bucket:
    """An empty bucket."""
    await server.reset()
    return server


@pytest.fixture(autouse=True)
def _no_clouds_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.startswith(("AWS_", "GOOGLE_", "AZURE_")):
            monkeypatch.delenv(name)


def storage(
    bucket: Bucket, url: str = "s3://bucket/pre", *, options: dict[str, Any] | None = None, **more: Any
) -> Storage:
    return Storage(StorageConfig.model_validate({"url": url, "store": options or bucket.options(), **more}))


async def chunks(body: bytes, size: int = 500_000) -> AsyncIterator[bytes]:
    for start in range(0, len(body), size):
        yield body[start : start + size]


async def read_object(bucket: Bucket, key: str) -> tuple[bytes, dict[str, str], str]:
    """Return an object's content, its attributes and its ETag."""
    found = await obstore.get_async(bucket.place()._store, key)
    return (
        bytes(await found.bytes_async()),
        {str(name): text for name, text in found.attributes.items()},
        str(found.meta["e_tag"]),
    )


async def write_checked(place: ObjectStore, key: str, body: bytes) -> None:
    stored = await place.write(key, chunks(body), content_type=None, expected=None)
    assert (stored.size, stored.sha256) == (len(body), hashlib.sha256(body).hexdigest())


async def test_a_run_becomes_labelled_objects(
    bucket: Bucket, run: SettledRun, media: MediaServer, context_of: ContextOf
) -> None:
    """Objects have type, cache control and metadata; repeated, nothing is fetched or written."""
    body = picture()
    big = media.output("/big", page(BIG, "video/mp4"), position=1, output_id="Größe 1", kind="videoUrl")
    run = replace(
        run,
        technique_id="tech ü",
        metadata={"market": "a/b?"},
        outputs=(media.output("/a", page(body)), big),
    )
    labels = {
        "team": "studio",
        "market": "{metadata[market]}: {position:02d}{ext}",
        "missing": "{metadata[none]}",
    }
    handler = storage(bucket, cache_control="public, max-age=60", thumbnails=True, labels=labels)
    await handler.check()
    context = context_of()
    assert await handler.handle(run, context) == Done({"files": 2, "bytes": len(body) + len(BIG)})

    image, labels, _ = await read_object(bucket, "2026-11-24/run_1/out.png")
    assert image == body
    assert labels == {
        "Content-Type": "image/png",
        "Cache-Control": "public, max-age=60",
        "run": "run_1",
        "output": "out",
        "technique": "tech %C3%BC",
        "team": "studio",
        "market": "a/b%3F: 00.png",
        "sha256": hashlib.sha256(body).hexdigest(),
    }
    video, labels, etag = await read_object(bucket, "2026-11-24/run_1/Größe 1.mp4")
    assert video == BIG
    assert labels["output"] == "Gr%C3%B6%C3%9Fe 1"
    assert etag.endswith('-4"')
    assert context.records[1].location == "s3://bucket/pre/2026-11-24/run_1/Größe 1.mp4"
    assert context.records[THUMBNAIL].location.endswith("/out.png.thumb.webp")
    manifest = json.loads((await read_object(bucket, "2026-11-24/run_1/run.json"))[0])
    assert [each["size"] for each in manifest["outputs"]] == [len(body), len(BIG)]

    requests, stores = len(media.requests), context.stores
    assert isinstance(await handler.handle(run, context), Done)
    assert (len(media.requests), context.stores) == (requests, stores)
    listed = await bucket.get("?list-type=2")
    assert listed.text.count("<Key>") == 4  # the check has left nothing


@pytest.mark.parametrize("size", [0, 1, PART_BYTES - 1, PART_BYTES, PART_BYTES + 1, 2 * PART_BYTES + 1])
async def test_sizes_around_a_part(bucket: Bucket, size: int) -> None:
    """One request up to a part, parts beyond: the bytes and the ETag are as expected."""
    place, body = bucket.place(), (BIG * 2)[:size]
    await write_checked(place, "a b/Größe#1?.bin", body)
    assert place._etag_may_be_md5
    assert b"".join([chunk async for chunk in place.read("a b/Größe#1?.bin")]) == body
    assert await place.size("a b/Größe#1?.bin") == size
    assert await place.size("nothing") is None
    assert [chunk async for chunk in place.read("nothing")] == []


async def test_a_file_that_is_not_the_runs_own(
    bucket: Bucket, run: SettledRun, media: MediaServer, context_of: ContextOf
) -> None:
    """An object of another run is compared by its bytes, and left as it is."""
    place, key = bucket.place(), "2026-11-24/run_1/out.png"
    run = replace(run, outputs=(media.output("/a", page(BIG)),))
    await write_checked(place, key, BIG)
    assert isinstance(await storage(bucket, overwrite="never").handle(run, context_of()), Reject)
    assert isinstance(await storage(bucket).handle(run, context_of("run_1")), Done)
    await write_checked(place, key, BIG[::-1])
    context = context_of()
    assert isinstance(await storage(bucket).handle(run, context), Reject)
    assert (await read_object(bucket, key))[0] == BIG[::-1]
    assert isinstance(await storage(bucket, overwrite="always").handle(run, context), Done)


async def test_what_fails_on_the_way_leaves_nothing(
    bucket: Bucket, run: SettledRun, media: MediaServer, context_of: ContextOf
) -> None:
    """A download cut during the upload: its own reason, no object, no open upload."""
    cut = Page(page(BIG).raw[:-1000])
    run = replace(run, outputs=(media.output("/secret", cut),))
    answer = await storage(bucket).handle(run, context_of())
    assert isinstance(answer, Retry)
    assert answer.reason.startswith("output 0 (out): 127.0.0.1: cut")
    expired = await storage(bucket).handle(
        replace(run, outputs=(media.output("/secret", page(b"", status="410 Gone")),)), context_of()
    )
    assert isinstance(expired, Retry)
    assert expired.reread
    large = await storage(bucket, max_size=len(BIG) - 1).handle(
        replace(run, outputs=(media.output("/secret", page(BIG)),)), context_of()
    )
    assert isinstance(large, Reject)
    assert await bucket.open_uploads() == 0
    assert "<Key>" not in (await bucket.get("?list-type=2")).text


async def test_a_crash_between_object_and_record_changes_nothing(
    bucket: Bucket, run: SettledRun, media: MediaServer, context_of: ContextOf
) -> None:
    """The location is reserved: the next attempt writes there, even with `never`."""
    run, context = replace(run, outputs=(media.output("/a", page(b"small")),)), context_of()
    record = context.store_artifact

    async def dies(*args: Any, **fields: Any) -> None:
        raise RuntimeError("killed")

    context.store_artifact = dies
    handler = storage(bucket, overwrite="never", manifest=False)
    assert isinstance(await handler.handle(run, context), Retry)
    assert context.records[0].stored_at is None
    context.store_artifact = record
    assert isinstance(await handler.handle(run, context), Done)
    assert (await read_object(bucket, "2026-11-24/run_1/out.png"))[0] == b"small"
    assert (await bucket.get("?list-type=2")).text.count("<Key>") == 1


async def test_a_cancelled_upload_is_aborted(bucket: Bucket) -> None:
    """Invisible parts would be billed: they are removed before the cancellation goes on."""
    begun, never = asyncio.Event(), asyncio.Event()

    async def endless() -> AsyncIterator[bytes]:
        try:
            async for chunk in chunks(BIG):
                yield chunk
            begun.set()
            await never.wait()
        finally:
            begun.clear()

    task = asyncio.create_task(bucket.place().write("a", endless(), content_type=None, expected=None))
    await begun.wait()
    while not await bucket.open_uploads():  # noqa: ASYNC110  # moto has no event to wait for
        await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not begun.is_set()
    assert await bucket.open_uploads() == 0
    assert await bucket.place().size("a") is None


async def test_connections_that_break_in_the_middle(bucket: Bucket) -> None:
    """Every other connection is cut within a part, which is sent again."""
    async with link(bucket.endpoint, cuts=lambda number: 3_000_000 if number % 2 == 0 else None) as bad:
        await write_checked(Bucket(bad.endpoint).place(), "a", BIG)
        assert bad.broken >= 1
    assert (await read_object(bucket, "a"))[0] == BIG
    assert await bucket.open_uploads() == 0


async def test_a_link_that_never_lasts(
    bucket: Bucket,
    run: SettledRun,
    media: MediaServer,
    context_of: ContextOf,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It fails after a few tries, with a clear reason; the next attempt works."""
    monkeypatch.setitem(handlers.storage.clouds._RETRIES, "max_retries", 1)
    run, context = replace(run, outputs=(media.output("/a", page(BIG)),)), context_of()
    async with link(bucket.endpoint, cuts=lambda _: 3_000_000) as bad:
        answer = await storage(Bucket(bad.endpoint)).handle(run, context)
    assert isinstance(answer, Retry)
    assert "cannot write to s3://bucket/pre: no response from its endpoint" in answer.reason
    assert isinstance(await storage(bucket).handle(run, context), Done)
    assert (await read_object(bucket, "2026-11-24/run_1/out.png"))[0] == BIG


async def test_a_slow_link(bucket: Bucket) -> None:
    """A slow link is not an error."""
    async with link(bucket.endpoint, bytes_per_second=20_000_000) as slow:
        await write_checked(Bucket(slow.endpoint).place(), "a", BIG)
    assert (await read_object(bucket, "a"))[0] == BIG


async def test_targets_that_do_not_answer(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    """A silent, closed or failing server may recover: the check only warns."""
    monkeypatch.setattr(handlers.storage.objects, "CHECK_SECONDS", 0.3)
    async with link(bucket.endpoint, silent=True) as silent:
        with pytest.raises(TargetUnreachableError, match="did not respond within"):
            await storage(Bucket(silent.endpoint)).check()
    monkeypatch.setattr(handlers.storage.objects, "CHECK_SECONDS", 8.0)
    monkeypatch.setitem(handlers.storage.clouds._RETRIES, "max_retries", 0)
    with pytest.raises(TargetUnreachableError, match="no response from its endpoint"):
        await storage(Bucket("http://127.0.0.1:1")).check()
    async with scripted_store(
        PUT=(503, {}, b"<Error><Code>SlowDown</Code><Message>Please wait</Message></Error>")
    ) as busy:
        with pytest.raises(TargetUnreachableError, match=r"responded with 503 \(SlowDown, Please wait\)"):
            await storage(Bucket(busy.endpoint)).check()


async def test_a_bucket_that_does_not_exist(bucket: Bucket, run: SettledRun, context_of: ContextOf) -> None:
    """The check and the reason of a run both say it."""
    handler = storage(bucket, "s3://nobucket/pre")
    with pytest.raises(PlaceError, match=r"s3://nobucket/pre: NoSuchBucket, .*; does the bucket exist\?"):
        await handler.check()
    run = replace(run, outputs=(Output(position=0, output_id="a", type="text", value="x"),))
    answer = await handler.handle(run, context_of())
    assert isinstance(answer, Retry)
    assert "NoSuchBucket" in answer.reason


async def test_wrong_credentials(bucket: Bucket, run: SettledRun, context_of: ContextOf) -> None:
    """Reported as such, never shown, and not retried for minutes."""
    run = replace(run, outputs=(Output(position=0, output_id="a", type="text", value="x"),))
    await bucket.let_in_nobody()
    try:
        with pytest.raises(
            PlaceError, match=r"InvalidAccessKeyId, .*check credentials and permissions"
        ) as caught:
            await storage(bucket).check()
        answer = await storage(bucket).handle(run, context_of())
    finally:
        await bucket.let_in_everybody()
    assert not isinstance(caught.value, PlaceUnreachableError)
    assert isinstance(answer, Retry)
    for said in (answer.reason, str(caught.value), repr(storage(bucket)._config)):
        assert SECRET not in said


OK: tuple[int, dict[str, str], bytes] = (200, {"ETag": '"x"'}, b"probe")
MISSING: tuple[int, dict[str, str], bytes] = (404, {}, b"")
DENIED: tuple[int, dict[str, str], bytes] = (403, {}, b"<Error><Code>AccessDenied</Code></Error>")


@pytest.mark.parametrize(
    ("answers", "what"),
    [
        ({"PUT": DENIED}, "cannot write to s3://bucket/pre: AccessDenied"),
        ({"PUT": OK, "GET": DENIED}, "can write to, but not read from, s3://bucket/pre: AccessDenied"),
        (
            {"PUT": OK, "GET": OK, "HEAD": DENIED},
            "can write to, but not look up missing objects in, s3://bucket/pre: refused",
        ),
    ],
)
async def test_the_check_names_the_right_that_is_missing(answers: dict[str, Any], what: str) -> None:
    """Write, read and look-up are tried apart; S3 responds 403 to a HEAD without list permission."""
    async with scripted_store(**answers) as store:
        with pytest.raises(PlaceError) as caught:
            await Bucket(store.endpoint).place().check()
    assert str(caught.value).startswith(what)
    assert not isinstance(caught.value, PlaceDegradedError)


async def test_a_store_that_refuses_bulk_delete() -> None:
    """Some S3-compatible stores answer `POST ?delete` with 400: the object of the check is deleted singly."""
    refusal: tuple[int, dict[str, str], bytes] = (400, {}, b"<Error><Code>NotImplemented</Code></Error>")
    async with scripted_store(PUT=OK, GET=OK, HEAD=MISSING, DELETE=(204, {}, b""), POST=refusal) as store:
        await storage(Bucket(store.endpoint)).check()
    assert [request.partition(" ")[0] for request in store.requests] == ["PUT", "GET", "HEAD", "DELETE"]


@pytest.mark.parametrize("refusal", [DENIED, (400, {}, b""), (501, {}, b"")])
async def test_what_a_check_leaves_is_one_object_of_which_it_warns(refusal: Any) -> None:
    """Outputs are never deleted, so a bucket without that permission is no error; each check uses one name."""
    async with scripted_store(PUT=OK, GET=OK, HEAD=MISSING, DELETE=refusal) as store:
        for _ in range(2):
            with pytest.raises(TargetDegradedError, match="can write to, but not delete from") as caught:
                await storage(Bucket(store.endpoint)).check()
            assert "s3://bucket/pre/.receiver-check is left there" in str(caught.value)
    written = {request.split()[1] for request in store.requests if request.startswith("PUT")}
    assert written == {"/bucket/pre/.receiver-check"}


async def test_checks_at_the_same_time_do_not_disturb_each_other(bucket: Bucket) -> None:
    """Replicas start together and use one name: each may delete what another is about to read."""
    await asyncio.gather(*(storage(bucket).check() for _ in range(8)))
    assert "receiver-check" not in (await bucket.get("?list-type=2")).text


async def test_what_a_store_holds_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrong size is an error; another ETag is checked once, and other bytes are an error."""
    body, md5 = b"hello", hashlib.md5(b"hello", usedforsecurity=False).hexdigest()
    sized = {"Content-Length": "5", "ETag": '"x"'}
    for etag, content, head, error in [
        (md5, b"hullo", sized, None),
        (md5, b"hello", {**sized, "Content-Length": "4"}, "holds 4 bytes of an object of 5"),
        ("0" * 32, b"hullo", sized, "holds other bytes than were sent"),
        ("0" * 32, b"hello", sized, None),
        ("opaque", b"hullo", sized, None),
    ]:
        async with scripted_store(
            PUT=(200, {"ETag": f'"{etag}"'}, b""),
            GET=(200, {"ETag": '"x"'}, content),
            HEAD=(200, head, b""),
        ) as store:
            place = Bucket(store.endpoint).place()
            if error:
                with pytest.raises(PlaceError, match=error):
                    await write_checked(place, "a", body)
                continue
            await write_checked(place, "a", body)
            await write_checked(place, "a", body)
            reads = sum(request.startswith("GET") for request in store.requests)
            assert reads == (1 if etag == "0" * 32 else 0)


async def test_what_came_in_parts_is_compared_too() -> None:
    """The ETag of an upload in parts is checked likewise."""
    body = BIG[: PART_BYTES + 5]
    parts = [
        hashlib.md5(part, usedforsecurity=False).digest() for part in (body[:PART_BYTES], body[PART_BYTES:])
    ]
    etag = f"{hashlib.md5(b''.join(parts), usedforsecurity=False).hexdigest()}-2"
    for shown, content, error in [
        (etag, b"never read", None),
        (etag.replace("-2", "-3"), body, None),
        (etag.replace("-2", "-3"), body[::-1], "holds other bytes than were sent"),
    ]:
        xml = f'<R><UploadId>u</UploadId><ETag>"{shown}"</ETag></R>'.encode()
        async with scripted_store(
            POST=(200, {}, xml),
            PUT=(200, {"ETag": '"part"'}, b""),
            GET=(200, {"ETag": '"x"'}, content),
            HEAD=(200, {"Content-Length": str(len(body)), "ETag": '"x"'}, b""),
        ) as store:
            place = Bucket(store.endpoint).place()
            if error:
                with pytest.raises(PlaceError, match=error):
                    await write_checked(place, "a", body)
            else:
                await write_checked(place, "a", body)
            assert any(request.startswith("GET") for request in store.requests) == (shown != etag)


@pytest.mark.parametrize("name", ["ä" * 60, "aä" * 60, "aaä" * 60, "x" * 300, "日" * 1000, "😀" * 90])
async def test_labels_end_with_a_whole_character(bucket: Bucket, name: str) -> None:
    """A label is cut if too long, between characters."""
    await bucket.place().write(
        "a", chunks(b"x"), content_type=None, expected=None, metadata={"output": name}
    )
    _, labels, _ = await read_object(bucket, "a")
    assert 240 < len(labels["output"]) <= 256
    assert name.startswith(unquote(labels["output"], errors="strict"))


async def test_the_usual_environment_works_and_options_override_it(
    bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`AWS_…` as for other programs; options in `store` take precedence."""
    names = {
        "ENDPOINT_URL": bucket.endpoint,
        "ACCESS_KEY_ID": "a",
        "SECRET_ACCESS_KEY": "b",
        "ALLOW_HTTP": "true",
    }
    for name, value in {**names, "REGION": "us-east-1"}.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    handler = Storage(StorageConfig(url="s3://bucket/env"))
    await handler.check()
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    await storage(bucket).check()


def test_secrets_come_from_where_secrets_come_from(tmp_path: Any) -> None:
    """Each option may point to the environment or to a file; none is shown."""
    file = tmp_path / "secret"
    file.write_text(f"{SECRET}\n")
    options = {
        "access_key_id": "env:KEY",
        "secret_access_key": f"file:{file}",
        "timeout": "5s",
        "aws_allow_http": True,
    }
    config = StorageConfig.model_validate(
        {"url": "s3://bucket", "store": options}, context={"environ": {"KEY": "AKIAEXAMPLE"}}
    )
    assert config.store["access_key_id"].get_secret_value() == "AKIAEXAMPLE"
    assert config.store["secret_access_key"].get_secret_value() == SECRET
    assert SECRET not in repr(config)
    assert "AKIAEXAMPLE" not in repr(config)


@pytest.mark.parametrize(
    ("url", "options", "says"),
    [
        ("s3://bucket", {"nonsense": "x"}, "unknown option 'nonsense'"),
        ("s3://bucket", {"virtual_hosted_style_request": "maybe"}, 'failed to parse "maybe" as boolean'),
        ("s3://bucket", {"timeout": "soon"}, 'failed to parse "soon" as Duration'),
        ("s3://bucket", {"access_key_id": SECRET}, "access_key_id without secret_access_key"),
        ("s3://bucket", {"endpoint": "http://127.0.0.1:9000"}, "allow it with allow_http = true"),
        ("s3://bucket", {"aws_bucket": "other"}, "it is part of the URL"),
        ("s3://bucket", {"secret_access_key": {"a": SECRET}}, "string"),
        ("gs://bucket", {"service_account_key": SECRET}, "service account"),
        ("az://container", {}, "account_name, or AZURE_STORAGE_ACCOUNT_NAME"),
        ("az://container", {"account_name": "a", "account_key": SECRET}, "Invalid Access Key"),
        ("memory:///x", {}, "use a directory, s3://, gs:// or az://"),
        ("outputs", {"region": "x"}, "are for buckets"),
    ],
)
def test_wrong_options_are_refused_at_once(url: str, options: dict[str, Any], says: str) -> None:
    """When the configuration is read, without the values."""
    with pytest.raises(ValueError, match="validation error") as caught:
        StorageConfig.model_validate({"url": url, "store": options})
    assert says in str(caught.value)
    assert SECRET not in str(caught.value)
    assert "Debug source" not in str(caught.value)


UPLOAD = """
import asyncio, sys
from pathlib import Path
from handlers.storage import StorageConfig, open_place

def peak():
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) // 1024

async def body(megabytes):
    for n in range(2 * megabytes):
        yield bytes([n % 256]) * (512 * 1024)

async def main():
    options = {"endpoint": sys.argv[1], "access_key_id": "a", "secret_access_key": "b", "allow_http": "true"}
    config = StorageConfig.model_validate({"url": "s3://bucket/pre", "store": options})
    place = open_place(config.url, config.store)
    await place.write("warm", body(17), content_type=None, expected=None)
    before = peak()
    stored = await place.write("large", body(200), content_type=None, expected=None)
    print(stored.size, stored.sha256, peak() - before)
    await place.close()

asyncio.run(main())
"""


def test_two_hundred_megabytes_take_little_memory(bucket: Bucket) -> None:
    """In parts, a few at a time: a large output takes as much as a small one."""
    printed = subprocess.run(
        [sys.executable, "-c", UPLOAD, bucket.endpoint],
        check=True,
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
    ).stdout
    size, sha256, growth = printed.split()
    digest = hashlib.sha256()
    for n in range(400):
        digest.update(bytes([n % 256]) * (512 * 1024))
    assert (int(size), sha256) == (200 * 1024 * 1024, digest.hexdigest())
    assert int(growth) <= 32


# --- URIs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "url", ["s3://bucket/pre fix", "s3://bucket/pre%20fix", "s3://bucket/grö", "s3://bucket"]
)
async def test_a_uri_names_the_object_as_other_tools_do(bucket: Bucket, url: str) -> None:
    """`s3://bucket/` and the object's name, nothing encoded, whatever is in it."""
    place, key = bucket.place(url), "a b/100% ü #1+%20.png"
    await write_checked(place, key, b"x")
    listed = (await bucket.get("?list-type=2")).text
    assert f"<Key>{place.locate(key).removeprefix('s3://bucket/')}</Key>" in listed
    assert place.key_of(place.locate(key)) == key
    assert place.key_of("s3://bucket-of-others/a") is None


def earlier(context: Any, location: str) -> None:
    """Let an artifact be where a version that encoded its URI has recorded it."""
    record = context.records[0]
    context.places[location] = context.places.pop(record.location)
    context.records[0] = replace(record, location=location)


async def test_what_an_earlier_version_stored_is_found(
    bucket: Bucket, run: SettledRun, media: MediaServer, context_of: ContextOf
) -> None:
    """Neither fetched nor written again; its URI becomes the one that other tools understand."""
    output = replace(media.output("/a", page(b"x")), output_id="a b")
    handler, context = storage(bucket, overwrite="never"), context_of()
    run = replace(run, outputs=(output,))
    assert isinstance(await handler.handle(run, context), Done)
    new = "s3://bucket/pre/2026-11-24/run_1/a b.png"
    assert context.records[0].location == new
    earlier(context, new.replace(" ", "%20"))
    assert isinstance(await handler.handle(run, context), Done)
    assert (context.records[0].location, context.records[0].size) == (new, 1)
    assert len(media.requests) == 1


@pytest.mark.parametrize("overwrite", ["same", "always"])
async def test_what_an_earlier_version_stored_for_another_run_stays(
    bucket: Bucket, run: SettledRun, media: MediaServer, context_of: ContextOf, overwrite: str
) -> None:
    """The ledger knows it by its earlier URI, and that counts."""
    handler = storage(bucket, overwrite=overwrite, key="{output_id}{ext}")
    output, other = replace(media.output("/a", page(b"x")), output_id="a b"), context_of("run_2")
    await handler.handle(replace(run, run_id="run_2", outputs=(output,)), other)
    earlier(other, "s3://bucket/pre/a%20b.png")
    media.pages["/a"] = page(b"y")
    answer = await handler.handle(replace(run, outputs=(output,)), context_of())
    assert isinstance(answer, Reject)
    assert (await read_object(bucket, "a b.png"))[0] == b"x"
