"""Idempotency keys as FLORA keeps them: per workspace, operation and destination, for two hours, of successes only."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass

__all__ = ["KeyBook", "KeyScope", "Remembered", "digest"]

KEY_LIFE_SECONDS = 7200.0


@dataclass(frozen=True, slots=True)
class KeyScope:
    """Where a key counts."""

    workspace_id: str
    operation: str
    destination: str
    key: str


@dataclass(frozen=True, slots=True)
class Remembered:
    """A success: which request it was, what was answered, and until when (unix seconds) the key blocks."""

    digest: str
    answer: dict[str, object]
    until: float


class KeyBook:
    """The keys in force. A request that fails is never remembered, which is how its key is released."""

    def __init__(self, clock: Callable[[], float], *, time_scale: float) -> None:
        self._clock = clock
        self._life_seconds = KEY_LIFE_SECONDS / time_scale
        self._kept: dict[KeyScope, Remembered] = {}

    def recall(self, scope: KeyScope) -> Remembered | None:
        remembered = self._kept.get(scope)
        if remembered is not None and remembered.until <= self._clock():
            del self._kept[scope]
            return None
        return remembered

    def remember(self, scope: KeyScope, request: str, answer: dict[str, object]) -> None:
        self._kept[scope] = Remembered(request, answer, self._clock() + self._life_seconds)


def digest(body: dict[str, object]) -> str:
    """Return what two bodies must share to be the same request: their content, whatever the order of keys."""
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
