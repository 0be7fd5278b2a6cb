"""Everything that can be made to go wrong, as data: how a fault is written, and the book of those in force.

A fault is JSON: `{"kind": "rate_limited", "retry_after": 2, "next": 3, "path": "/technique-runs"}`. `kind` decides the
family, and with it who carries it out: the API gate, the callback sender, the media server, or the start of a run.
"""

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from receiver.emulator.settings import API_PATH

__all__ = ["KINDS", "Family", "Fault", "FaultBook", "InvalidFault", "parse_faults"]

Option = str | float | int | bool | None


class Family(StrEnum):
    """Who carries a fault out."""

    API = "api"
    CALLBACK = "callback"
    MEDIA = "media"
    RUN = "run"


# Each kind with its own options and their defaults; a default's type is the option's type, None stands for "not given".
KINDS: Mapping[str, tuple[Family, Mapping[str, Option]]] = {
    # API: instead of the answer
    "rate_limited": (Family.API, {"retry_after": None}),
    "internal_error": (Family.API, {}),
    "service_unavailable": (Family.API, {}),
    "unauthorized": (Family.API, {}),
    "not_found": (Family.API, {}),
    "insufficient_credits": (Family.API, {}),
    "html": (Family.API, {"status": 200}),
    # API: the request is carried out, only its answer suffers
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
    "redirect": (Family.MEDIA, {"url": "", "status": 302}),
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
# What every fault may say about when it strikes.
_SELECTORS = frozenset({"kind", "probability", "next", "path", "method", "attempts"})


class InvalidFault(ValueError):  # noqa: N818 - a fault that is invalid, not an error about faults
    """A fault that cannot be understood; the message says why."""


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault.

    It strikes with `probability`, at the next `next` occasions only (None: every one), on paths that start with `path`
    (API and media; the part after /api/v1 will do) and requests of `method`; of a callback, on the `attempts` listed
    (1 to 4; none listed: all). An occasion is a request, a download, a callback with all its attempts, or a start.
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

    def touches(self, attempt: int) -> bool:
        return not self.attempts or attempt in self.attempts

    def document(self) -> dict[str, object]:
        document: dict[str, object] = {"kind": self.kind, **self.options, "probability": self.probability}
        for name in ("next", "path", "method", "attempts"):
            value = getattr(self, name)
            if value:
                document[name] = value
        return document


@dataclass(slots=True)
class _Standing:
    """A fault in force and how often it may still strike."""

    fault: Fault
    left: int | None = field(init=False)

    def __post_init__(self) -> None:
        self.left = self.fault.next


class FaultBook:
    """The faults in force: those for everything, and those bound to one run."""

    def __init__(self, randomness: random.Random, initial: Iterable[Fault] = ()) -> None:
        self._random = randomness
        self._standing = [_Standing(fault) for fault in initial]
        self._bound: dict[str, list[_Standing]] = {}

    def add(self, faults: Iterable[Fault], *, run_id: str | None = None) -> None:
        target = self._standing if run_id is None else self._bound.setdefault(run_id, [])
        target.extend(_Standing(fault) for fault in faults)

    def reset(self) -> None:
        """Forget every fault, bound ones too. What already happened to a run (`fail`, `read_lag`) stays."""
        self._standing.clear()
        self._bound.clear()

    def listed(self, run_id: str | None = None) -> list[dict[str, object]]:
        source = self._standing if run_id is None else self._bound.get(run_id, [])
        return [
            one.fault.document() | ({"next": one.left} if one.left is not None else {})
            for one in source
            if one.left != 0
        ]

    def take(self, family: Family, *, run_id: str | None = None, path: str = "", method: str = "") -> tuple[Fault, ...]:
        """Return the faults that strike on this occasion, and count it against their `next`."""
        bound = self._bound.get(run_id, []) if run_id is not None else []
        return tuple(
            one.fault
            for one in (*bound, *self._standing)
            if one.fault.family is family and self._hit(one, path, method)
        )

    def _hit(self, one: _Standing, path: str, method: str) -> bool:
        fault = one.fault
        if one.left == 0 or not (path.startswith(fault.path) or path.removeprefix(API_PATH).startswith(fault.path)):
            return False
        if fault.method and fault.method != method:
            return False
        if fault.probability < 1.0 and self._random.random() >= fault.probability:
            return False
        if one.left is not None:
            one.left -= 1
        return True


def parse_faults(document: object) -> tuple[Fault, ...]:
    """Read one fault or a list of them, or raise `InvalidFault`."""
    items: Sequence[object] = document if isinstance(document, list | tuple) else [document]
    return tuple(_parse(item) for item in items)


def _parse(item: object) -> Fault:
    if not isinstance(item, Mapping) or item.get("kind") not in KINDS:
        raise InvalidFault(f"a fault is an object whose `kind` is one of {', '.join(sorted(KINDS))}")
    kind = str(item["kind"])
    defaults = KINDS[kind][1]
    for name in item:
        if name not in defaults and name not in _SELECTORS:
            raise InvalidFault(
                f"`{kind}` has no option `{name}`; it takes {', '.join(sorted({*defaults, *_SELECTORS}))}"
            )
    options = {name: _option(kind, name, item.get(name, default), default) for name, default in defaults.items()}
    probability, next_, attempts = item.get("probability", 1.0), item.get("next"), item.get("attempts", ())
    if not _is_number(probability) or not 0 <= probability <= 1:
        raise InvalidFault("`probability` is a number from 0 to 1")
    if next_ is not None and (not isinstance(next_, int) or next_ < 1):
        raise InvalidFault("`next` is a whole number of at least 1")
    if not isinstance(attempts, list | tuple) or not all(isinstance(attempt, int) for attempt in attempts):
        raise InvalidFault("`attempts` is a list of attempt numbers, 1 to 4")
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
    fits = _is_number(value) if name in _NUMBERS or _is_number(default) else isinstance(value, type(default))
    if not fits or not isinstance(value, str | int | float):
        raise InvalidFault(f"`{name}` of `{kind}` has the wrong type")
    return value


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
