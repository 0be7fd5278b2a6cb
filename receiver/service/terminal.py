"""The terminal that a process was started from, which sends SIGHUP when it is closed."""

import os


def has_terminal() -> bool:
    """Return whether this process has a terminal: no longer once that is closed."""
    try:
        os.close(os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY))
    except OSError:
        return False
    return True
