"""Notifications of commits within this process: for the API's `wait`, its events, the workers."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

_BACKLOG = 1000
"""Changes that are queued for a slow listener before it misses some."""


@dataclass(frozen=True, slots=True)
class Change:
    """A commit about one run: `kind` is `run` (its state), `dispatch` or `start`."""

    kind: str
    run_id: str
    state: str
    detail: str = ""
    """The events of the run, or the handler."""


@dataclass(slots=True, eq=False)
class Listener:
    """A queue of changes. `missed` is set if some did not fit: the ledger should be read again."""

    changes: asyncio.Queue[Change] = field(default_factory=lambda: asyncio.Queue(_BACKLOG))
    run_id: str | None = None
    own_only: bool = False
    missed: bool = False

    async def next(self) -> Change:
        return await self.changes.get()


class Changes:
    """Publishes changes to listeners, in order. Nothing is stored: the ledger has the state."""

    def __init__(self) -> None:
        self._all: set[Listener] = set()
        self._by_run: dict[str, set[Listener]] = {}

    def __bool__(self) -> bool:
        """Return whether there are listeners."""
        return bool(self._all or self._by_run)

    def publish(self, change: Change, *, remote: bool = False) -> None:
        """Notify the listeners of its run and of all runs; `remote`: of another process."""
        for listener in (*self._all, *self._by_run.get(change.run_id, ())):
            if remote and listener.own_only:
                continue
            try:
                listener.changes.put_nowait(change)
            except asyncio.QueueFull:
                listener.missed = True

    @contextmanager
    def subscribe(self, run_id: str | None = None, *, own_only: bool = False) -> Iterator[Listener]:
        """Receive the changes of one run, or of all, in the block; `own_only`: no remote ones."""
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
    """Signals that wake the workers: something is due now."""

    poll: asyncio.Event = field(default_factory=asyncio.Event)
    dispatch: asyncio.Event = field(default_factory=asyncio.Event)
    changes: Changes = field(default_factory=Changes)
