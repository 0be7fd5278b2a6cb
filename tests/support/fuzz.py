"""The operations API, fuzzed from its own OpenAPI document by schemathesis: the same requests each time."""

import base64
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import schemathesis
from hypothesis import strategies as st
from schemathesis import Case, HookContext
from schemathesis.config import SchemathesisConfig
from schemathesis.engine import events, from_schema
from schemathesis.hooks import GLOBAL_HOOK_DISPATCHER

from tests.web.ops.conftest import Ops

SEED = 9
CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_schema_conformance",
    "response_headers_conformance",
)
HOSTILE_TEXTS = (
    "run_\0",
    "a" * 300,
    "\u2028",
    "%",
    "\u00fc",
    " ",
    "'",
    "18446744073709551616",
    "nan",
    "-1",
    "\ufffd",
)
HOSTILE_VALUES: tuple[Any, ...] = (
    "\0", "\ud800", "a" * 5000, "\u00fc ", "http://[", "/.", 2**63, -(2**70), -1, 1e308, True, None, [], [[[]]],
    {"\0": 1}, {"\udc00": 1}, {"a": "\0"}, [{"a": 2**64}], {"callback_url": "http://["},
    {"workspace_id": "\u00fc"},
)  # fmt: skip
_ENDLESS = "/api/events"
"""A stream without parameters: it ends with the service."""


@dataclass(frozen=True, slots=True)
class Found:
    """What a fuzz has found: failed checks by what they say, and the responses by status."""

    failures: Mapping[str, str]
    statuses: Counter[int]
    operations: frozenset[str]


@dataclass(slots=True)
class Fuzz:
    """How to fuzz a service. `known` are values that lead somewhere, by the name of a parameter."""

    url: str
    token: str
    document: Mapping[str, Any]
    directory: Path
    """Backups are written here, wherever a request wants them."""
    known: Mapping[str, Sequence[str]] = field(default_factory=dict)
    examples: int = 10
    """Generated requests for each operation, beside those at the bounds of its schemas."""
    seed: int = SEED
    is_repeatable: bool = True
    """Whether the requests are the same each time, whatever the seed."""

    @property
    def _paths(self) -> dict[str, Any]:
        return {path: item for path, item in self.document["paths"].items() if path != _ENDLESS}

    @property
    def operations(self) -> frozenset[str]:
        """Every operation that is tried, such as `GET /api/runs`."""
        return frozenset(
            f"{method.upper()} {path}" for path, item in self._paths.items() for method in item
        )

    def run(self) -> Found:
        """Send all requests and check each response."""
        schema = schemathesis.openapi.from_dict(
            {**self.document, "paths": self._paths}, config=self._config()
        )
        for container, hook in (
            ("path_parameters", self._replace_parameters),
            ("query", self._replace_parameters),
            ("body", self._spoil_body),
        ):
            # It sets attributes, which a method does not take.
            schema.hooks.hook(f"flatmap_{container}")(partial(hook))
        confine = partial(self._confine)
        schemathesis.hook("before_call")(confine)
        try:
            return _collect(from_schema(schema).execute())
        finally:
            GLOBAL_HOOK_DISPATCHER.unregister(confine)

    def _config(self) -> SchemathesisConfig:
        return SchemathesisConfig.from_dict(
            {
                "seed": self.seed,
                "continue-on-failure": True,
                "base-url": self.url,
                "headers": {"Authorization": f"Bearer {self.token}"},
                "request-timeout": 20,
                "generation": {
                    "max-examples": self.examples,
                    "deterministic": self.is_repeatable,
                    "database": "none",
                },
                "phases": {"stateful": {"enabled": False}, "coverage": {"unexpected-methods": []}},
                "checks": {"enabled": False} | {name: {"enabled": True} for name in CHECKS},
            }
        )

    def _replace_parameters(self, context: HookContext, values: Any) -> st.SearchStrategy[Any]:
        """Let some requests name what is in the ledger, or what no ledger can hold."""
        if not values:
            return st.just(values)
        chosen = {name: st.sampled_from((*self.known.get(name, ()), *HOSTILE_TEXTS)) for name in values}
        known = {name: st.sampled_from(self.known.get(name, (value,))) for name, value in values.items()}
        return st.one_of(
            st.just(values),
            st.fixed_dictionaries(known),
            st.sampled_from(sorted(values)).flatmap(
                lambda name: chosen[name].map(lambda value: {**values, name: value})
            ),
        )

    def _spoil_body(self, context: HookContext, body: Any) -> st.SearchStrategy[Any]:
        """Let some bodies hold a value that no ledger can hold."""
        if not isinstance(body, dict) or not body:
            return st.just(body)
        spoiled = st.tuples(st.sampled_from(sorted(body)), st.sampled_from(HOSTILE_VALUES))
        return st.one_of(st.just(body), spoiled.map(lambda pair: {**body, pair[0]: pair[1]}))

    def _confine(self, context: HookContext, case: Case[Any], kwargs: dict[str, Any]) -> None:
        """Have backups written into the directory of the test."""
        if case.path == "/api/backup" and isinstance(case.body, dict):
            path = case.body.get("path")
            if isinstance(path, str) and path.startswith("/"):
                inside = [part for part in path.split("/") if part not in {"", ".", ".."}]
                case.body = {**case.body, "path": "/".join((str(self.directory), *inside))}


async def fuzz_ops(ops: Ops, directory: Path, **options: Any) -> Fuzz:
    """Return a fuzz of a service that knows a run, its callback and its start."""
    run_id = await ops.run_to_end(idempotency_key="known")
    start = (await ops.get("/api/starts"))["starts"][0]
    known = {
        "run_id": [run_id],
        "delivery_id": [(await ops.get("/api/deliveries"))["deliveries"][0]["delivery_id"]],
        "token": [start["token"]],
        "technique_id": ["emu-image"],
        "key": ["known"],
        "cursor": [encode_cursor(number, name) for number in (0, 2**63 - 1) for name in ("", run_id)],
    }
    document = await ops.get("/api/openapi.json")
    return Fuzz(ops.url, ops.token, document, directory, known=known, **options)


def encode_cursor(number: int, name: str) -> str:
    return base64.urlsafe_b64encode(json.dumps([number, name]).encode()).decode()


def _collect(stream: Iterable[events.EngineEvent]) -> Found:
    failures: dict[str, str] = {}
    statuses: Counter[int] = Counter()
    operations: set[str] = set()
    for event in stream:
        match event:
            case events.ScenarioFinished(recorder=recorder) if recorder is not None:
                operations.add(recorder.label)
                for interaction in recorder.interactions.values():
                    if interaction.response is not None:
                        statuses[interaction.response.status_code] += 1
                for check in chain.from_iterable(recorder.checks.values()):
                    if check.failure_info is not None:
                        failure = check.failure_info.failure
                        words = f"{recorder.label}: {failure.title}: {failure.message}"
                        failures.setdefault(words, check.failure_info.code_sample)
            case events.NonFatalError(info=info, label=label):
                failures.setdefault(f"{label}: {info.format()}", "")
            case events.FatalError(exception=error):
                raise error
            case _:
                pass
    return Found(failures, statuses, frozenset(operations))
