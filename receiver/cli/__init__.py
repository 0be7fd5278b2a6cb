"""The command `flora-receiver`: `app.py` is the tree, a command's file or folder has its name.

May import everything. A command imports what it needs when it runs, so that `--help` is quick.
"""

from receiver.cli.app import main

__all__ = ["main"]
