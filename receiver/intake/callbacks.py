"""The one door of the ledger: callbacks come in by `accept`, everything else that tells of a run by `apply`.

What may come in is judged here; how it is committed is `commits.py`, what it does to the ledger `recording.py`. Called by
web, poller, janitor, starter.
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
from receiver.store.touching import check_writable
from receiver.telemetry import Metrics

log = structlog.get_logger("receiver.intake")

_CANARY_SECONDS = 60


@dataclass(frozen=True, slots=True)
class Accepted:
    """The callback is committed, and new."""


@dataclass(frozen=True, slots=True)
class Duplicate:
    """This delivery was committed before."""


@dataclass(frozen=True, slots=True)
class Ignored:
    """Verified and committed, but of an event type that we do not know: nothing is done."""


@dataclass(frozen=True, slots=True)
class Canary:
    """Not a callback but a probe of our own that came all the way, unaltered; the ledger takes writes, and has none of it."""


@dataclass(frozen=True, slots=True)
class Refused:
    """Not a callback that we take: `code` and `message` tell the sender why."""

    code: str
    message: str


Answer = Accepted | Duplicate | Ignored | Canary | Refused


@dataclass(frozen=True, slots=True)
class Secret:
    """A webhook secret and the workspace it belongs to, where the settings say so."""

    value: str = field(repr=False)
    workspace_id: str | None = None


class Intake:
    """The door. `close` commits what has arrived."""

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
        self._secrets = tuple(secrets)
        self._keys = tuple(secret.value for secret in secrets)
        self._canaries = tuple(canary_key(secret.value) for secret in secrets)
        self._tolerance_past = tolerance_past
        self._tolerance_future = tolerance_future
        self._clock = clock
        recorder = Recorder(policy, subscriptions, clock=clock, jitter=jitter)
        self._commits = GroupCommit(database, recorder, signals=signals, metrics=metrics, clock=clock)
        self.rejections: deque[Rejection] = deque(maxlen=1000)
        """Refused requests not written down yet; the janitor empties it."""

    async def accept(
        self, body: bytes, signature: str | None, *, remote: str | None = None, start: str | None = None
    ) -> Answer:
        """Verify, parse and commit one callback. Raises StoreUnavailableError if it could not be committed.

        `start` is the token that the callback's URL carried, if any: it links the run to our intent to start it.
        """
        now = self._clock()
        try:
            verified = verify(
                body,
                signature,
                self._keys,
                now=int(now.timestamp()),
                tolerance_past=self._tolerance_past,
                tolerance_future=self._tolerance_future,
            )
        except SignatureError as error:
            if error.problem is SignatureProblem.TIMESTAMP_OUT_OF_TOLERANCE:
                await self._look_anyway(body, now)
            elif error.problem is SignatureProblem.SIGNATURE_MISMATCH and self._is_canary(body, signature, now):
                await self._database.write(check_writable)
                return Canary()
            return self.refuse(error.problem.value, str(error), remote=remote, size=len(body))
        try:
            callback = parse_callback(body)
        except PayloadError as error:
            # Authentic, so worth keeping: FLORA may have changed its format.
            await self._commits.enter(None, _unreadable(body, signature, verified, now))
            log.error("callback.unreadable", reason=str(error), size=len(body))
            return self.refuse("invalid_payload", str(error), remote=remote, size=len(body))
        owner = self._secrets[verified.secret].workspace_id
        if owner is not None and callback.workspace_id is not None and owner != callback.workspace_id:
            message = f"signed with the secret of {owner}, but about a run of another workspace"
            return self.refuse("workspace_mismatch", message, remote=remote, size=len(body))
        delivery = Delivery(
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
        recorded = await self._commits.enter(_heard(callback, now), delivery, start)
        if not recorded.new_delivery:
            return Duplicate()
        return Accepted() if callback.callback_status is not None else Ignored()

    async def apply(self, report: Report, *, start: str | None = None) -> Decision:
        """Commit what a report does to its run, and return it. Raises StoreUnavailableError.

        With `start`, the report's run is that start's: both are committed together.
        """
        return (await self._commits.enter(report, start=start)).decision

    def refuse(self, code: str, message: str, *, remote: str | None, size: int) -> Refused:
        """Note a refusal, for operators; nothing of the body is kept."""
        self.rejections.append(Rejection(self._clock(), code, remote, size))
        log.warning("callback.refused", code=code, remote=remote, size=size)
        return Refused(code, message)

    async def close(self) -> None:
        """Wait until everything that has arrived is committed."""
        await self._commits.close()

    def _is_canary(self, body: bytes, signature: str | None, now: datetime) -> bool:
        try:
            verify(body, signature, self._canaries, now=int(now.timestamp()), tolerance_past=_CANARY_SECONDS)
        except SignatureError:
            return False
        return True

    async def _look_anyway(self, body: bytes, now: datetime) -> None:
        """An authentic callback at a wrong time is refused; yet a run that we wait for is worth a look."""
        try:
            callback = parse_callback(body)
            known = await self._database.read(lambda tx: ledger.runs_by_id(tx, [callback.run_id]))
            if known and known[callback.run_id].settled_at is None:
                await self.apply(ReadRequested(callback.run_id, now))
        except (PayloadError, StoreUnavailableError):
            pass  # it stays refused; polling will find the run


def _heard(callback: Callback, now: datetime) -> CallbackReceived | None:
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


def _unreadable(body: bytes, signature: str | None, verified: Verified, now: datetime) -> Delivery:
    return Delivery(
        delivery_id=f"sha256:{hashlib.sha256(body).hexdigest()}",
        body=body,
        signature=signature or "",
        received_at=now,
        age=verified.age,
        secret=verified.secret,
        readable=False,
    )
