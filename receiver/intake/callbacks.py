"""The intake: callbacks enter by `accept`, every other report on a run by `apply`.

What is acceptable is decided here; `group_commit` commits it and `recorder` applies it to the
ledger. Called by `web` and by the workers.
"""

import hashlib
import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime

import structlog

from receiver.decide import Decision, Policy
from receiver.errors import PayloadError, SignatureError, SignatureProblem, StoreUnavailableError
from receiver.flora.messages import Callback, parse_callback
from receiver.flora.signature import Verified, canary_key, verify
from receiver.intake.group_commit import GroupCommit
from receiver.intake.recorder import Recorder
from receiver.model import CallbackReceived, Delivery, ReadRequested, Rejection, Report, Subscription
from receiver.store import Database, ledger
from receiver.store.changes import Signals
from receiver.store.database import check_writable
from receiver.telemetry import Metrics

log = structlog.get_logger("receiver.intake")

_CANARY_SECONDS = 60
"""Age at which a canary is no longer recognized."""
_MAX_REJECTIONS = 1000
"""Refused requests that wait for the janitor to write them down."""


@dataclass(frozen=True, slots=True)
class Accepted:
    """The callback is committed, and new."""


@dataclass(frozen=True, slots=True)
class Duplicate:
    """This delivery was committed before."""


@dataclass(frozen=True, slots=True)
class Ignored:
    """The callback is verified and committed, but its event type is unknown: nothing follows."""


@dataclass(frozen=True, slots=True)
class Canary:
    """Our own probe arrived unaltered, and the ledger is writable. Nothing is stored."""


@dataclass(frozen=True, slots=True)
class Refused:
    """The request is not an acceptable callback; `code` and `message` say why."""

    code: str
    message: str


CallbackResult = Accepted | Duplicate | Ignored | Canary | Refused


@dataclass(frozen=True, slots=True)
class Secret:
    """A webhook secret and the workspace it belongs to, if the settings name one."""

    value: str = field(repr=False)
    workspace_id: str | None = None


