"""Every error this service raises on purpose, in one tree. Anyone may import it; it imports nothing of ours.

ReceiverError
├── ConfigError               the settings cannot be used; carries every problem found, each with its path
├── SignatureError            a callback that does not verify; carries its refusal code
├── PayloadError              bytes from FLORA, pushed or read, that are not what it documents
├── StoreError                the database cannot do this
│   ├── StoreUnavailableError    locked, full, read-only or unreachable: nothing was committed, the same call may work later
│   └── StoreInUseError          another process owns this SQLite file
├── FloraError                an API call that was not answered as asked; carries status, code and request-id
├── DownloadError             an output that could not be fetched
│   ├── DownloadRefusedError     and never will be: private address, too large, not HTTPS
│   └── DownloadFailedError      but may be later: cut, stalled, 5xx, expired
├── PostError                 something that could not be posted, or to which no answer came
│   ├── PostRefusedError         nothing was sent, nor will be before someone changes something: private address, certificate
│   └── PostFailedError          but may be later: nobody there, cut, no answer in time; it may have arrived all the same
├── AttemptOverError          a function that was left behind wants something of its context
├── ReceiverApiError          the operations API refused, or cannot be reached; raised by `receiver.client` alone
├── TunnelError               a tunnel that did not open; carries what its program printed
├── TableError                a batch's file that is no table at all
├── LocationTakenError        another run's output already owns this place in a handler's storage
├── TargetUnreachableError    a handler's own check: nobody answers there now; a warning, since that may pass
└── HandlerLoadError          a configured handler that cannot be imported or built
    └── MissingExtraError        because a library that it needs is not installed
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum


class ReceiverError(Exception):
    """Root of the tree."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing wrong with the settings: where (`handlers.0.max_attempts`) and what to do about it."""

    path: str
    message: str


class ConfigError(ReceiverError):
    """The settings cannot be used. `problems` holds everything found, never a secret's value."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(f"{problem.path}: {problem.message}" for problem in self.problems))


class SignatureProblem(StrEnum):
    """Why a callback does not verify; the values are the codes of the public answer."""

    MISSING_SIGNATURE = "missing_signature"
    MALFORMED_SIGNATURE = "malformed_signature"
    SIGNATURE_MISMATCH = "signature_mismatch"
    TIMESTAMP_OUT_OF_TOLERANCE = "timestamp_out_of_tolerance"


class SignatureError(ReceiverError):
    """A callback that does not verify.

    `secret` is the index of the secret that made the signature when only the time is wrong: the body is authentic then.
    """

    def __init__(self, problem: SignatureProblem, message: str, *, secret: int | None = None) -> None:
        self.problem = problem
        self.secret = secret
        super().__init__(message)


class PayloadError(ReceiverError):
    """Bytes from FLORA, pushed or read, that are not what it documents."""


class StoreError(ReceiverError):
    """The database cannot do this."""


class StoreUnavailableError(StoreError):
    """Locked, full, read-only or unreachable: nothing was committed, the same call may work later."""


class StoreInUseError(StoreError):
    """Another process owns this SQLite file."""


class FloraError(ReceiverError):
    """An API call that was not answered as asked.

    `status` is None when no HTTP answer came at all; `retry_after` is in seconds, when FLORA named one.
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
    """An output that could not be fetched."""


class DownloadRefusedError(DownloadError):
    """An output that will never be fetched: private address, too large, not HTTPS."""


class DownloadFailedError(DownloadError):
    """An output that may be fetched later: cut, stalled, 5xx, expired.

    `expired` tells that the URL itself answered 403, 404 or 410: the run should be read again for a fresh one.
    """

    def __init__(self, message: str, *, expired: bool = False) -> None:
        self.expired = expired
        super().__init__(message)


class PostError(ReceiverError):
    """Something that could not be posted, or to which no answer came."""


class PostRefusedError(PostError):
    """Nothing was sent, and will not be before someone changes something: private address, certificate."""


class PostFailedError(PostError):
    """It may work later: nobody there, cut, no answer in time. It may have arrived all the same."""


class AttemptOverError(ReceiverError):
    """A plain function calls its context after its attempt has ended: it should end, too."""


class ReceiverApiError(ReceiverError):
    """The operations API refused, or cannot be reached (`status` None, code `unreachable`).

    `fields` are (field, message); `request_id` is FLORA's, where it was FLORA that refused.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int | None = None,
        code: str,
        fields: Sequence[tuple[str, str]] = (),
        request_id: str | None = None,
    ) -> None:
        self.status = status
        self.code = code
        self.message = message
        self.fields = tuple(fields)
        self.request_id = request_id
        super().__init__(message)


class TunnelError(ReceiverError):
    """A tunnel that did not open: what to do about it, and the last lines that its program printed."""

    def __init__(self, message: str, *, printed: Sequence[str] = ()) -> None:
        self.printed = tuple(printed)
        super().__init__(message)


class TableError(ReceiverError):
    """A batch's file that is no table at all; what is wrong with single rows is told as values."""


class LocationTakenError(ReceiverError):
    """Another run's output already owns this place in a handler's storage."""


class TargetUnreachableError(ReceiverError):
    """Raised by a handler's own `check`: its target does not answer now. A warning, since that may pass."""


class HandlerLoadError(ReceiverError):
    """A configured handler that cannot be imported or built."""


class MissingExtraError(HandlerLoadError):
    """A configured handler needs a library that is not installed; says which extra brings it."""
