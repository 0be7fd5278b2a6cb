"""An emulated FLORA for development and tests: its API, its media, its callbacks, and faults in all.

Called by `cli`, `testing` and the tests. Imports `flora.signature` and `errors` alone.
"""

from receiver.emulator.app import Emulator
from receiver.emulator.faults import parse_faults
from receiver.emulator.settings import EmulatorSettings

__all__ = ["Emulator", "EmulatorSettings", "parse_faults"]