class Intake:
    """Accepts callbacks and applies reports. `close` waits until all of them are committed."""

    def __init__(
        self,
        database: Database,
        *,
        secrets: Sequence[Secret],
        subscriptions: Sequence[Subscription],
        policy: Policy,
        signals: Signals,
        metrics: Metrics,
        tolerance_past: int | None = 900,
        tolerance_future: int | None = 300,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
        jitter: Callable[[], float] = random.random,
    ) -> None:
        self._database = database
        self.set_secrets(secrets)
        self._tolerance_past = tolerance_past
        self._tolerance_future = tolerance_future
        self._clock = clock
        recorder = Recorder(policy, subscriptions, clock=clock, jitter=jitter)
        self._commits = GroupCommit(database, recorder, signals=signals, metrics=metrics, clock=clock)
        self.rejections: deque[Rejection] = deque(maxlen=_MAX_REJECTIONS)
        """Refused requests that are not in the database yet; the janitor empties it."""

    def set_secrets(self, secrets: Sequence[Secret]) -> None:
        """Verify the callbacks and canaries that follow with these secrets."""
        self._secrets = tuple(secrets)
        self._keys = tuple(secret.value for secret in secrets)
        self._canary_keys = tuple(canary_key(secret.value) for secret in secrets)

    async def accept(
        self, body: bytes, signature: str | None, *, remote: str | None = None, start: str | None = None
    ) -> CallbackResult:
        """Verify, parse and commit one callback. Raises StoreUnavailableError if that fails.

        `remote` is the sender's address. `start` is the token in the callback's URL, if any: it
        links the run to the start that made it.
        """
        now = self._clock()
        try:
            verified = self._verify(body, signature, now)
        except SignatureError as error:
            return await self._refuse_signature(error, body, signature, now, remote)
        try:
            callback = parse_callback(body)
        except PayloadError as error:
            delivery = _unreadable_delivery(body, signature, verified, now)
            return await self._refuse_payload(error, delivery, remote)
        if (mismatch := self._workspace_mismatch(verified, callback)) is not None:
            return self.refuse("workspace_mismatch", mismatch, remote=remote, size=len(body))
        delivery = _delivery(callback, body, signature, verified, now)
        committed = await self._commits.commit(_to_report(callback, now), delivery, start)
        if not committed.new_delivery:
            return Duplicate()
        return Accepted() if callback.callback_status is not None else Ignored()

    async def apply(self, report: Report, *, start: str | None = None) -> Decision:
        """Commit what a report does to its run, and return it. Raises StoreUnavailableError.

        `start` is the token of the start that made the run: the start is marked as started in the
        same commit.
        """
        return (await self._commits.commit(report, start=start)).decision

    def refuse(self, code: str, message: str, *, remote: str | None, size: int) -> Refused:
        """Record that a request of `size` bytes was refused. Nothing of its body is kept."""
        self.rejections.append(Rejection(self._clock(), code, remote, size))
        log.warning("callback.refused", code=code, remote=remote, size=size)
        return Refused(code, message)

    async def close(self) -> None:
        """Wait until everything that has arrived is committed."""
        await self._commits.close()

    def _verify(self, body: bytes, signature: str | None, now: datetime) -> Verified:
        return verify(
            body,
            signature,
            self._keys,
            now=int(now.timestamp()),
            tolerance_past=self._tolerance_past,
            tolerance_future=self._tolerance_future,
        )

    async def _refuse_signature(
        self, error: SignatureError, body: bytes, signature: str | None, now: datetime, remote: str | None
    ) -> Canary | Refused:
        """Refuse a body that does not verify, unless it is a canary."""
        if error.problem is SignatureProblem.TIMESTAMP_OUT_OF_TOLERANCE:
            await self._request_read(body, now)
        elif error.problem is SignatureProblem.SIGNATURE_MISMATCH and self._is_canary(body, signature, now):
            await self._database.write(check_writable)
            return Canary()
        return self.refuse(error.problem.value, str(error), remote=remote, size=len(body))

    async def _refuse_payload(self, error: PayloadError, delivery: Delivery, remote: str | None) -> Refused:
        """Refuse an authentic body that cannot be parsed.

        The body is kept, since FLORA may have changed its format.
        """
        await self._commits.commit(None, delivery)
        log.error("callback.unreadable", reason=str(error), size=len(delivery.body))
        return self.refuse("invalid_payload", str(error), remote=remote, size=len(delivery.body))

    def _workspace_mismatch(self, verified: Verified, callback: Callback) -> str | None:
        """Return why the secret and the run are not of the same workspace, or None."""
        owner = self._secrets[verified.secret].workspace_id
        if owner is None or callback.workspace_id is None or owner == callback.workspace_id:
            return None
        return f"signed with the secret of {owner}, but about a run of another workspace"

    def _is_canary(self, body: bytes, signature: str | None, now: datetime) -> bool:
        seconds = int(now.timestamp())
        try:
            verify(body, signature, self._canary_keys, now=seconds, tolerance_past=_CANARY_SECONDS)
        except SignatureError:
            return False
        return True

    async def _request_read(self, body: bytes, now: datetime) -> None:
        """Request a read of the run of a callback with a wrong timestamp, if it is not settled."""
        try:
            callback = parse_callback(body)
            known = await self._database.read(lambda tx: ledger.runs_by_id(tx, [callback.run_id]))
            if known and known[callback.run_id].settled_at is None:
                await self.apply(ReadRequested(callback.run_id, now))
        except (PayloadError, StoreUnavailableError):
            pass  # the callback is refused in any case; polling will find the run


def _to_report(callback: Callback, now: datetime) -> CallbackReceived | None:
    """Return what a callback reports, or None if its event type is unknown."""
    if callback.callback_status is None:
        return None
    return CallbackReceived(
        run_id=callback.run_id,
        callback_status=callback.callback_status,
        received_at=now,
        run_type=callback.run_type,
        workspace_id=callback.workspace_id,
        error_code=callback.error_code,
        error_message=callback.error_message,
    )


def _delivery(
    callback: Callback, body: bytes, signature: str | None, verified: Verified, now: datetime
) -> Delivery:
    return Delivery(
        delivery_id=callback.delivery_id,
        body=body,
        signature=signature or "",
        received_at=now,
        age=verified.age,
        secret=verified.secret,
        event=callback.event,
        api_version=callback.api_version,
        run_id=callback.run_id,
    )


def _unreadable_delivery(body: bytes, signature: str | None, verified: Verified, now: datetime) -> Delivery:
    return Delivery(
        delivery_id=f"sha256:{hashlib.sha256(body).hexdigest()}",
        body=body,
        signature=signature or "",
        received_at=now,
        age=verified.age,
        secret=verified.secret,
        readable=False,
    )
