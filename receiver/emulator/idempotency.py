"""Idempotency keys, kept for two hours after a success, per workspace, operation and destination."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass

__all__ = ["KeyBook", "KeyScope", "Remembered", "digest"]

KEY_LIFE_SECONDS = 7200.0


@dataclass(frozen=True, slots=True)
class KeyScope:
    """A key, and where it counts."""

    workspace_id: str
    operation: str
    destination: str
    key: str


@dataclass(frozen=True, slots=True)
class Remembered:
    """A success: the request's digest, the response, and the key's end in unix seconds."""

    digest: str
    response: dict[str, object]
    until: float


class KeyBook:
    """The keys in force. A request that fails is not remembered, so its key stays free."""

    def __init__(self, clock: Callable[[], float], *, time_scale: float) -> None:
        self._clock = clock
        self._life_seconds = KEY_LIFE_SECONDS / time_scale
        self._remembered: dict[KeyScope, Remembered] = {}

    def recall(self, scope: KeyScope) -> Remembered | None:
        remembered = self._remembered.get(scope)
        if remembered is not None and remembered.until <= self._clock():
            del self._remembered[scope]
            return None
        return remembered

    def remember(self, scope: KeyScope, request: str, response: dict[str, object]) -> None:
        self._remembered[scope] = Remembered(request, response, self._clock() + self._life_seconds)


def digest(body: dict[str, object]) -> str:
    """Return a digest of a body's content, which does not depend on the order of its keys."""
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
