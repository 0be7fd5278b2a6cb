"""All errors that the service raises on purpose, in one tree. This module imports no other.

ReceiverError
├── ConfigError               the settings are invalid; has all problems found
├── SignatureError            a callback does not verify; has the code of the refusal
├── PayloadError              a body from FLORA is not what FLORA documents
├── StoreError                the database cannot do this
│   ├── StoreUnavailableError    it is locked, full, read-only or unreachable; may work later
│   └── StoreInUseError          another process owns this SQLite file
├── FloraError                a call of FLORA's API failed; has status, code and request id
├── DownloadError             an output could not be downloaded
│   ├── DownloadRefusedError     permanently: private address, too large, not HTTPS
│   └── DownloadFailedError      may work later: cut off, stalled, 5xx, expired
├── CodingError               a body cannot be decoded (gzip, br, …), or would grow too large
├── PostError                 a POST failed, or its response never came
│   ├── PostRefusedError         nothing was sent: private address, certificate
│   └── PostFailedError          may work later; the request may have arrived all the same
├── AttemptOverError          a handler called its context after its attempt had ended
├── ReceiverApiError          the operations API refused or is unreachable (`receiver.client`)
├── TunnelError               a tunnel did not open; has the output of its program
├── TableError                the file of a batch is not a table
├── LocationTakenError        another run's output owns this location in a handler's storage
├── TargetUnreachableError    a handler's `check` cannot reach its target now; a warning
├── TargetDegradedError       a handler's `check` finds a target that works, but not fully; a warning
└── HandlerLoadError          a configured handler cannot be imported or built
    └── MissingExtraError        a library that it needs is not installed
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any


class ReceiverError(Exception):
    """Root of the tree."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One problem of the settings: its path (`handlers.0.max_attempts`) and what to do about it."""

    path: str
    message: str


class ConfigError(ReceiverError):
    """The settings are invalid. `problems` has everything found, never the value of a secret."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(f"{problem.path}: {problem.message}" for problem in self.problems))


class SignatureProblem(StrEnum):
    """Why a callback does not verify. The values are the error codes of the response."""

    MISSING_SIGNATURE = "missing_signature"
    MALFORMED_SIGNATURE = "malformed_signature"
    SIGNATURE_MISMATCH = "signature_mismatch"
    TIMESTAMP_OUT_OF_TOLERANCE = "timestamp_out_of_tolerance"


class SignatureError(ReceiverError):
    """A callback does not verify.

    If only the timestamp is wrong, the body is authentic and `secret` is the index of its secret.
    """

    def __init__(self, problem: SignatureProblem, message: str, *, secret: int | None = None) -> None:
        self.problem = problem
        self.secret = secret
        super().__init__(message)


class PayloadError(ReceiverError):
    """A callback or a response of FLORA's API is not what FLORA documents."""


class StoreError(ReceiverError):
    """The database cannot do this."""


class StoreUnavailableError(StoreError):
    """The database is locked, full, read-only or unreachable; nothing was committed.

    The same call may work later.
    """


class StoreInUseError(StoreError):
    """Another process owns this SQLite file."""


class FloraError(ReceiverError):
    """A call of FLORA's API failed.

    `status` is None if there was no HTTP response; `retry_after` is in seconds, at most an hour,
    if FLORA named one.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int | None = None,
        code: str | None = None,
        fields: Sequence[tuple[str, str]] = (),
        request_id: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        self.status = status
        self.code = code
        self.fields = tuple(fields)
        self.request_id = request_id
        self.retry_after = retry_after
        super().__init__(message)


class DownloadError(ReceiverError):
    """An output could not be downloaded."""


class DownloadRefusedError(DownloadError):
    """The download is not permitted and will not be: private address, too large, not HTTPS.

    What another response of the server could change is a DownloadFailedError.
    """


class DownloadFailedError(DownloadError):
    """The download may work later: cut off, stalled, 5xx, expired.

    `expired` means that the URL answered 403, 404 or 410, or with a page in place of the output: a
    read of the run returns a fresh one.
    `retry_after_seconds` is the pause that the server asked for, at most an hour, or None.
    """

    def __init__(
        self, message: str, *, expired: bool = False, retry_after_seconds: float | None = None
    ) -> None:
        self.expired = expired
        self.retry_after_seconds = retry_after_seconds
        super().__init__(message)


class CodingError(ReceiverError):
    """A body cannot be decoded; with `is_too_large` because it would grow beyond a limit."""

    def __init__(self, message: str, *, is_too_large: bool = False) -> None:
        self.is_too_large = is_too_large
        super().__init__(message)


class PostError(ReceiverError):
    """A POST failed, or its response never came."""


class PostRefusedError(PostError):
    """Nothing was sent, and retrying does not help: private address, invalid certificate."""


class PostFailedError(PostError):
    """The POST may work later: unreachable, cut off, timed out. It may have arrived anyway."""


class AttemptOverError(ReceiverError):
    """The handler called its context after its attempt had ended."""


class ReceiverApiError(ReceiverError):
    """The operations API refused a request, or is unreachable (`status` None, code `unreachable`).

    `fields` has pairs of field and message; `request_id` is FLORA's, if FLORA refused. Of a request
    to start a run, `idempotency_key` repeats it without a second run, and `start` is the start as
    the API shows it, if it is known.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int | None = None,
        code: str,
        fields: Sequence[tuple[str, str]] = (),
        request_id: str | None = None,
        idempotency_key: str | None = None,
        start: Mapping[str, Any] | None = None,
    ) -> None:
        self.status = status
        self.code = code
        self.message = message
        self.fields = tuple(fields)
        self.request_id = request_id
        self.idempotency_key = idempotency_key
        self.start = start
        super().__init__(message)


class TunnelError(ReceiverError):
    """A tunnel did not open. `printed` has the last lines of its program's output."""

    def __init__(self, message: str, *, printed: Sequence[str] = ()) -> None:
        self.printed = tuple(printed)
        super().__init__(message)


class TableError(ReceiverError):
    """The file of a batch is not a table. Problems of single rows are returned as values."""


class LocationTakenError(ReceiverError):
    """Another run's output owns this location in a handler's storage.

    `pending` means that nothing is stored there yet and that its handler is still at work on it, so
    that the location may become free.
    """

    def __init__(self, message: str, *, pending: bool = False) -> None:
        self.pending = pending
        super().__init__(message)


class TargetUnreachableError(ReceiverError):
    """Raised by a handler's `check` if its target is unreachable now. A warning: it may recover."""


class TargetDegradedError(ReceiverError):
    """Raised by a handler's `check` if its target works, with a flaw to know of. A warning."""


class HandlerLoadError(ReceiverError):
    """A configured handler cannot be imported or built."""


class MissingExtraError(HandlerLoadError):
    """A configured handler needs a library that is not installed; the message names the extra."""
