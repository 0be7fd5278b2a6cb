"""The decision of a rule, as a value: the intake carries it out in one transaction. Pure."""

import msgspec

from receiver.model import Event, Output, Run


class Unchanged(msgspec.Struct, frozen=True):
    """The report changes nothing."""


class Changed(msgspec.Struct, frozen=True):
    """The new row of the run, the outputs that the report has, and the events for handlers.

    `refreshed` has the outputs that a run settled before has now: with other URLs perhaps, in another
    order, and with an empty id where FLORA gives none. See `decide/outputs.py`.
    """

    run: Run
    outputs: tuple[Output, ...] = ()
    events: tuple[Event, ...] = ()
    refreshed: tuple[Output, ...] = ()


Decision = Unchanged | Changed
