"""Everything that can go wrong, as data: the notation of faults, and the faults in force.

A fault is JSON: `{"kind": "rate_limited", "retry_after": 2, "next": 3, "path": "/runs"}`. Its `kind`
decides its family, and so the part that applies it: the API gate, the callback sender, the media
server, or the start of a run.
"""

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from email.utils import format_datetime
from enum import StrEnum

from receiver.emulator.settings import API_PATH

__all__ = [
    "KINDS",
    "Family",
    "Fault",
    "FaultBook",
    "InvalidFaultError",
    "parse_faults",
    "retry_after_headers",
]

Option = str | float | int | bool | None


class Family(StrEnum):
    """The part of the emulator that applies a fault."""

    API = "api"
    CALLBACK = "callback"
    MEDIA = "media"
    RUN = "run"


# Each kind with its options and their defaults, which have the types of the options.
KINDS: Mapping[str, tuple[Family, Mapping[str, Option]]] = {
    # API: in place of the response
    "rate_limited": (Family.API, {"retry_after": None, "as_date": False}),
    "internal_error": (Family.API, {}),
    "service_unavailable": (Family.API, {}),
    "unauthorized": (Family.API, {}),
    "not_found": (Family.API, {}),
    "insufficient_credits": (Family.API, {}),
    "html": (Family.API, {"status": 200}),
    # API: the request is carried out, and its response is delayed or spoiled
    "slow": (Family.API, {"seconds": 5.0}),
    "truncated_json": (Family.API, {}),
    "cut_answer": (Family.API, {}),
    # Callbacks
    "drop": (Family.CALLBACK, {}),
    "duplicate": (Family.CALLBACK, {"copies": 1}),
    "delay": (Family.CALLBACK, {"seconds": 5.0}),
    "reorder": (Family.CALLBACK, {"seconds": 30.0}),
    "corrupt": (Family.CALLBACK, {}),
    "contradict": (Family.CALLBACK, {}),
    "wrong_secret": (Family.CALLBACK, {}),
    "old_secret": (Family.CALLBACK, {"secret": ""}),
    "stale": (Family.CALLBACK, {"seconds": 1200.0}),
    "refresh_timestamp": (Family.CALLBACK, {"refresh": True}),
    # Media
    "stall": (Family.MEDIA, {"after_bytes": 0, "seconds": 3600.0}),
    "cut": (Family.MEDIA, {"after_bytes": 0}),
    "wrong_length": (Family.MEDIA, {"delta": 100}),
    "expired": (Family.MEDIA, {"status": 403}),
    "unavailable": (Family.MEDIA, {"status": 503, "retry_after": None, "as_date": False}),
    "redirect": (Family.MEDIA, {"url": "", "status": 302}),
    "content_encoding": (Family.MEDIA, {"value": "base64", "apply": True}),
    "content_type": (Family.MEDIA, {"value": "application/octet-stream"}),
    # The run itself, fixed when it starts
    "fail": (Family.RUN, {"error_code": "GENERATION_GENERIC_ERROR"}),
    "run_seconds": (Family.RUN, {"seconds": 60.0}),
    "read_lag": (Family.RUN, {"seconds": 5.0}),
    "cost_lag": (Family.RUN, {"seconds": 60.0}),
    "no_outputs": (Family.RUN, {}),
    "same_output_ids": (Family.RUN, {}),
    "size": (Family.RUN, {"bytes": 1_048_576}),
}
_NUMBERS = frozenset({"retry_after"})
# The options of every kind: when the fault applies.
_SELECTORS = frozenset({"kind", "probability", "next", "path", "method", "attempts"})


