"""A context in memory, which records what a handler reserves, stores and logs."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from enum import StrEnum
from pathlib import Path
from typing import Any

from receiver.handler import Artifact, Event, LocationTakenError, Output
from receiver.net.download import Download, Downloader, Saved, save
from receiver.testing.runs import SETTLED_AT


@dataclass
class Lines:
    """A logger that keeps its lines."""

    lines: list[tuple[str, str, dict[str, Any]]] = field(default_factory=list)
    """The lines so far, each as (level, event, values)."""

    def debug(self, event: str, **values: Any) -> None:
        """Keep a line of level debug."""
        self.lines.append(("debug", event, values))

    def info(self, event: str, **values: Any) -> None:
        """Keep a line of level info."""
        self.lines.append(("info", event, values))

    def warning(self, event: str, **values: Any) -> None:
        """Keep a line of level warning."""
        self.lines.append(("warning", event, values))

    def error(self, event: str, **values: Any) -> None:
        """Keep a line of level error."""
        self.lines.append(("error", event, values))


class Claim(StrEnum):
    """What another run's claim to a location is worth."""

    STORED = "stored"
    """Something is stored there."""
    PENDING = "pending"
    """Nothing is stored there yet, and its handler is still at work."""
    VOID = "void"
    """Nothing was stored there, and its dispatches are over."""


@dataclass
class MemoryContext:
    """The context of one run; implements `receiver.handler.Context`."""

    run_id: str
    """The run that the context belongs to."""
    downloader: Downloader
    """Fetches the outputs."""
    places: dict[str, tuple[str, int]] = field(default_factory=dict)
    """The reserved locations with their (run_id, position); share it between the runs of a test."""
    records: dict[int, Artifact] = field(default_factory=dict)
    """The artifacts that the handler has reserved or stored, by position."""
    stores: int = 0
    """The number of calls of `store_artifact`."""
    log: Lines = field(default_factory=Lines)
    """Keeps the lines that the handler logs."""
    event: Event = Event.SETTLED
    """The event that the handler is called for."""
    attempt: int = 1
    """The number of the attempt, from 1."""
    max_attempts: int = 5
    """The number of attempts after which the dispatch is dead."""
    deadline_at: datetime = SETTLED_AT + timedelta(minutes=15)
    """When the attempt would be cancelled."""
    handler: str = "test"
    """The name of the handler."""
    others: tuple[Artifact, ...] = ()
    """The artifacts that other handlers have stored for the run."""
    asked: Mapping[str, Any] | None = None
    """The request that `request` returns; None for a run that was not started by the receiver."""
    claims: dict[str, Claim] = field(default_factory=dict)
    """What the claims in `places` are worth, by run: `STORED` unless it says otherwise."""

    @property
    def idempotency_key(self) -> str:
        """`run_id:handler:event:0`."""
        return f"{self.run_id}:{self.handler}:{self.event}:0"

    @property
    def artifacts(self) -> Sequence[Artifact]:
        """The artifacts that the handler has reserved or stored."""
        return tuple(self.records.values())

    def open(self, output: Output) -> AbstractAsyncContextManager[Download]:
        """Open an output as the service does."""
        return self.downloader.open(output)

    async def save(self, output: Output, path: Path) -> Saved:
        """Fetch an output into a new file."""
        async with self.open(output) as download:
            return await save(download, path)

    async def stored(self) -> Sequence[Artifact]:
        """Return the artifacts that are stored, those of `others` included, by position."""
        found = [*self.others, *self.records.values()]
        return sorted(
            (each for each in found if each.stored_at is not None), key=lambda each: each.position
        )

    async def request(self) -> Mapping[str, Any] | None:
        """Return `asked`."""
        return self.asked

    async def reserve(self, position: int, output_id: str, location: str, *, vacant: bool = False) -> None:
        """Claim a location. Raises LocationTakenError where another run or position holds it."""
        holder = self.places.get(location, (self.run_id, position))
        if holder != (self.run_id, position):
            claim = self.claims.get(holder[0], Claim.STORED)
            is_void = claim is Claim.VOID or (vacant and claim is Claim.STORED)
            if holder[0] == self.run_id or not is_void:
                raise LocationTakenError(
                    f"{location} is taken by another run", pending=claim is Claim.PENDING
                )
        self.places[location] = (self.run_id, position)
        known = self.records.get(position)
        if known is not None and known.location == location:
            return
        if known is not None:
            self.places.pop(known.location, None)
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

    async def store_artifact(
        self, position: int, *, size: int, sha256: str, content_type: str | None
    ) -> None:
        """Record that the artifact at `position` is stored."""
        self.stores += 1
        self.records[position] = replace(
            self.records[position],
            size=size,
            sha256=sha256,
            content_type=content_type,
            stored_at=SETTLED_AT,
        )
