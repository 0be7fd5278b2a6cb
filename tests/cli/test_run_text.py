"""Runs as text on a terminal."""

from datetime import UTC, datetime

from receiver.cli.run_text import describe_end, describe_hold, describe_run
from receiver.client.messages import HoldView
from tests.support.batch_fakes import a_run


def test_a_run_that_is_not_read_says_why() -> None:
    """An API key that FLORA refuses must not look like a run that takes long."""
    held = HoldView(reason="FLORA does not accept the key", until=datetime(2026, 11, 27, 12, tzinfo=UTC))
    run = a_run("run_1", state="open", settled=False, finished=False, reads_held=held)
    sentence = "Nothing is read until 2026-11-27 12:00:00 UTC: FLORA does not accept the key."
    assert describe_hold(run) == sentence
    assert sentence in list(describe_end(run))
    assert any(sentence in line for line in describe_run(run))
    assert describe_hold(a_run("run_2")) is None
