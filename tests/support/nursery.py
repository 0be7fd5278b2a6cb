"""Run as a script: imports the receiver once, then forks a real receiver process for every order read from stdin.

Orders and answers are lines of JSON. `{"settings": …, "log": path, "kill": {"at": n, "when": "before"}}` is answered by
`{"pid": …}`; `{"wait": pid}` by `{"status": …}`, null while it lives (negative: the signal). `kill` makes the process kill
itself with SIGKILL at its n-th commit that changes anything, just before the COMMIT, or just `after` it and before anybody
has heard of it; or at its n-th `statement` of SQL. Nothing in the product knows of this: the boundaries are wrapped here.
"""

import asyncio
import itertools
import json
import os
import signal
import sys
from concurrent.futures import Future
from typing import Any

from alembic import command as _alembic  # noqa: F401 -- imported once, before the forks
from sqlalchemy import Engine, event

import handlers.storage as _storage  # noqa: F401
from receiver.config import Settings
from receiver.service.service import Service
from receiver.store.sqlite import SqliteDatabase
from receiver.telemetry import configure_logging


def main() -> None:
    for line in sys.stdin:
        order = json.loads(line)
        if "wait" in order:
            pid, status = os.waitpid(order["wait"], os.WNOHANG)
            answer: dict[str, Any] = {"status": os.waitstatus_to_exitcode(status) if pid else None}
        else:
            answer = {"pid": os.fork()}
            if answer["pid"] == 0:
                _live(order)
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


def _live(order: dict[str, Any]) -> None:
    """Be a receiver until the end; never return."""
    code = 70
    try:
        log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        nothing = os.open(os.devnull, os.O_RDONLY)
        for source, target in ((nothing, 0), (log, 1), (log, 2)):
            os.dup2(source, target)
        configure_logging("info", "json")
        if "kill" in order:
            at, when = order["kill"]["at"], order["kill"]["when"]
            _die_at_statement(at) if when == "statement" else _die_at_commit(at, when)
        asyncio.run(Service(Settings.model_validate(order["settings"])).run_until_signal())
        code = 0
    finally:
        sys.stderr.flush()
        os._exit(code)


def _die_at_statement(at: int) -> None:
    statements = itertools.count(1)

    def count(*_: Any) -> None:
        if next(statements) == at:
            os.kill(os.getpid(), signal.SIGKILL)

    event.listen(Engine, "before_cursor_execute", count)


def _die_at_commit(at: int, when: str) -> None:
    commit = SqliteDatabase._commit
    commits = 0

    def changes(database: SqliteDatabase) -> int:
        driver = database._connection.connection.driver_connection
        return int(driver.total_changes) if driver is not None else 0

    def counted(database: SqliteDatabase, batch: Any) -> None:
        nonlocal commits
        before = changes(database)
        shadows: list[tuple[Any, Future[Any]]] = [(job, Future()) for job, _ in batch]

        def judge(_tx: Any) -> None:
            if changes(database) > before and commits + 1 == at:
                os.kill(os.getpid(), signal.SIGKILL)

        last: list[tuple[Any, Future[Any]]] = [(judge, Future())] if when == "before" and batch else []
        commit(database, [*shadows, *last])
        if changes(database) > before:
            commits += 1
            if commits == at:
                os.kill(os.getpid(), signal.SIGKILL)
        for (_, future), (_, shadow) in zip(batch, shadows, strict=True):
            error = shadow.exception()
            if error is None:
                future.set_result(shadow.result())
            else:
                future.set_exception(error)

    SqliteDatabase._commit = counted  # type: ignore[method-assign, assignment]


if __name__ == "__main__":
    main()
