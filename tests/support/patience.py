"""The one limit on waiting: how long a test waits for what must come, before it fails.

Nothing is expected to take that long. A test that passes does not wait for it, and one that fails
because the machine is busy would be worth nothing.
"""

PATIENCE_SECONDS = 120.0
