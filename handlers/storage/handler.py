"""The handler `storage`: stores each output under its key, then a manifest beside them.

Every attempt may be repeated. An output that the ledger records as stored, and whose file still has
that size, is neither fetched nor written. A location is reserved in the ledger before anything is
written to it (see `writer`).
"""

import asyncio
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, ClassVar, Self
from urllib.parse import unquote, urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ByteSize,
    ConfigDict,
    Field,
    SecretStr,
    model_validator,
)

from handlers.storage.claims import Overwrite
from handlers.storage.disk import LocalDisk
from handlers.storage.keys import KeyTemplate, LabelTemplate
from handlers.storage.manifest import StoredOutput
from handlers.storage.places import Place, PlaceDegradedError, PlaceUnreachableError
from handlers.storage.thumbnails import require_pillow
from handlers.storage.writer import OWN_LABELS, OutputWriter
from receiver.handler import (
    Answer,
    Context,
    Done,
    Event,
    Output,
    Reject,
    Retry,
    Secret,
    SettledRun,
    TargetDegradedError,
    TargetUnreachableError,
    When,
)

_LABEL_NAME = re.compile("[a-z][a-z0-9_]{0,31}")  # what every cloud accepts
_DEFAULT_KEY = "{completed_at:%Y-%m-%d}/{run_id}/{output_id}{ext}"


def _check_key(text: str) -> str:
    KeyTemplate(text)
    return text


def _check_url(url: str) -> str:
    if _is_local(url):
        _directory(url)
    else:
        _check_bucket_url(url)
    return url


def _check_header(text: str | None) -> str | None:
    if text is not None and not (text.isascii() and text.isprintable() and text.strip()):
        raise ValueError("must be printable ASCII")
    return text


def _check_labels(labels: Mapping[str, str]) -> Mapping[str, str]:
    for name, text in labels.items():
        if not _LABEL_NAME.fullmatch(name) or name in OWN_LABELS:
            raise ValueError(
                f"{name!r} must be of a-z, 0-9 and _, and none of {', '.join(sorted(OWN_LABELS))}"
            )
        LabelTemplate(text)
    return labels


def _to_option_text(value: object) -> object:
    """Accept TOML's booleans and integers as options of a store, which obstore reads from text."""
    if isinstance(value, bool):
        return str(value).lower()
    return str(value) if isinstance(value, int) else value


