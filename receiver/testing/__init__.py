"""A kit for authors of handlers: settled runs, contexts, and a receiver beside an emulated FLORA.

`receiver.testing.fixtures` offers it as pytest fixtures. The service itself does not use it.
"""

from receiver.testing.context import Claim, Lines, MemoryContext
from receiver.testing.downloads import MediaServer, Page, page, redirect, serve_media, serving
from receiver.testing.runs import SETTLED_AT, a_settled_run, signed_callback
from receiver.testing.stand import Stand, run_stand, standing

__all__ = [
    "SETTLED_AT",
    "Claim",
    "Lines",
    "MediaServer",
    "MemoryContext",
    "Page",
    "Stand",
    "a_settled_run",
    "page",
    "redirect",
    "run_stand",
    "serve_media",
    "serving",
    "signed_callback",
    "standing",
]
