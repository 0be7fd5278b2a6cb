"""The handler `storage` on a disk: repeats, interruptions, failures."""

import asyncio
import errno
import fcntl
import hashlib
import json
import os
import stat
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from obstore.store import MemoryStore
from pydantic import ValidationError

from handlers.storage import Storage, StorageConfig, open_place
from handlers.storage.disk import LocalDisk
from handlers.storage.objects import ObjectStore
from handlers.storage.places import Place, PlaceError
from receiver.handler import (
    MANIFEST,
    Answer,
    Checks,
    Closes,
    Done,
    Event,
    Handler,
    Output,
    Reject,
    Retry,
    SettledRun,
)
from receiver.testing import Claim
from receiver.testing.stand import run_stand
from tests.handlers.test_storage_thumbnails import picture
from tests.support.media import MediaServer, Page, page

PNG = b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 40
CUT = Page(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nshort")
ContextOf = Callable[..., Any]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "deep" / "outputs"


def storage(root: Path, **settings: Any) -> Storage:
    return Storage(StorageConfig(url=str(root), **settings))


def text(position: int, value: str = "Grüße", output_id: str = "words") -> Output:
    return Output(position=position, output_id=output_id, type="text", value=value)


def files(root: Path) -> dict[str, bytes]:
    return {
        path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()
    }


def identities(root: Path, of: str = "*") -> dict[str, tuple[int, int]]:
    """Inode and time of every file and directory, or of those matching `of`."""
    return {str(path): (path.stat().st_ino, path.stat().st_mtime_ns) for path in root.rglob(of)}


def parts(root: Path) -> set[str]:
    return {path.parent.relative_to(root).as_posix() for path in root.rglob(".part-flora-*")}


def has_begun(root: Path) -> bool:
    return root.exists() and any(path.stat().st_size for path in root.rglob(".part-flora-*"))


def reason(answer: Answer) -> str:
    assert not isinstance(answer, Done)
    return answer.reason


async def test_a_run_becomes_files_records_and_a_manifest(
    root: Path, media: MediaServer, run: SettledRun, context_of: ContextOf
) -> None:
    """By default: a directory per day and run, a file per output, `run.json`, all recorded."""
    picture = media.output("/secret", page(PNG), output_id="hero")
    context = context_of()
    answer = await storage(root).handle(replace(run, outputs=(picture, text(1))), context)

    assert answer == Done({"files": 2, "bytes": len(PNG) + 7})
    stored = files(root)
    manifest = stored.pop("2026-11-24/run_1/run.json")
    assert stored == {"2026-11-24/run_1/hero.png": PNG, "2026-11-24/run_1/words.txt": "Grüße".encode()}

    image = context.records[0]
    assert image.location == (root / "2026-11-24/run_1/hero.png").as_uri()
    assert (image.size, image.sha256, image.content_type) == (
        len(PNG),
        hashlib.sha256(PNG).hexdigest(),
        "image/png",
    )
    assert context.records[MANIFEST].sha256 == hashlib.sha256(manifest).hexdigest()
    assert all(record.stored_at for record in context.records.values())

    content = json.loads(manifest)
    assert b"secret" not in manifest
    assert (content["run_id"], content["settled_by"], content["verdict"], content["charged_cost"]) == (
        "run_1",
        "callback",
        "matched",
        None,
    )
    assert [each["sha256"] for each in content["outputs"]] == [image.sha256, context.records[1].sha256]
    assert content["outputs"][0]["location"] == image.location


@pytest.mark.parametrize("place", ["{root}", "../outputs"])
async def test_running_again_writes_nothing(
    root: Path,
    media: MediaServer,
    run: SettledRun,
    context_of: ContextOf,
    monkeypatch: pytest.MonkeyPatch,
    place: str,
) -> None:
    """What is recorded and exists is not fetched, whatever the directory's spelling."""
    here = root.parent / "here"
    here.mkdir(parents=True)
    monkeypatch.chdir(here)
    run = replace(run, outputs=(media.output("/a", page(PNG)), text(1)))
    handler, context = storage(Path(place.format(root=root))), context_of()
    first = await handler.handle(run, context)
    before, requests, stores = identities(root), len(media.requests), context.stores
    assert await handler.handle(run, context) == first
    assert (identities(root), len(media.requests), context.stores) == (before, requests, stores)


async def test_a_crash_between_rename_and_record_changes_nothing(
    root: Path, media: MediaServer, run: SettledRun, context_of: ContextOf
) -> None:
    """Files that are not recorded are fetched to compare, and left as they are."""
    run = replace(run, outputs=(media.output("/a", page(PNG)), text(1)))
    await storage(root).handle(run, context_of())
    before = identities(root, of="*.*")
    context = context_of()  # reserved by the same run, nothing on record
    assert isinstance(await storage(root).handle(run, context), Done)
    assert identities(root, of="*.*") == before
    assert context.stores == 3


@pytest.mark.parametrize("damage", [b"", PNG + b"more", None])
async def test_what_is_gone_or_damaged_is_stored_again(
    root: Path, media: MediaServer, run: SettledRun, context_of: ContextOf, damage: bytes | None
) -> None:
    """A record counts only if a file of that size exists."""
    run = replace(run, outputs=(media.output("/a", page(PNG)),))
    context = context_of()
    await storage(root).handle(run, context)
    path = root / "2026-11-24/run_1/out.png"
    if damage is None:
        path.unlink()
    else:
        path.write_bytes(damage)
    assert isinstance(await storage(root).handle(run, context), Done)
    assert path.read_bytes() == PNG


async def test_the_cost_brings_the_manifest_up_to_date(
    root: Path, media: MediaServer, run: SettledRun, context_of: ContextOf
) -> None:
    """With the final cost, only the manifest is replaced."""
    run = replace(run, outputs=(media.output("/a", page(PNG)),))
    handler, context = storage(root), context_of()
    assert handler.on == (Event.SETTLED, Event.COST_FINAL)
    await handler.handle(run, context)
    picture = root / "2026-11-24/run_1/out.png"
    before = picture.stat()
    await handler.handle(replace(run, charged_cost=0.25), context)
    assert picture.stat() == before
    body = (root / "2026-11-24/run_1/run.json").read_bytes()
    assert json.loads(body)["charged_cost"] == 0.25
    assert context.records[MANIFEST].sha256 == hashlib.sha256(body).hexdigest()
    assert len(media.requests) == 1


@pytest.mark.parametrize(
    ("start_request", "included"),
    [
        (
            {
                "inputs": [
                    {"id": "prompt", "type": "text", "value": "ein Leuchtturm"},
                    {"id": "style", "type": "imageUrl", "value": "https://media.test/secret"},
                ],
                "mode": "async",
            },
            {
                "inputs": [
                    {"id": "prompt", "type": "text", "value": "ein Leuchtturm"},
                    {"id": "style", "type": "imageUrl", "value": None},
                ]
            },
        ),
        (
            {
                "type": "image",
                "prompt": "a fox",
                "model": "m1",
                "params": {"image": "https://media.test/secret"},
            },
            {"prompt": "a fox", "model": "m1"},
        ),
        ({"type": "text", "prompt": "a fox", "inputs": "none"}, {"prompt": "a fox", "model": None}),
        ({"inputs": ["odd"]}, {"inputs": []}),
        (None, {}),
    ],
)
async def test_the_manifest_includes_the_prompt_if_configured(
    root: Path,
    run: SettledRun,
    context_of: ContextOf,
    start_request: dict[str, Any] | None,
    included: dict[str, Any],
) -> None:
    """Only texts, since media URLs are secrets; nothing of a run that was started elsewhere."""
    run = replace(run, outputs=(text(0),))
    path, names = root / "2026-11-24/run_1/run.json", ("inputs", "prompt", "model")
    context = context_of(asked=start_request)
    assert isinstance(await storage(root).handle(run, context), Done)
    assert not set(names) & json.loads(path.read_bytes()).keys()
    assert isinstance(await storage(root, embed_metadata=True).handle(run, context), Done)
    content = json.loads(path.read_bytes())
    assert {name: content[name] for name in names if name in content} == included
    assert (content["technique_id"], content["run_id"]) == ("tech_1", "run_1")
    assert b"secret" not in path.read_bytes()


async def test_the_manifest_of_a_run_started_here_has_its_prompt(root: Path, tmp_path: Path) -> None:
    """From the API to the file, without the token that links the callback to its start."""
    handler = {
        "use": "storage",
        "options": {"url": str(root), "embed_metadata": True, "key": "{output_id}{ext}"},
    }
    async with run_stand(tmp_path, [handler]) as stand:
        started = await stand.run("emu-text")
    manifest = files(root)[f"{started.run_id}.run.json"]
    assert json.loads(manifest)["inputs"] == [{"id": "prompt", "type": "text", "value": "a lighthouse"}]
    assert b"start=" not in manifest


async def test_equal_ids_become_different_files(
    root: Path, media: MediaServer, run: SettledRun, context_of: ContextOf
) -> None:
    """Output ids may repeat within a run."""
    outputs = tuple(media.output(f"/{n}", page(PNG + bytes([n])), position=n) for n in range(6))
    assert isinstance(
        await storage(root, manifest=False).handle(replace(run, outputs=outputs), context_of()), Done
    )
    directory = "2026-11-24/run_1"
    names = ["out.png", *(f"out-{n}.png" for n in range(1, 6))]
    assert files(root) == {f"{directory}/{name}": PNG + bytes([n]) for n, name in enumerate(names)}


async def test_hostile_names_stay_inside(root: Path, run: SettledRun, context_of: ContextOf) -> None:
    """An id or metadata with a path in it names one file below the root."""
    run = replace(
        run,
        run_id="run_/../../x",
        metadata={"m": "../../../etc"},
        outputs=(text(0, output_id="../../evil\0"),),
    )
    assert isinstance(
        await storage(root, key="{metadata[m]}/{run_id}/{output_id}{ext}").handle(run, context_of()), Done
    )
    assert len(files(root)) == 2
    assert [path.name for path in root.parent.iterdir()] == ["outputs"]


async def test_a_run_without_outputs_is_its_manifest(
    root: Path, run: SettledRun, context_of: ContextOf
) -> None:
    """If failed runs are configured, they have a manifest."""
    run = replace(run, status="failed", error_code="model_timeout", error_message="too slow")
    assert await storage(root).handle(run, context_of()) == Done({"files": 0, "bytes": 0})
    content = json.loads(files(root)["2026-11-24/run_1/run.json"])
    assert content["error"] == {"code": "model_timeout", "message": "too slow"}


async def test_another_runs_place_is_never_written_to(
    root: Path, run: SettledRun, context_of: ContextOf
) -> None:
    """Of two runs with one key, the second is rejected with a fix; the first keeps its file."""
    handler = storage(root, key="{output_id}{ext}", manifest=False)
    assert isinstance(
        await handler.handle(replace(run, outputs=(text(0, "first"),)), context_of("run_1")), Done
    )
    second = replace(run, run_id="run_2", outputs=(text(0, "second"), text(1, "fine", "other")))
    answer = await handler.handle(second, context_of("run_2"))
    assert isinstance(answer, Reject)
    assert "key template" in answer.reason
    assert "{run_id}" in answer.reason
    assert files(root) == {"words.txt": b"first", "other.txt": b"fine"}


@pytest.mark.parametrize(
    ("answer", "kind", "why"),
    [
        (page(b"", status="404 Not Found"), Retry, "404"),
        (page(b"", status="500 Oops"), Retry, "500"),
        (CUT, Retry, "cut"),
        (page(b"x", "image/png", "Content-Encoding: compress"), Retry, "coding compress"),
        (Page(b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999999\r\n\r\n"), Reject, "larger"),
    ],
)
async def test_one_failure_does_not_stop_the_others(
    root: Path,
    media: MediaServer,
    run: SettledRun,
    context_of: ContextOf,
    answer: Page,
    kind: type[Answer],
    why: str,
) -> None:
    """The others are stored, no manifest claims more, and the reason says what failed."""
    outputs = (
        media.output("/secret", answer),
        media.output("/good", page(PNG), position=1, output_id="good"),
        text(2),
    )
    context = context_of()
    result = await storage(root, outputs_at_once=1).handle(replace(run, outputs=outputs), context)
    assert isinstance(result, kind)
    assert reason(result).startswith("output 0 (out): ")
    assert why in reason(result)
    assert "secret" not in reason(result)
    assert set(files(root)) == {"2026-11-24/run_1/good.png", "2026-11-24/run_1/words.txt"}
    assert {position for position, record in context.records.items() if record.stored_at} == {1, 2}


async def test_what_is_likely_small_is_safe_first(
    root: Path, media: MediaServer, run: SettledRun, context_of: ContextOf
) -> None:
    """Text, images, sound, film, in any order of the run, which the manifest keeps."""
    kinds = ("videoUrl", "audioUrl", "imageUrl", "documentUrl", "text", "somethingNewUrl")
    outputs = tuple(
        text(n)
        if kind == "text"
        else media.output(f"/{kind}", page(PNG), position=n, output_id=kind, kind=kind)
        for n, kind in enumerate(kinds)
    )
    context = context_of()
    assert isinstance(
        await storage(root, outputs_at_once=1).handle(replace(run, outputs=outputs), context), Done
    )
    assert [kinds[n] for n in list(context.records) if n != MANIFEST] == [
        "text", "imageUrl", "documentUrl", "audioUrl", "videoUrl", "somethingNewUrl",
    ]  # fmt: skip
    described = json.loads((root / "2026-11-24/run_1/run.json").read_bytes())
    assert [each["type"] for each in described["outputs"]] == list(kinds)


@pytest.mark.parametrize(
    ("overwrite", "there", "kind"),
    [
        ("never", PNG, Reject),
        ("never", b"other", Reject),
        ("same", PNG, Done),
        ("same", b"other", Reject),
        ("same", bytes(len(PNG)), Reject),
        ("always", b"other", Done),
    ],
)
async def test_a_file_that_is_not_the_runs_own(
    root: Path,
    media: MediaServer,
    run: SettledRun,
    context_of: ContextOf,
    overwrite: str,
    there: bytes,
    kind: type,
) -> None:
    """`overwrite` decides; a refusal names the file and leaves nothing reserved."""
    path = root / "2026-11-24/run_1/out.png"
    path.parent.mkdir(parents=True)
    path.write_bytes(there)
    run, context = replace(run, outputs=(media.output("/a", page(PNG)),)), context_of()
    before = path.stat()
    handler = storage(root, overwrite=overwrite)
    answer = await handler.handle(run, context)
    assert isinstance(answer, kind)
    assert await handler.handle(run, context) == answer  # a refusal does not become a licence
    if isinstance(answer, Reject):
        assert "another file exists at" in answer.reason
        assert 0 not in context.records
    else:
        assert path.read_bytes() == PNG
        assert context.records[0].sha256 == hashlib.sha256(PNG).hexdigest()
    if overwrite != "always":
        assert path.stat() == before


@pytest.mark.parametrize(
    ("claim", "there", "kind"),
    [
        (Claim.PENDING, False, Retry),
        (Claim.VOID, False, Done),
        (Claim.STORED, False, Done),
        (Claim.STORED, True, Reject),
    ],
)
async def test_a_place_of_another_run(
    root: Path, run: SettledRun, context_of: ContextOf, claim: Claim, there: bool, kind: type
) -> None:
    """It is waited for while the other run may still store there; then what lies there decides, whatever was claimed."""
    handler = storage(root, key="{technique_id}/{output_id}{ext}", overwrite="always")
    run, other = replace(run, outputs=(text(0),)), context_of("run_2")
    place = handler._place.locate("tech_1/words.txt")
    await other.reserve(0, "words", place)
    if there:
        (root / "tech_1").mkdir(parents=True)
        (root / "tech_1/words.txt").write_bytes(b"of run_2")
    answer = await handler.handle(run, context_of(claims={"run_2": claim}))
    assert isinstance(answer, kind)
    if kind is Retry:
        assert "is taken by another run, which has stored nothing there yet" in reason(answer)
    elif kind is Reject:
        assert "make the key template" in reason(answer)
        assert files(root)["tech_1/words.txt"] == b"of run_2"
    else:
        assert files(root)["tech_1/words.txt"] == "Grüße".encode()


@pytest.mark.parametrize(
    "stated", ["binary/octet-stream", "image/jpeg, image/jpeg", "image/png", "text/html"]
)
async def test_the_first_bytes_decide_what_an_output_is(
    root: Path, media: MediaServer, run: SettledRun, context_of: ContextOf, stated: str
) -> None:
    """Extension, stored type and thumbnail follow them; what the server said is in the manifest, also later on."""
    run = replace(run, outputs=(media.output("/a", page(picture("JPEG"), stated)),), charged_cost=None)
    handler, context = storage(root, thumbnails=True), context_of()
    for cost in (None, 0.5):
        assert isinstance(await handler.handle(replace(run, charged_cost=cost), context), Done)
        assert set(files(root)) == {
            f"2026-11-24/run_1/{name}" for name in ("out.jpg", "out.jpg.thumb.webp", "run.json")
        }
        manifest = json.loads(files(root)["2026-11-24/run_1/run.json"])
        (described,) = manifest["outputs"]
        assert manifest["charged_cost"] == cost
        assert described["stated_content_type"] == stated
        assert described["content_type"] == context.records[0].content_type == "image/jpeg"
    assert len(media.requests) == 1


async def test_a_page_in_place_of_an_image_is_not_stored(
    root: Path, media: MediaServer, run: SettledRun, context_of: ContextOf
) -> None:
    """It is retried, after the run was read again, and the last attempt's reason says what came."""
    run = replace(run, outputs=(media.output("/a", page(b"<!doctype html><title>Oops", "image/png")),))
    context = context_of()
    answer = await storage(root).handle(run, context)
    assert isinstance(answer, Retry)
    assert answer.reread
    assert "answered with an HTML page in place of an image" in answer.reason
    assert (files(root), context.records) == ({}, {})


async def test_two_receivers_may_share_a_directory(
    root: Path, media: MediaServer, run: SettledRun, context_of: ContextOf
) -> None:
    """Separate ledgers, the same runs at the same time: each file is whole."""
    outputs = (
        media.output("/a", page(PNG * 200)),
        *(text(n, "x" * n * 1000, f"words-{n}") for n in range(1, 5)),
    )
    runs = [replace(run, run_id=f"run_{n}", outputs=outputs) for n in range(8)]

    async def receiver(verdict: str) -> list[Answer]:
        handler = storage(root, key="{technique_id}/{run_id}-{output_id}{ext}")
        attempts = [(replace(each, verdict=verdict), context_of(each.run_id, places={})) for each in runs]
        return await asyncio.gather(*(handler.handle(*each) for each in attempts))

    answers = await asyncio.gather(receiver("matched"), receiver("recovered"), receiver("late"))
    assert all(isinstance(answer, Done) for each in answers for answer in each)
    stored = files(root)
    assert len(stored) == len(runs) * (len(outputs) + 1)
    for each in runs:
        assert stored[f"tech_1/{each.run_id}-out.png"] == PNG * 200
        assert json.loads(stored[f"tech_1/{each.run_id}.run.json"])["run_id"] == each.run_id


@pytest.mark.parametrize("overwrite", ["never", "same", "always"])
async def test_a_link_in_the_place_of_a_file(
    root: Path, tmp_path: Path, run: SettledRun, context_of: ContextOf, overwrite: str
) -> None:
    """Nothing is written through it; `always` replaces the link itself."""
    victim, place = tmp_path / "victim", root / "2026-11-24/run_1/words.txt"
    victim.write_bytes(b"precious")
    place.parent.mkdir(parents=True)
    place.symlink_to(victim)
    answer = await storage(root, overwrite=overwrite).handle(replace(run, outputs=(text(0),)), context_of())
    assert isinstance(answer, Done if overwrite == "always" else Reject)
    assert place.is_symlink() == (overwrite != "always")
    assert place.read_bytes() == (b"precious" if overwrite != "always" else "Grüße".encode())
    assert victim.read_bytes() == b"precious"


async def test_what_was_moved_elsewhere_and_linked_is_still_there(
    root: Path, tmp_path: Path, media: MediaServer, run: SettledRun, context_of: ContextOf
) -> None:
    """Operators free space so; nothing is fetched again, and new files follow."""
    run = replace(run, outputs=(media.output("/a", page(PNG)),))
    handler, context = storage(root), context_of()
    await handler.handle(run, context)
    (root / "2026-11-24/run_1").rename(tmp_path / "cold")
    (root / "2026-11-24/run_1").symlink_to(tmp_path / "cold")
    (tmp_path / "cold/out.png").rename(tmp_path / "colder.png")
    (tmp_path / "cold/out.png").symlink_to(tmp_path / "colder.png")
    assert isinstance(await handler.handle(replace(run, charged_cost=0.25), context), Done)
    assert len(media.requests) == 1
    assert json.loads((tmp_path / "cold/run.json").read_bytes())["charged_cost"] == 0.25
    assert (tmp_path / "cold/out.png").is_symlink()


async def test_what_is_no_file_is_in_the_way(root: Path, run: SettledRun, context_of: ContextOf) -> None:
    """A directory is not read or replaced, a pipe does not block, a dead link is nothing."""
    directory = root / "2026-11-24/run_1"
    (directory / "a.txt").mkdir(parents=True)
    os.mkfifo(directory / "b.txt")
    (directory / "c.txt").symlink_to(root / "nowhere")
    outputs = tuple(text(n, output_id=name) for n, name in enumerate("abc"))
    answer = await storage(root).handle(replace(run, outputs=outputs), context_of())
    assert isinstance(answer, Retry)
    assert answer.reason == f"output 0 (a): cannot write to {root}: Is a directory"
    assert set(files(directory)) == {"b.txt", "c.txt"}


async def test_only_a_manifest_of_the_same_run_is_renewed(
    root: Path, run: SettledRun, context_of: ContextOf
) -> None:
    """After the loss of a ledger, files are used as they are; `run.json` must be of the run."""
    run = replace(run, outputs=(text(0),))
    await storage(root).handle(run, context_of())
    later = replace(run, verdict="recovered")
    assert isinstance(await storage(root).handle(later, context_of("run_1")), Done)
    file = root / "2026-11-24/run_1/run.json"
    assert json.loads(file.read_bytes())["verdict"] == "recovered"
    for foreign in (b"{}", b"[]", b"not JSON"):
        file.write_bytes(foreign)
        answer = await storage(root).handle(run, context_of())
        assert isinstance(answer, Reject)
        assert answer.reason.startswith("manifest: ")
        assert file.read_bytes() == foreign


async def test_an_own_place_is_written_again_whatever_lies_there(
    root: Path, media: MediaServer, run: SettledRun, context_of: ContextOf
) -> None:
    """Reserved in an earlier attempt: `never` concerns files of others."""
    run, context = replace(run, outputs=(media.output("/a", page(PNG)),)), context_of()
    handler = storage(root, overwrite="never")
    await handler.handle(run, context)
    context.records = {n: replace(each, stored_at=None, sha256=None) for n, each in context.records.items()}
    (root / "2026-11-24/run_1/out.png").write_bytes(b"half")
    assert isinstance(await handler.handle(run, context), Done)
    assert files(root)["2026-11-24/run_1/out.png"] == PNG


@pytest.mark.parametrize("announced", [True, False])
async def test_outputs_beyond_max_size_are_given_up(
    root: Path, media: MediaServer, run: SettledRun, context_of: ContextOf, announced: bool
) -> None:
    """By its announced or actual length; the others are stored, and the limit itself passes."""
    big = b"x" * 1001
    chunked = Page(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3e9\r\n%s\r\n0\r\n\r\n" % big)
    outputs = (media.output("/a", page(big) if announced else chunked), text(1, "x" * 1000))
    answer = await storage(root, max_size="1KB").handle(replace(run, outputs=outputs), context_of())
    assert answer == Reject("output 0 (out): larger than max_size, 1000 bytes")
    assert set(files(root)) == {"2026-11-24/run_1/words.txt"}


async def test_an_expired_url_has_the_run_read_again(
    root: Path, media: MediaServer, run: SettledRun, context_of: ContextOf
) -> None:
    """What is stored stays; only what is missing is fetched, by the new URL."""
    gone = media.output("/gone", page(b"", status="403 Forbidden"))
    good = media.output("/good", page(PNG), position=1, output_id="good")
    handler, context = storage(root), context_of()
    answer = await handler.handle(replace(run, outputs=(gone, good)), context)
    assert isinstance(answer, Retry)
    assert answer.reread
    fresh = (media.output("/fresh", page(PNG)), replace(good, value=media.url("/never-asked")))
    assert isinstance(await handler.handle(replace(run, outputs=fresh), context), Done)
    assert [head.split(" ")[1] for head in media.requests] == ["/gone", "/good", "/fresh"]
    other = await handler.handle(replace(run, outputs=(media.output("/c", CUT, output_id="x"),)), context)
    assert isinstance(other, Retry)
    assert not other.reread


async def test_a_busy_media_host_says_when_to_come_back(
    root: Path, media: MediaServer, run: SettledRun, context_of: ContextOf
) -> None:
    """The longest pause that a host asks for holds for the run."""
    busy = page(b"", "text/plain", "Retry-After: 90", status="503 Busy")
    slow = page(
        b"",
        "text/plain",
        "Retry-After: Tue, 24 Nov 2026 12:05:00 GMT",
        "Date: Tue, 24 Nov 2026 12:00:00 GMT",
    )
    outputs = (
        media.output("/busy", busy),
        media.output("/slow", Page(slow.raw.replace(b"200 OK", b"429 Slow")), position=1, output_id="b"),
        media.output("/cut", CUT, position=2, output_id="c"),
    )
    answer = await storage(root).handle(replace(run, outputs=outputs), context_of())
    assert isinstance(answer, Retry)
    assert answer.after_seconds == 300


async def test_another_output_at_the_same_position_is_fetched(
    root: Path, media: MediaServer, run: SettledRun, context_of: ContextOf
) -> None:
    """A run that is read again may have its outputs in another order."""
    first, second = (
        media.output("/a", page(PNG), output_id="a"),
        media.output("/b", page(b"b"), output_id="b"),
    )
    handler, context = storage(root), context_of()
    await handler.handle(replace(run, outputs=(first, replace(second, position=1))), context)
    swapped = (second, replace(first, position=1))
    assert isinstance(await handler.handle(replace(run, outputs=swapped), context), Done)
    assert [context.records[n].size for n in (0, 1)] == [1, len(PNG)]


async def test_what_may_still_come_is_tried_again(
    root: Path, run: SettledRun, context_of: ContextOf
) -> None:
    """One output that never works does not give up one that may."""
    never = Output(position=0, output_id="never", type="imageUrl", value="https://127.0.0.1/a")
    later = Output(position=1, output_id="later", type="imageUrl", value="https://name.invalid/a")
    answer = await storage(root).handle(replace(run, outputs=(later, never)), context_of())
    assert isinstance(answer, Retry)
    assert "never" in answer.reason
    assert "later" in answer.reason


async def test_unexpected_errors_are_a_reason_to_retry(
    root: Path, run: SettledRun, context_of: ContextOf
) -> None:
    """A database that fails while recording does not stop the other outputs."""
    context = context_of()

    async def away(*args: Any, **fields: Any) -> None:
        raise RuntimeError("the database is away")

    context.store_artifact = away
    answer = await storage(root).handle(replace(run, outputs=(text(0), text(1, output_id="b"))), context)
    assert isinstance(answer, Retry)
    assert answer.reason.count("RuntimeError: the database is away") == 2


async def test_cancellation_leaves_no_part_behind(
    root: Path, media: MediaServer, run: SettledRun, context_of: ContextOf
) -> None:
    """A cancelled download removes its temporary file first."""
    head = b"HTTP/1.1 200 OK\r\nContent-Length: 9000000\r\n\r\n"
    outputs = tuple(
        media.output(f"/{n}", Page(head + b"x" * 3_000_000, hold=True), position=n) for n in range(3)
    )
    task = asyncio.create_task(storage(root).handle(replace(run, outputs=outputs), context_of()))
    await media.held.wait()
    while not has_begun(root):  # noqa: ASYNC110  # the disk has no event to wait for
        await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert files(root) == {}


async def test_a_cut_download_leaves_no_part_behind(
    root: Path, media: MediaServer, run: SettledRun, context_of: ContextOf
) -> None:
    """Nor does one that the server ends early."""
    cut = Page(b"HTTP/1.1 200 OK\r\nContent-Length: 9000000\r\n\r\n" + b"x" * 3_000_000)
    assert isinstance(
        await storage(root).handle(replace(run, outputs=(media.output("/a", cut),)), context_of()), Retry
    )
    assert files(root) == {}


async def test_a_place_that_cannot_be_written_to(
    tmp_path: Path, run: SettledRun, context_of: ContextOf
) -> None:
    """A directory below a regular file: the check says so, and runs wait."""
    (tmp_path / "file").write_text("in the way")
    handler = storage(tmp_path / "file" / "outputs")
    with pytest.raises(PlaceError, match=r"cannot write to .*outputs: Not a directory"):
        await handler.check()
    answer = await handler.handle(replace(run, outputs=(text(0),)), context_of())
    assert isinstance(answer, Retry)
    assert "cannot write to" in answer.reason


async def test_a_full_disk_is_noticed_before_the_download(
    root: Path, media: MediaServer, run: SettledRun, context_of: ContextOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The announced length is compared with the free space."""
    statvfs = os.statvfs

    def tight(path: Any) -> os.statvfs_result:
        values = list(statvfs(path))
        values[4] = 2  # f_bavail
        return os.statvfs_result(values)

    monkeypatch.setattr(os, "statvfs", tight)
    outputs = (media.output("/a", page(b"x" * 100_000)),)
    answer = await storage(root).handle(replace(run, outputs=outputs), context_of())
    assert isinstance(answer, Retry)
    assert f"disk full at {root}: " in answer.reason
    assert answer.reason.endswith("MB free")
    assert files(root) == {}


async def test_a_disk_without_inodes(
    root: Path, run: SettledRun, context_of: ContextOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Free bytes, but no inodes: the megabytes alone would mislead."""
    statvfs = os.statvfs

    def none_left(path: Any) -> os.statvfs_result:
        values = list(statvfs(path))
        values[5:8] = [100, 0, 0]  # f_files, f_ffree, f_favail
        return os.statvfs_result(values)

    handler = storage(root)
    await handler.check()
    monkeypatch.setattr(os, "statvfs", none_left)
    monkeypatch.setattr(os, "write", full_after(0))
    answer = await handler.handle(replace(run, outputs=(text(0),)), context_of())
    assert reason(answer).endswith(f"disk full at {root}: no inodes left for another file")


async def test_a_disk_that_fills_up_on_the_way(
    root: Path, media: MediaServer, run: SettledRun, context_of: ContextOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ENOSPC within a file: nothing stays, the reason is clear, and the next attempt works."""
    write = os.write
    monkeypatch.setattr(os, "write", full_after(1_000_000))
    body = b"x" * 3_000_000
    run = replace(run, outputs=(media.output("/a", page(body)),))
    context = context_of()
    answer = await storage(root).handle(run, context)
    assert isinstance(answer, Retry)
    assert f"disk full at {root}: " in answer.reason
    assert files(root) == {}
    monkeypatch.setattr(os, "write", write)
    assert isinstance(await storage(root).handle(run, context), Done)
    assert files(root)["2026-11-24/run_1/out.png"] == body


def full_after(room: int) -> Callable[[int, memoryview], int]:
    """Write like a disk with `room` bytes left: first a part, then nothing."""
    original = os.write

    def write(fd: int, data: memoryview) -> int:
        nonlocal room
        written = original(fd, data[: min(room, 100_000)]) if room else 0
        room -= written
        if not written:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return written

    return write


@pytest.mark.parametrize("step", ["fsync", "replace"])
@pytest.mark.parametrize("code", [errno.EIO, errno.EACCES, errno.EROFS, errno.EDQUOT])
async def test_a_disk_that_fails_at_the_end(
    root: Path,
    media: MediaServer,
    run: SettledRun,
    context_of: ContextOf,
    monkeypatch: pytest.MonkeyPatch,
    step: str,
    code: int,
) -> None:
    """What could not be synced or renamed is not recorded, and the next attempt starts anew."""

    def fails(*args: Any) -> None:
        raise OSError(code, os.strerror(code))

    run, context = replace(run, outputs=(media.output("/a", page(PNG)),)), context_of()
    handler = storage(root)
    await handler.check()
    with monkeypatch.context() as patched:
        patched.setattr(os, step, fails)
        answer = await handler.handle(run, context)
    assert isinstance(answer, Retry)
    assert str(root) in answer.reason
    assert context.records[0].stored_at is None
    assert files(root) == {}
    assert isinstance(await handler.handle(run, context), Done)
    assert files(root)["2026-11-24/run_1/out.png"] == PNG


async def test_a_file_system_that_can_do_less(
    root: Path, media: MediaServer, run: SettledRun, context_of: ContextOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without locks, sync of directories and free space, files are still stored.

    Without locks it is not known what is still being written: unfinished files of others are removed
    after a day.
    """
    fsync, statvfs = os.fsync, os.statvfs

    def of_files(fd: int) -> None:
        if stat.S_ISDIR(os.fstat(fd).st_mode):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        fsync(fd)

    def fail_lock(*args: Any) -> None:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    monkeypatch.setattr(os, "fsync", of_files)
    monkeypatch.setattr(os, "statvfs", lambda path: os.statvfs_result([*statvfs(path)[:2], *[0] * 8]))
    monkeypatch.setattr(fcntl, "flock", fail_lock)
    directory = root / "2026-11-24/run_1"
    directory.mkdir(parents=True)
    for name in ("old", "young"):
        (directory / f".part-flora-{name}").write_bytes(b"x")
    os.utime(directory / ".part-flora-old", (0, 0))
    run = replace(run, outputs=(media.output("/a", page(PNG)),))
    handler = storage(root)
    await handler.check()
    assert isinstance(await handler.handle(run, context_of()), Done)
    assert set(files(directory)) == {"out.png", "run.json", ".part-flora-young"}


def test_the_check_sweeps_up_after_the_dead(root: Path) -> None:
    """Unfinished files without a lock are removed; locked ones and other files stay."""
    root.mkdir(parents=True)
    dead, living, other = root / ".part-flora-dead", root / ".part-flora-living", root / "old"
    for path in (dead, living, other):
        path.write_text("x")
    with living.open("rb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        asyncio.run(storage(root).check())
        assert set(root.iterdir()) == {living, other}


async def test_a_directory_is_swept_by_who_comes_to_write_there(
    root: Path, media: MediaServer, run: SettledRun, context_of: ContextOf
) -> None:
    """A killed process leaves its unfinished file beside the target: the retry removes it."""
    directory = root / "2026-11-24/run_1"
    directory.mkdir(parents=True)
    (directory / ".part-flora-dead").write_bytes(PNG[:100])
    run = replace(run, outputs=(media.output("/a", page(PNG)),))
    assert isinstance(await storage(root).handle(run, context_of()), Done)
    assert set(files(directory)) == {"out.png", "run.json"}


async def test_a_part_lies_where_its_file_will(
    root: Path, media: MediaServer, run: SettledRun, context_of: ContextOf
) -> None:
    """Directories may be other file systems: nothing is renamed across."""
    head = b"HTTP/1.1 200 OK\r\nContent-Length: 9000000\r\n\r\n"
    run = replace(run, outputs=(media.output("/a", Page(head + b"x" * 3_000_000, hold=True)),))
    task = asyncio.create_task(storage(root).handle(run, context_of()))
    while not has_begun(root):  # noqa: ASYNC110  # the disk has no event to wait for
        await asyncio.sleep(0)
    assert parts(root) == {"2026-11-24/run_1"}
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


@pytest.mark.parametrize(
    "settings",
    [
        {"key": "{nonsense}"},
        {"key": "../{run_id}"},
        {"url": ""},
        {"url": "file://host/a"},
        {"url": "file:relative"},
        {"url": "a\0b"},
        {"url": "file:///a%00b"},
        {"url": "~nobody-of-this-name/outputs"},
        {"url": "s3://key:secret@bucket/x"},
        {"url": "s3://key@bucket/x"},
        {"url": "s3://bucket/x?region=y"},
        {"url": "s3://bucket/x#y"},
        {"url": "s3://bucket/x/../y"},
        {"outputs_at_once": 0},
        {"unknown": 1},
        {"overwrite": "sometimes"},
        {"max_size": 0},
        {"embed_metadata": True, "manifest": False},
        {"cache_control": "no-cache\n"},
        {"store": {"region": "x"}},
        {"labels": {"team": "x"}},
        *(
            {"url": "s3://bucket", "labels": {name: "x"}}
            for name in ("run", "sha256", "Team", "content-type", "1", "")
        ),
        {"url": "s3://bucket", "labels": {"team": "{nonsense}"}},
        {"url": "s3://bucket", "labels": {f"n{n}": "x" for n in range(5)}},
        {"cache_control": "no-cache"},
        {"url": "memory:///x"},
        {"url": "https://example.com/x"},
        {"url": "s3://bucket", "store": {"nonsense": "x"}},
        {"url": "s3://bucket", "store": {"region": ["x"]}},
        {"url": "s3://bucket", "store": {"region": "env:NOT_SET"}},
    ],
)
def test_settings_that_cannot_be_used(settings: dict[str, Any]) -> None:
    """Wrong options are refused when the configuration is read."""
    with pytest.raises(ValidationError):
        StorageConfig(**settings)


def test_the_kind_of_place_follows_from_the_url(tmp_path: Path) -> None:
    """Plain paths and file URLs are local; obstore reads the rest."""
    assert open_place("outputs", {}).locate("a b/c#.png") == (Path.cwd() / "outputs/a b/c#.png").as_uri()
    assert open_place(f"{tmp_path.as_uri()}/x%20y", {}).locate("a") == (tmp_path / "x y/a").as_uri()
    assert open_place("s3://bucket/prefix/", {}).locate("a b/c.png") == "s3://bucket/prefix/a b/c.png"
    with pytest.raises(ValueError, match="not a place that can be written to"):
        open_place("nosuch://bucket", {})


def test_storage_is_a_handler_that_checks_and_closes(root: Path) -> None:
    """It has the methods that the service looks for."""
    handler = storage(root)
    assert isinstance(handler, Handler)
    assert isinstance(handler, Checks)
    assert isinstance(handler, Closes)


async def chunks(*parts: bytes) -> AsyncIterator[bytes]:
    for part in parts:
        yield part


@pytest.fixture(params=["disk", "objects"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    return (
        LocalDisk(tmp_path / "a b")
        if request.param == "disk"
        else ObjectStore("memory:///p", MemoryStore())
    )


async def test_places_give_back_what_was_put(place: Place) -> None:
    """Size and hash are of the bytes; keys and URIs match; writing again replaces."""
    await place.check()
    key = "2026/Größe #1?.bin"
    assert await place.size(key) is None
    for body in (b"x" * 20_000_000, b"short", b""):
        stored = await place.write(
            key, chunks(body[:9_000_000], body[9_000_000:]), content_type="a/b", expected=None
        )
        assert (stored.size, stored.sha256) == (len(body), hashlib.sha256(body).hexdigest())
        assert await place.size(key) == len(body)
    assert place.key_of(place.locate(key)) == key
    assert place.key_of("file:///elsewhere/x") is None
    assert place.key_of("s3://elsewhere/x") is None
    await place.close()


async def test_places_show_nothing_of_what_failed(place: Place) -> None:
    """An error of the source is raised, and there is no object."""

    async def broken() -> AsyncIterator[bytes]:
        yield b"x" * 9_000_000
        raise ConnectionResetError("mine")

    with pytest.raises((ConnectionResetError, PlaceError), match="mine"):
        await place.write("a/b", broken(), content_type=None, expected=None)
    assert await place.size("a/b") is None


async def test_storage_into_an_object_store(
    run: SettledRun, media: MediaServer, context_of: ContextOf
) -> None:
    """The same handler, another place."""
    place = ObjectStore("memory:///bucket", MemoryStore())
    handler = Storage(StorageConfig(), place=place)
    run, context = replace(run, outputs=(media.output("/a", page(PNG)), text(1))), context_of()
    assert await handler.handle(run, context) == Done({"files": 2, "bytes": len(PNG) + 7})
    assert context.records[0].location == "memory:///bucket/2026-11-24/run_1/out.png"
    assert await place.size("2026-11-24/run_1/run.json") == context.records[MANIFEST].size
    requests = len(media.requests)
    await handler.handle(run, context)
    assert (len(media.requests), context.stores) == (requests, 3)
