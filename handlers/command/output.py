"""The output of a program as text that can be recorded. Pure; for the handler `command`."""

import re
from collections.abc import Iterable

_MIN_HIDDEN = 6  # characters; what is shorter may be an ordinary word
_HIDDEN = b"[hidden]"
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")


class OutputFilter:
    """Removes from a program's output what must not be recorded: its secrets, and media URLs."""

    def __init__(self, hidden: Iterable[str], limit: int) -> None:
        values = {value.encode(errors="replace") for value in hidden if len(value) >= _MIN_HIDDEN}
        self._hidden = sorted(values, key=lambda value: (-len(value), value))
        self._limit = limit

    @property
    def keep_bytes(self) -> int:
        """How many of the last bytes `to_text` needs, so that no part of a secret remains."""
        return self._limit + max(map(len, self._hidden), default=0)

    def to_text(self, tail: bytes, *, size: int) -> str:
        """Return `tail`, the end of an output of `size` bytes, as plain text."""
        if len(tail) < size:
            tail = tail[max((_count_partial(value, tail) for value in self._hidden), default=0) :]
        for value in self._hidden:
            tail = tail.replace(value, _HIDDEN)
        if len(tail) > self._limit or len(tail) < size:
            # The first character may be cut: its remaining bytes are continuation bytes.
            tail = tail[-self._limit :].lstrip(bytes(range(0x80, 0xC0))) if self._limit else b""
        text = tail.decode(errors="replace").replace("\r\n", "\n").replace("\r", "\n")
        return _UNPRINTABLE.sub("\ufffd", text).strip()


def _count_partial(value: bytes, tail: bytes) -> int:
    """Return how many bytes at the start of `tail` are the end of `value`."""
    return next((size for size in range(len(value) - 1, 0, -1) if tail.startswith(value[-size:])), 0)
