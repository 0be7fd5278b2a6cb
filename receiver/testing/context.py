"""A context as the dispatcher gives it, held in memory: what a handler reserved, stored and logged can be looked at."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from receiver.handler import Artifact, Event, LocationTakenError, Output
from receiver.net.download import Download, Downloader, Saved, save
from receiver.testing.runs import SETTLED_AT


@dataclass
class Lines:
    """A logger that keeps its lines as (level, event, values)."""

    lines: list[tuple[str, str, dict[str, Any]]] = field(default_factory=list)

    def debug(self, event: str, **values: Any) -> None:
        self.lines.append(("debug", event, values))

    def info(self, event: str, **values: Any) -> None:
        self.lines.append(("info", event, values))

    def warning(self, event: str, **values: Any) -> None:
        self.lines.append(("warning", event, values))

    def error(self, event: str, **values: Any) -> None:
        self.lines.append(("error", event, values))


@dataclass
class MemoryContext:
    """One run's context; `places` (location -> run_id, position) is shared between the runs of a test."""

    run_id: str
    downloader: Downloader
    places: dict[str, tuple[str, int]] = field(default_factory=dict)
    records: dict[int, Artifact] = field(default_factory=dict)
    stores: int = 0
    """How often something was recorded as stored."""
    log: Lines = field(default_factory=Lines)
    event: Event = Event.SETTLED
    attempt: int = 1
    max_attempts: int = 5
    deadline_at: datetime = SETTLED_AT + timedelta(minutes=15)
    handler: str = "test"
    others: tuple[Artifact, ...] = ()
    """What other handlers have stored of this run."""
    asked: Mapping[str, Any] | None = None
    """What FLORA was asked for; None: the run was not started here."""

    @property
    def idempotency_key(self) -> str:
        return f"{self.run_id}:{self.handler}:{self.event}:0"

    @property
    def artifacts(self) -> Sequence[Artifact]:
        return tuple(self.records.values())

    def open(self, output: Output) -> AbstractAsyncContextManager[Download]:
        return self.downloader.open(output)

    async def save(self, output: Output, path: Path) -> Saved:
        async with self.open(output) as download:
            return await save(download, path)

    async def stored(self) -> Sequence[Artifact]:
        found = [*self.others, *self.records.values()]
        return sorted((each for each in found if each.stored_at is not None), key=lambda each: each.position)

    async def request(self) -> Mapping[str, Any] | None:
        return self.asked

    async def reserve(self, position: int, output_id: str, location: str) -> None:
        if self.places.setdefault(location, (self.run_id, position)) != (self.run_id, position):
            raise LocationTakenError(f"{location} is taken by another run")
        known = self.records.get(position)
        if known is not None and known.location == location:
            return
        if known is not None:
            del self.places[known.location]
        self.records[position] = Artifact(
            run_id=self.run_id,
            handler=self.handler,
            position=position,
            output_id=output_id,
            location=location,
            size=None,
            sha256=None,
            content_type=None,
            stored_at=None,
        )

    async def store_artifact(self, position: int, *, size: int, sha256: str, content_type: str | None) -> None:
        self.stores += 1
        self.records[position] = replace(
            self.records[position], size=size, sha256=sha256, content_type=content_type, stored_at=SETTLED_AT
        )
