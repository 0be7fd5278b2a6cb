"""A program for `test_storage_kill`: storage on a disk, killed before and after each step.

It prints one line of JSON for each point of death: what lay there afterwards, and what the next
attempt made of it.
"""

import asyncio
import hashlib
import json
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from handlers.storage import Storage, StorageConfig
from receiver.handler import Artifact, Done, Output
from receiver.net.clients import tls_context
from receiver.net.download import Downloader
from receiver.testing import MemoryContext, a_settled_run
from tests.support.defaults import download_limits

SMALL = "small"
LARGE = "large " * 200_000  # three chunks
TEXTS = {"a.txt": SMALL.encode(), "b.txt": LARGE.encode()}
TLS = tls_context()
RECORDS = TypeAdapter(dict[int, Artifact])


@dataclass
class Death:
    """Kills the process at the step of this number; 0: never."""

    at: int
    steps: list[str] = field(default_factory=list)

    def step(self, name: str) -> None:
        self.steps.append(name)
        if len(self.steps) == self.at:
            os.kill(os.getpid(), signal.SIGKILL)

    def around(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **fields: Any) -> Any:
            self.step(f"before {name}")
            answer = function(*args, **fields)
            self.step(f"after {name}")
            return answer

        return call


@dataclass
class LastingContext(MemoryContext):
    """A context whose records outlive the process, in a file."""

    ledger: Path = Path()
    death: Death = field(default_factory=lambda: Death(0))

    def load(self) -> "LastingContext":
        if self.ledger.exists():
            self.records = RECORDS.validate_json(self.ledger.read_bytes())
            self.places = {record.location: (self.run_id, n) for n, record in self.records.items()}
        return self

    def save_ledger(self, name: str) -> None:
        new = self.ledger.with_suffix(".new")
        new.write_bytes(RECORDS.dump_json(self.records))
        new.rename(self.ledger)
        self.death.step(f"after {name}")

    async def reserve(self, position: int, output_id: str, location: str, *, vacant: bool = False) -> None:
        self.death.step("before reserve")
        await super().reserve(position, output_id, location, vacant=vacant)
        self.save_ledger("reserve")

    async def store_artifact(
        self, position: int, *, size: int, sha256: str, content_type: str | None
    ) -> None:
        self.death.step("before record")
        await super().store_artifact(position, size=size, sha256=sha256, content_type=content_type)
        self.save_ledger("record")


def attempt(root: Path, die_at: int) -> None:
    """Store a run, and write down the steps that this took."""
    death = Death(die_at)
    for module, name in ((os, "fsync"), (os, "replace"), (os, "mkdir"), (os, "write")):
        setattr(module, name, death.around(name, getattr(module, name)))
    outputs = tuple(
        Output(position=n, output_id=name, type="text", value=value)
        for n, (name, value) in enumerate((("a", SMALL), ("b", LARGE)))
    )
    run = replace(a_settled_run(), outputs=outputs)

    async def handle_run() -> object:
        handler = Storage(StorageConfig(url=str(root), key="{run_id}/{output_id}{ext}", outputs_at_once=1))
        context = LastingContext(
            "run_1",
            Downloader(limits=download_limits(), tls=TLS),
            ledger=root.with_suffix(".ledger"),
            death=death,
        )
        return await handler.handle(run, context.load())

    if not isinstance(asyncio.run(handle_run()), Done):
        os._exit(1)
    root.with_suffix(".steps").write_text(json.dumps(death.steps))


def run_child(work: Callable[[], None]) -> int:
    """Run a function in a child; return its exit code, or the negative signal."""
    child = os.fork()
    if child == 0:
        work()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def visible(root: Path) -> dict[str, str]:
    """Return the visible files of a directory, with their hashes."""
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in root.rglob("*")
        if path.is_file() and not path.name.startswith(".")
    }


def main(root: Path) -> None:
    number, code = 0, -1
    while code:
        number += 1
        place = root / str(number)
        code = run_child(partial(attempt, place, die_at=number))
        left = visible(place)
        again = run_child(partial(attempt, place, die_at=0))
        records = RECORDS.validate_json(place.with_suffix(".ledger").read_bytes())
        report = {
            "code": code,
            "left": left,
            "again": again,
            "then": visible(place),
            "hidden": [path.name for path in place.rglob(".*")],
            "recorded": {Path(each.location).name: each.sha256 for each in records.values()},
            "steps": json.loads(place.with_suffix(".steps").read_text()),
        }
        sys.stdout.write(f"{json.dumps(report)}\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
