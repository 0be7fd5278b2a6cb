"""A FLORA to develop and test against: its API, its media, its signed callbacks, and everything that goes wrong with them."""

from receiver.emulator.app import Emulator
from receiver.emulator.faults import parse_faults
from receiver.emulator.settings import EmulatorSettings

__all__ = ["Emulator", "EmulatorSettings", "parse_faults"]
