"""Signals that end a batch: SIGINT, SIGTERM and SIGHUP interrupt it, and its results are written."""

import signal
import threading
from types import FrameType, TracebackType
from typing import Any, Self

_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_CODE = 128
"""An exit code is this and the signal's number, as in a shell: 130 after Ctrl-C."""


class Interruption:
    """While it is entered, the first signal raises KeyboardInterrupt and later ones are ignored.

    A signal that is ignored already, as SIGHUP is under `nohup`, stays so.
    """

    def __init__(self) -> None:
        self._before: dict[signal.Signals, Any] = {}
        self._number: int | None = None
        self._is_held = False

    @property
    def exit_code(self) -> int | None:
        """The exit code of the command, or None if no signal has come."""
        return None if self._number is None else _CODE + self._number

    def hold(self) -> None:
        """Only note a signal from now on: what is being written is written whole."""
        self._is_held = True

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for each in _ENDING:
                if signal.getsignal(each) is not signal.SIG_IGN:
                    self._before[each] = signal.signal(each, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def release(self) -> None:
        """Restore what the signals did before."""
        for each, handler in self._before.items():
            signal.signal(each, handler)
        self._before.clear()

    def _note(self, number: int, _frame: FrameType | None) -> None:
        is_first, self._number = self._number is None, self._number or number
        if is_first and not self._is_held:
            raise KeyboardInterrupt
