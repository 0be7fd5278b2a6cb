"""What a rule decides, as a value: the shell carries it out in one transaction. Pure."""

import msgspec

from receiver.model import Event, Output, Run


class Unchanged(msgspec.Struct, frozen=True):
    """The report changes nothing."""


class Changed(msgspec.Struct, frozen=True):
    """The run's new row; its outputs, if this report brought them; what happened, for handlers that listen.

    `refreshed` are the outputs of a run settled before, as they are shown now: the same ones, perhaps under other URLs.
    """

    run: Run
    outputs: tuple[Output, ...] = ()
    events: tuple[Event, ...] = ()
    refreshed: tuple[Output, ...] = ()


Decision = Unchanged | Changed