class StorageConfig(BaseModel):
    """Where outputs are stored, and under which names."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, hide_input_in_errors=True
    )

    url: Annotated[str, Field(min_length=1), AfterValidator(_check_url)] = "outputs"
    """A directory, `file:///…`, or a bucket: `s3://bucket/prefix`, `gs://…`, `az://container/…`."""
    store: Mapping[str, Annotated[Secret, BeforeValidator(_to_option_text)]] = Field(default_factory=dict)
    """Options of the bucket, as obstore names them: `region`, `endpoint`, …; also as `env:NAME`."""
    key: Annotated[str, AfterValidator(_check_key)] = _DEFAULT_KEY
    """Template for the name of each output below `url`."""
    overwrite: Overwrite = Overwrite.SAME
    """Use of names at which another file exists: `never`, if it has the `same` bytes, `always`."""
    max_size: Annotated[ByteSize, Field(ge=1)] | None = None
    """Largest output, in bytes or as `500MB`; larger: rejected. Default: `downloads.max_bytes`."""
    manifest: bool = True
    """Whether to write `run.json`."""
    embed_metadata: bool = False
    """Whether `run.json` includes prompt and text inputs of runs that the receiver started."""
    thumbnails: bool = False
    """Whether to store a small WebP beside each image, `….thumb.webp` (extra `thumbnails`)."""
    cache_control: Annotated[str | None, AfterValidator(_check_header)] = None
    """`Cache-Control` of the objects in a bucket, such as `public, max-age=31536000, immutable`."""
    labels: Annotated[Mapping[str, str], Field(max_length=4), AfterValidator(_check_labels)] = Field(
        default_factory=dict
    )
    """Additional metadata of objects in a bucket: up to four names with templates like `key`."""
    outputs_at_once: Annotated[int, Field(ge=1, le=32)] = 4
    """How many outputs of a run are downloaded at the same time."""

    @model_validator(mode="after")
    def _check_place(self) -> Self:
        if self.embed_metadata and not self.manifest:
            raise ValueError("`embed_metadata` needs `manifest = true`")
        if self.labels and _is_local(self.url):
            raise ValueError("`labels` are for buckets only")
        open_place(self.url, self.store, self.cache_control)
        return self


class Storage:
    """Stores the outputs of completed runs, and updates the manifest when the cost is final."""

    Config: ClassVar[type[BaseModel]] = StorageConfig
    on: ClassVar[tuple[Event, ...]] = (Event.SETTLED, Event.COST_FINAL)
    when: ClassVar[When] = When(status=("completed",))

    def __init__(self, config: StorageConfig, *, place: Place | None = None) -> None:
        """MissingExtraError if thumbnails are configured and Pillow is not installed."""
        self._config = config
        self._template = KeyTemplate(config.key)
        self._labels = {name: LabelTemplate(text) for name, text in config.labels.items()}
        self._place = place or open_place(config.url, config.store, config.cache_control)
        self._thumbnail_slot = asyncio.Semaphore(1)  # decoding takes memory: one image at a time
        if config.thumbnails:
            require_pillow()

    async def handle(self, run: SettledRun, context: Context) -> Answer:
        config = self._config
        writer = OutputWriter(
            self._place,
            self._template,
            run,
            context,
            overwrite=config.overwrite,
            max_size=config.max_size,
            include_prompts=config.embed_metadata,
            labels=self._labels,
        )
        slots = asyncio.Semaphore(config.outputs_at_once)

        async def store(output: Output) -> StoredOutput | Retry | Reject:
            async with slots:
                return await writer.write_output(output)

        by_size = sorted(run.outputs, key=lambda output: output.likely_bytes)  # small ones first
        async with (
            asyncio.TaskGroup() as group
        ):  # if cancelled, it waits until every download has cleaned up
            tasks = {output.position: group.create_task(store(output)) for output in by_size}
        results = [tasks[output.position].result() for output in run.outputs]
        stored = [result for result in results if isinstance(result, StoredOutput)]
        if len(stored) < len(results):
            return _combine(results)
        if config.thumbnails:
            for each in stored:
                async with self._thumbnail_slot:
                    await writer.write_thumbnail(each)
        failure = await writer.write_manifest(stored) if config.manifest else None
        return failure or Done({"files": len(stored), "bytes": sum(each.size for each in stored)})

    async def check(self) -> None:
        try:
            await self._place.check()
        except PlaceUnreachableError as error:
            raise TargetUnreachableError(str(error)) from error
        except PlaceDegradedError as error:
            raise TargetDegradedError(str(error)) from error

    async def close(self) -> None:
        await self._place.close()


def open_place(url: str, store: Mapping[str, SecretStr], cache_control: str | None = None) -> Place:
    """Open the place of a URL. ValueError if the URL or its options are wrong."""
    if _is_local(url):
        if store or cache_control:
            raise ValueError("`store` and `cache_control` are for buckets only")
        return LocalDisk(_directory(url))
    from handlers.storage.clouds import open_store  # slow to import
    from handlers.storage.objects import ObjectStore  # slow to import

    return ObjectStore(url, open_store(url, store), cache_control=cache_control)


def _is_local(url: str) -> bool:
    return "://" not in url or url.startswith("file:")


def _directory(url: str) -> Path:
    if "\0" in unquote(url):
        raise ValueError("must not contain a NUL character")
    if "://" not in url and not url.startswith("file:"):
        try:
            return Path(url).expanduser()
        except RuntimeError:
            raise ValueError(f"{url!r} starts with the home of a user that does not exist") from None
    parts = urlsplit(url)
    if (
        parts.netloc not in {"", "localhost"}
        or not parts.path.startswith("/")
        or parts.query
        or parts.fragment
    ):
        raise ValueError(f"{url!r} must be file:///absolute/path")
    return Path(unquote(parts.path))


def _check_bucket_url(url: str) -> None:
    """Refuse credentials, queries and `..`, which would be in the location of every file."""
    parts = urlsplit(url)
    if parts.password is not None or (parts.username is not None and not parts.scheme.startswith("abfs")):
        raise ValueError("must not contain credentials: set them in `store`")
    if parts.query or parts.fragment:
        raise ValueError("must not contain `?` or `#`: set options in `store`")
    if {".", ".."} & set(parts.path.split("/")):
        raise ValueError("must not contain `.` or `..` as a directory")


def _combine(results: Sequence[StoredOutput | Retry | Reject]) -> Answer:
    """Return the result for the whole run: Retry as long as any output may still be stored."""
    rejected = [result.reason for result in results if isinstance(result, Reject)]
    retries = [result for result in results if isinstance(result, Retry)]
    reason = "; ".join([*rejected, *(result.reason for result in retries)])
    if not retries:
        return Reject(reason)
    pauses = [result.after_seconds for result in retries if result.after_seconds is not None]
    return Retry(reason, max(pauses, default=None), reread=any(result.reread for result in retries))
