"""The log handler writes one line per run."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from handlers.log import Log, LogConfig
from receiver.handler import Done, Event, Handler, SettledRun, When


async def test_a_completed_run_is_one_line_of_information(
    run: SettledRun, context_of: Callable[..., Any]
) -> None:
    """What happened, what it cost, and how we learned of it."""
    context = context_of()
    assert await Log(LogConfig()).handle(replace(run, charged_cost=0.5), context) == Done()
    values = {
        "run_id": "run_1",
        "status": "completed",
        "outputs": 0,
        "charged_cost": 0.5,
        "verdict": "matched",
    }
    assert context.log.lines == [("info", "run.completed", values)]


@pytest.mark.parametrize("status", ["failed", "lost"])
async def test_any_other_end_is_a_warning(
    run: SettledRun, context_of: Callable[..., Any], status: str
) -> None:
    """With the error code, which is what one searches for."""
    context = context_of()
    await Log(LogConfig()).handle(replace(run, status=status, error_code="model_timeout"), context)
    [(level, event, values)] = context.log.lines
    assert (level, event, values["error_code"]) == ("warning", f"run.{status}", "model_timeout")


def test_it_listens_to_every_settled_run() -> None:
    """By default nothing is filtered."""
    handler = Log(LogConfig())
    assert isinstance(handler, Handler)
    assert (handler.on, handler.when) == ((Event.SETTLED,), When())