class InvalidFaultError(ValueError):
    """A fault that cannot be parsed; the message has the reason."""


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault.

    It applies with `probability`, on the next `next` occasions (None: on all), to paths that start
    with `path` (API and media; with or without /api/v1), to requests of `method` and to the
    `attempts` of a callback (1 to 4; empty: all). An occasion is a request, a download, a callback
    with all its attempts, or a start.
    """

    kind: str
    options: Mapping[str, Option]
    probability: float = 1.0
    next: int | None = None
    path: str = ""
    method: str = ""
    attempts: tuple[int, ...] = ()

    @property
    def family(self) -> Family:
        return KINDS[self.kind][0]

    def number(self, name: str) -> float:
        value = self.options[name]
        return float(value) if isinstance(value, int | float) else 0.0

    def text(self, name: str) -> str:
        return str(self.options[name] or "")

    def applies_to(self, attempt: int) -> bool:
        return not self.attempts or attempt in self.attempts

    def to_json(self) -> dict[str, object]:
        document: dict[str, object] = {"kind": self.kind, **self.options, "probability": self.probability}
        for name in ("next", "path", "method", "attempts"):
            value = getattr(self, name)
            if value:
                document[name] = value
        return document


@dataclass(slots=True)
class _Active:
    """A fault in force, and how often it may still apply."""

    fault: Fault
    left: int | None = field(init=False)

    def __post_init__(self) -> None:
        self.left = self.fault.next


class FaultBook:
    """The faults in force: those for everything, and those bound to one run."""

    def __init__(self, randomness: random.Random, initial: Iterable[Fault] = ()) -> None:
        self._random = randomness
        self._active = [_Active(fault) for fault in initial]
        self._bound: dict[str, list[_Active]] = {}

    def add(self, faults: Iterable[Fault], *, run_id: str | None = None) -> None:
        target = self._active if run_id is None else self._bound.setdefault(run_id, [])
        target.extend(_Active(fault) for fault in faults)

    def reset(self) -> None:
        """Remove every fault. The effects on runs that have started (`fail`, `read_lag`) remain."""
        self._active.clear()
        self._bound.clear()

    def to_json(self, run_id: str | None = None) -> list[dict[str, object]]:
        source = self._active if run_id is None else self._bound.get(run_id, [])
        return [
            one.fault.to_json() | ({"next": one.left} if one.left is not None else {})
            for one in source
            if one.left != 0
        ]

    def take(
        self, family: Family, *, run_id: str | None = None, path: str = "", method: str = ""
    ) -> tuple[Fault, ...]:
        """Return the faults that apply on this occasion, and count it against their `next`."""
        bound = self._bound.get(run_id, []) if run_id is not None else []
        return tuple(
            one.fault
            for one in (*bound, *self._active)
            if one.fault.family is family and self._applies(one, path, method)
        )

    def _applies(self, one: _Active, path: str, method: str) -> bool:
        fault = one.fault
        if one.left == 0 or not (
            path.startswith(fault.path) or path.removeprefix(API_PATH).startswith(fault.path)
        ):
            return False
        if fault.method and fault.method != method:
            return False
        if fault.probability < 1.0 and self._random.random() >= fault.probability:
            return False
        if one.left is not None:
            one.left -= 1
        return True


def parse_faults(document: object) -> tuple[Fault, ...]:
    """Parse one fault or a list of them. Raises InvalidFaultError."""
    items: Sequence[object] = document if isinstance(document, list | tuple) else [document]
    return tuple(_parse(item) for item in items)


def retry_after_headers(fault: Fault, now: datetime) -> dict[str, str]:
    """Return the header `retry-after` of a fault that may have one."""
    after = fault.options["retry_after"]
    if after is None:
        return {}
    if fault.options["as_date"]:
        at = now + timedelta(seconds=fault.number("retry_after"))
        return {"retry-after": format_datetime(at, usegmt=True)}
    return {"retry-after": f"{after}"}


def _parse(item: object) -> Fault:
    if not isinstance(item, Mapping) or item.get("kind") not in KINDS:
        raise InvalidFaultError(f"a fault is an object whose `kind` is one of {', '.join(sorted(KINDS))}")
    kind = str(item["kind"])
    defaults = KINDS[kind][1]
    for name in item:
        if name not in defaults and name not in _SELECTORS:
            raise InvalidFaultError(
                f"`{kind}` has no option `{name}`; it takes {', '.join(sorted({*defaults, *_SELECTORS}))}"
            )
    options = {
        name: _option(kind, name, item.get(name, default), default) for name, default in defaults.items()
    }
    probability, next_, attempts = item.get("probability", 1.0), item.get("next"), item.get("attempts", ())
    if not _is_number(probability) or not 0 <= probability <= 1:
        raise InvalidFaultError("`probability` is a number from 0 to 1")
    if next_ is not None and (not isinstance(next_, int) or next_ < 1):
        raise InvalidFaultError("`next` is a whole number of at least 1")
    if not isinstance(attempts, list | tuple) or not all(isinstance(attempt, int) for attempt in attempts):
        raise InvalidFaultError("`attempts` is a list of attempt numbers, 1 to 4")
    return Fault(
        kind=kind,
        options=options,
        probability=float(probability),
        next=next_,
        path=str(item.get("path", "")),
        method=str(item.get("method", "")).upper(),
        attempts=tuple(attempts),
    )


def _option(kind: str, name: str, value: object, default: Option) -> Option:
    if value is None and default is None:
        return None
    fits = (
        _is_number(value) if name in _NUMBERS or _is_number(default) else isinstance(value, type(default))
    )
    if not fits or not isinstance(value, str | int | float):
        raise InvalidFaultError(f"`{name}` of `{kind}` has the wrong type")
    return value


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
