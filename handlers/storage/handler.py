"""The handler that stores outputs: each under its key, then a manifest beside them. Found by its entry point `storage`.

It may be told again of a run at any time: what the ledger has as stored, and what is still there in that size, is
neither fetched nor written; a place is reserved in the ledger before anything is written to it (see `keeping`).
"""

import asyncio
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, ClassVar, Self
from urllib.parse import unquote, urlsplit

from pydantic import AfterValidator, BaseModel, BeforeValidator, ByteSize, ConfigDict, Field, SecretStr, model_validator

from handlers.storage.disk import LocalDisk
from handlers.storage.keys import KeyTemplate, LabelTemplate
from handlers.storage.manifest import Kept
from handlers.storage.places import Place, PlaceUnreachableError
from handlers.storage.thumbnails import require_pillow
from handlers.storage.writer import OWN_LABELS, Keeper, Overwrite
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
    TargetUnreachableError,
    When,
)

_LABEL = re.compile("[a-z][a-z0-9_]{0,31}")  # what every cloud takes for a name
DEFAULT_KEY = "{completed_at:%Y-%m-%d}/{run_id}/{output_id}{ext}"


def _usable_key(text: str) -> str:
    KeyTemplate(text)
    return text


def _usable_url(url: str) -> str:
    if _is_local(url):
        _directory(url)
    else:
        _plain_bucket(url)
    return url


def _usable_header(text: str | None) -> str | None:
    if text is not None and not (text.isascii() and text.isprintable() and text.strip()):
        raise ValueError("must be printable ASCII, as a header is")
    return text


def _usable_labels(labels: Mapping[str, str]) -> Mapping[str, str]:
    for name, text in labels.items():
        if not _LABEL.fullmatch(name) or name in OWN_LABELS:
            raise ValueError(f"{name!r} must be a name of a-z, 0-9 and _, and none of {', '.join(sorted(OWN_LABELS))}")
        LabelTemplate(text)
    return labels


def _as_text(value: object) -> object:
    """Let options of a store be written as TOML writes them; obstore reads all of them from text."""
    if isinstance(value, bool):
        return str(value).lower()
    return str(value) if isinstance(value, int) else value


class StorageConfig(BaseModel):
    """Where outputs go, and under which names."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, hide_input_in_errors=True)

    url: Annotated[str, Field(min_length=1), AfterValidator(_usable_url)] = "outputs"
    """A directory, `file:///…`, or a bucket: `s3://bucket/prefix`, `gs://…`, `az://container/prefix`."""
    store: Mapping[str, Annotated[Secret, BeforeValidator(_as_text)]] = Field(default_factory=dict)
    """Options of the bucket by obstore's names, such as `region` and `endpoint`; each may be `env:NAME` or `file:/path`."""
    key: Annotated[str, AfterValidator(_usable_key)] = DEFAULT_KEY
    """The name of each output below `url`."""
    overwrite: Overwrite = Overwrite.SAME
    """For files already there that are not the run's own: `never` use one, use it if the bytes are the `same`, `always`."""
    max_size: Annotated[ByteSize, Field(ge=1)] | None = None
    """Largest output, in bytes or as in `500MB`; a larger one is given up. Default: only `downloads.max_bytes` holds."""
    manifest: bool = True
    """Whether to write `run.json`."""
    embed_metadata: bool = False
    """Whether `run.json` also holds the prompt, and other text inputs, of a run that was started here."""
    thumbnails: bool = False
    """Whether to put a small WebP beside each image, named as it with `.thumb.webp` added (extra `thumbnails`)."""
    cache_control: Annotated[str | None, AfterValidator(_usable_header)] = None
    """`Cache-Control` of the objects in a bucket, such as `public, max-age=31536000, immutable`."""
    labels: Annotated[Mapping[str, str], Field(max_length=4), AfterValidator(_usable_labels)] = Field(
        default_factory=dict
    )
    """Further metadata of the objects in a bucket: up to four names, and texts that may have the fields of `key`."""
    outputs_at_once: Annotated[int, Field(ge=1, le=32)] = 4
    """Outputs of one run that are fetched at the same time."""

    @model_validator(mode="after")
    def _can_be_used(self) -> Self:
        if self.embed_metadata and not self.manifest:
            raise ValueError("`embed_metadata` goes into `run.json`: it needs `manifest = true`")
        if self.labels and _is_local(self.url):
            raise ValueError("`labels` are for buckets; files have none")
        open_place(self.url, self.store, self.cache_control)
        return self


