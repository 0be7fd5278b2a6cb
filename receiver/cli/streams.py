"""The standard streams and the last words of every command, whatever it was started with.

A stream may be closed (`2>&-`), lead to a program that is gone, or be in an encoding that lacks most
characters. What was asked for is done all the same. Warnings of libraries are not shown, and a
traceback, which only a bug prints, shows no secret.
"""

import contextlib
import io
import logging
import os
import sys
import threading
import traceback
import warnings
from collections.abc import Iterator
from types import TracebackType
from typing import TextIO

from receiver.net.scrubber import mask

__all__ = ["guard_streams", "is_unicode"]

_FAILED = 1


@contextlib.contextmanager
def guard_streams() -> Iterator[None]:
    """Run a command with streams that it can use; report a bug in it, or output that is lost."""
    _open_closed()
    _widen()
    _quiet_libraries()
    try:
        yield
    except Exception as error:  # a bug: the traceback is printed, without secrets
        _print_traceback(error, error.__traceback__)
        sys.exit(_FAILED)
    finally:
        _flush_output()


def is_unicode(stream: TextIO) -> bool:
    """Return whether a stream has every character."""
    return (stream.encoding or "utf-8").lower().replace("-", "").startswith("utf")


class _PatientText(io.TextIOWrapper):
    """Standard error whose readers may go away: a batch must not end halfway because of that."""

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            super().write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            super().flush()


def _open_closed() -> None:
    """Put the null device in place of closed streams.

    The next file or socket would otherwise get the descriptor, and what is printed into it.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
        if getattr(sys, name) is None:
            null = os.open(os.devnull, os.O_RDWR)
            setattr(sys, name, os.fdopen(null, "w" if number else "r", encoding="utf-8"))


def _widen() -> None:
    """Print what an encoding lacks by its code, and keep errors of standard error to itself."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    if isinstance(sys.stderr, io.TextIOWrapper):
        encoding = sys.stderr.encoding
        sys.stderr.flush()
        sys.stderr = _PatientText(
            sys.stderr.detach(), encoding=encoding, errors="backslashreplace", line_buffering=True
        )


def _quiet_libraries() -> None:
    if not sys.warnoptions:  # set by developers, with -W or PYTHONWARNINGS
        warnings.simplefilter("ignore")
    logging.lastResort = _LastResort(sys.stderr)
    logging.lastResort.setLevel(logging.WARNING)
    threading.excepthook = lambda args: _print_traceback(args.exc_value, args.exc_traceback)


class _LastResort(logging.StreamHandler[TextIO]):
    """Prints records of libraries in commands that do not configure logging."""

    def format(self, record: logging.LogRecord) -> str:
        return mask(super().format(record))


def _print_traceback(error: BaseException | None, trace: TracebackType | None) -> None:
    if error is not None:
        sys.stderr.write(mask("".join(traceback.format_exception(type(error), error, trace))))


def _flush_output() -> None:
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        _replace_output()
        sys.exit(_FAILED)
    except OSError as error:
        _replace_output()
        sys.stderr.write(f"Error: the output cannot be written: {error.strerror}\n")
        sys.exit(_FAILED)


def _replace_output() -> None:
    """Have Python find nothing to flush at its end, which it would complain about."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, sys.stdout.fileno())
    os.close(null)
