"""One receiver process: built from the settings, run, and stopped in order. Public: `Service`.

Called by the command and by the testing kit. May import everything but `cli` and `testing`.
"""

from receiver.service.service import Service

__all__ = ["Service"]
