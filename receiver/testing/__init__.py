"""A kit for those who write handlers: settled runs, a context, a receiver beside an emulated FLORA.

`receiver.testing.fixtures` has it for pytest. The service itself does not use it.
"""

from receiver.testing.context import Lines, MemoryContext
from receiver.testing.downloads import MediaServer, Page, page, serving
from receiver.testing.runs import SETTLED_AT, a_settled_run, signed_callback
from receiver.testing.stand import Stand, standing

__all__ = [
    "SETTLED_AT",
    "Lines",
    "MediaServer",
    "MemoryContext",
    "Page",
    "Stand",
    "a_settled_run",
    "page",
    "serving",
    "signed_callback",
    "standing",
]
