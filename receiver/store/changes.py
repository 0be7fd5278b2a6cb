"""What just changed in the ledger, for whoever waits in this process: the API's `wait`, its event stream, the loops."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

_BACKLOG = 1000
"""Changes that a slow listener may lag behind before it misses some."""


@dataclass(frozen=True, slots=True)
class Change:
    """Something about one run was committed: `run` (its state), `dispatch` (a handler's work) or `start`."""

    kind: str
    run_id: str
    state: str
    detail: str = ""
    """The event that happened, or the handler."""


@dataclass(slots=True, eq=False)
class Listener:
    """A queue of changes; `missed` says that some did not fit and the ledger should be read again."""

    changes: asyncio.Queue[Change] = field(default_factory=lambda: asyncio.Queue(_BACKLOG))
    run_id: str | None = None
    own_only: bool = False
    missed: bool = False

    async def next(self) -> Change:
        return await self.changes.get()


class Changes:
    """Tells listeners of each change, in order. Nothing is kept: the ledger is the truth, this only says when to look."""

    def __init__(self) -> None:
        self._all: set[Listener] = set()
        self._by_run: dict[str, set[Listener]] = {}

    def __bool__(self) -> bool:
        """Whether anyone listens."""
        return bool(self._all or self._by_run)

    def publish(self, change: Change, *, remote: bool = False) -> None:
        """Tell everyone who listens to this run, or to all; `remote`: another process committed it."""
        for listener in (*self._all, *self._by_run.get(change.run_id, ())):
            if remote and listener.own_only:
                continue
            try:
                listener.changes.put_nowait(change)
            except asyncio.QueueFull:
                listener.missed = True

    @contextmanager
    def subscribe(self, run_id: str | None = None, *, own_only: bool = False) -> Iterator[Listener]:
        """Listen to one run, or to all of them, inside the block; `own_only`: to what this process commits."""
        listener = Listener(run_id=run_id, own_only=own_only)
        group = self._all if run_id is None else self._by_run.setdefault(run_id, set())
        group.add(listener)
        try:
            yield listener
        finally:
            group.discard(listener)
            if run_id is not None and not group:
                self._by_run.pop(run_id, None)


@dataclass(frozen=True, slots=True)
class Signals:
    """How the door wakes the loops: something is due now."""

    poll: asyncio.Event = field(default_factory=asyncio.Event)
    dispatch: asyncio.Event = field(default_factory=asyncio.Event)
    changes: Changes = field(default_factory=Changes)