class Storage:
    """Stores the outputs of completed runs; told again when the cost is known, it brings the manifest up to date."""

    Config: ClassVar[type[BaseModel]] = StorageConfig
    on: ClassVar[tuple[Event, ...]] = (Event.SETTLED, Event.COST_FINAL)
    when: ClassVar[When] = When(status=("completed",))

    def __init__(self, config: StorageConfig, *, place: Place | None = None) -> None:
        """MissingExtraError where thumbnails are wanted and Pillow is not installed."""
        self._config = config
        self._template = KeyTemplate(config.key)
        self._labels = {name: LabelTemplate(text) for name, text in config.labels.items()}
        self._place = place or open_place(config.url, config.store, config.cache_control)
        self._easel = asyncio.Semaphore(1)  # one picture is decoded at a time, whatever that takes of memory
        if config.thumbnails:
            require_pillow()

    async def handle(self, run: SettledRun, context: Context) -> Answer:
        config = self._config
        keeper = Keeper(
            self._place,
            self._template,
            run,
            context,
            overwrite=config.overwrite,
            max_size=config.max_size,
            tell_prompts=config.embed_metadata,
            labels=self._labels,
        )
        gate = asyncio.Semaphore(config.outputs_at_once)

        async def guarded(output: Output) -> Kept | Retry | Reject:
            async with gate:
                return await keeper.keep(output)

        by_size = sorted(run.outputs, key=lambda output: output.likely_bytes)  # what is small is safe early
        async with asyncio.TaskGroup() as group:  # when it is cancelled, it waits until every download has cleaned up
            tasks = {output.position: group.create_task(guarded(output)) for output in by_size}
        outcomes = [tasks[output.position].result() for output in run.outputs]
        kept = [outcome for outcome in outcomes if isinstance(outcome, Kept)]
        if len(kept) < len(outcomes):
            return _worst(outcomes)
        if config.thumbnails:
            for each in kept:
                async with self._easel:
                    await keeper.show(each)
        trouble = await keeper.describe(kept) if config.manifest else None
        return trouble or Done({"files": len(kept), "bytes": sum(each.size for each in kept)})

    async def check(self) -> None:
        try:
            await self._place.check()
        except PlaceUnreachableError as exc:
            raise TargetUnreachableError(str(exc)) from exc

    async def close(self) -> None:
        await self._place.close()


def open_place(url: str, store: Mapping[str, SecretStr], cache_control: str | None = None) -> Place:
    """Choose the kind of place by its URL; ValueError where there is none, or its options are wrong."""
    if _is_local(url):
        if store or cache_control:
            raise ValueError("`store` and `cache_control` are for buckets; a directory has neither")
        return LocalDisk(_directory(url))
    from handlers.storage.clouds import open_store  # noqa: PLC0415 - only who uses a cloud waits for its library
    from handlers.storage.objects import ObjectStore  # noqa: PLC0415

    return ObjectStore(url, open_store(url, store), cache_control=cache_control)


def _is_local(url: str) -> bool:
    return "://" not in url or url.startswith("file:")


def _directory(url: str) -> Path:
    if "\0" in unquote(url):
        raise ValueError("must not hold a NUL: no directory is called so")
    if "://" not in url and not url.startswith("file:"):
        try:
            return Path(url).expanduser()
        except RuntimeError:
            raise ValueError(f"{url!r} begins with the home of a user who has none") from None
    parts = urlsplit(url)
    if parts.netloc not in {"", "localhost"} or not parts.path.startswith("/") or parts.query or parts.fragment:
        raise ValueError(f"{url!r} must be file:///absolute/path")
    return Path(unquote(parts.path))


def _plain_bucket(url: str) -> None:
    """Refuse what would go into the location of every file, and means nothing to a bucket: secrets, queries, `..`."""
    parts = urlsplit(url)
    if parts.password is not None or (parts.username is not None and not parts.scheme.startswith("abfs")):
        raise ValueError("must not hold credentials: they go into `store`")
    if parts.query or parts.fragment:
        raise ValueError("must not hold `?` or `#`: options go into `store`")
    if {".", ".."} & set(parts.path.split("/")):
        raise ValueError("must not hold `.` or `..` as a directory")


def _worst(outcomes: Sequence[Kept | Retry | Reject]) -> Answer:
    """Answer for the whole run: while an output may still be stored it is tried again, whatever became of the others."""
    rejected = [outcome.reason for outcome in outcomes if isinstance(outcome, Reject)]
    postponed = [outcome for outcome in outcomes if isinstance(outcome, Retry)]
    reason = "; ".join([*rejected, *(outcome.reason for outcome in postponed)])
    if not postponed:
        return Reject(reason)
    return Retry(reason, reread=any(outcome.reread for outcome in postponed))
