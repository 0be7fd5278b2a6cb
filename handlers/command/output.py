"""What a program has printed, as text that is fit for the record. Pure; for `handlers.command`."""

import re
from collections.abc import Iterable

SHORTEST_HIDDEN = 6  # shorter ones are words like any other, and not secrets
HIDDEN = b"[hidden]"

_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")


class Printed:
    """Knows what must not be kept although a program may print it: its secrets, and the URLs of media."""

    def __init__(self, hidden: Iterable[str], limit: int) -> None:
        values = {value.encode(errors="replace") for value in hidden if len(value) >= SHORTEST_HIDDEN}
        self._hidden = sorted(values, key=lambda value: (-len(value), value))
        self._limit = limit

    @property
    def keep_bytes(self) -> int:
        """How many of the last bytes `text` wants to see: with what is cut off, no part of a secret may stay."""
        return self._limit + max(map(len, self._hidden), default=0)

    def text(self, tail: bytes, *, size: int) -> str:
        """Return the last part of an output of `size` bytes as plain text."""
        if len(tail) < size:
            tail = tail[max((_cut(value, tail) for value in self._hidden), default=0) :]
        for value in self._hidden:
            tail = tail.replace(value, HIDDEN)
        if len(tail) > self._limit or len(tail) < size:
            tail = tail[-self._limit :].lstrip(bytes(range(0x80, 0xC0))) if self._limit else b""  # half a character
        text = tail.decode(errors="replace").replace("\r\n", "\n").replace("\r", "\n")
        return _UNPRINTABLE.sub("\ufffd", text).strip()


def _cut(value: bytes, tail: bytes) -> int:
    """Return how many bytes of the end of `value` the tail begins with."""
    return next((size for size in range(len(value) - 1, 0, -1) if tail.startswith(value[-size:])), 0)
