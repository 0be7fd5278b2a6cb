"""Sends callbacks: one per ended run, in up to four signed attempts, with the faults that apply."""

import asyncio
import contextlib
import json
import random
import ssl
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from receiver.emulator.faults import Family, Fault, FaultBook
from receiver.emulator.runs import Run, RunBook
from receiver.emulator.settings import EmulatorSettings
from receiver.flora.signature import HEADER, sign

if TYPE_CHECKING:
    import httpx

__all__ = ["RETRY_SECONDS", "Attempt", "Callbacks", "Delivery"]

RETRY_SECONDS = (10.0, 60.0, 300.0)
_TIMEOUT_SECONDS = 10.0
_API_VERSION = "2026-06-11"


@dataclass(frozen=True, slots=True)
class Attempt:
    """One POST, sent or dropped.

    `status` is that of the response, else `error` is set; `at` is in unix milliseconds.
    """

    attempt: int
    copy: int
    at: int
    signature: str
    status: int | None = None
    error: str | None = None

    @property
    def is_accepted(self) -> bool:
        return self.status is not None and 200 <= self.status < 300


@dataclass(slots=True)
class Delivery:
    """One callback. `state` is `sending`, then `delivered` or `failed`; the body never changes."""

    delivery_id: str
    run_id: str
    url: str
    event: str
    body: bytes
    faults: tuple[Fault, ...]
    first_at: int
    state: str = "sending"
    attempts: list[Attempt] = field(default_factory=list)

    def fault(self, kind: str, attempt: int) -> Fault | None:
        return next(
            (fault for fault in self.faults if fault.kind == kind and fault.applies_to(attempt)), None
        )

    def to_json(self) -> dict[str, object]:
        return {
            "delivery_id": self.delivery_id,
            "run_id": self.run_id,
            "callback_url": self.url,
            "event": self.event,
            "state": self.state,
            "attempts": [
                {
                    "attempt": one.attempt,
                    "copy": one.copy,
                    "at": one.at,
                    "signature": one.signature,
                    "status": one.status,
                    "error": one.error,
                }
                for one in self.attempts
            ],
        }


class Callbacks:
    """Sends callbacks in the background.

    `deliveries` has those that were sent so far, oldest first.
    """

    def __init__(
        self,
        settings: EmulatorSettings,
        runs: RunBook,
        faults: FaultBook,
        *,
        clock: Callable[[], float],
        randomness: random.Random,
    ) -> None:
        self.deliveries: list[Delivery] = []
        self._settings = settings
        self._runs = runs
        self._faults = faults
        self._clock = clock
        self._random = randomness
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._held: list[asyncio.Event] = []
        self._client: httpx.AsyncClient | None = None

    def schedule(self, run: Run) -> None:
        """Send the callback of `run` when it ends.

        Another call before that follows a changed end.
        """
        if run.callback_url is None or any(delivery.run_id == run.run_id for delivery in self.deliveries):
            return
        waiting = self._tasks.pop(run.run_id, None)
        if waiting is not None:
            waiting.cancel()
        task = asyncio.create_task(
            self._send(run.run_id, run.callback_url), name=f"callback of {run.run_id}"
        )
        self._tasks[run.run_id] = task
        task.add_done_callback(lambda done: self._forget(run.run_id, done))

    async def drain(self) -> None:
        """Wait until no callback is pending."""
        while self._tasks:
            await asyncio.wait(self._tasks.values())

    async def aclose(self) -> None:
        """Cancel pending callbacks."""
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._client is not None:
            await self._client.aclose()
            self._client = None

    def _forget(self, run_id: str, done: asyncio.Task[None]) -> None:
        if self._tasks.get(run_id) is done:
            del self._tasks[run_id]

    async def _send(self, run_id: str, url: str) -> None:
        run = await self._wait_for_end(run_id)
        delivery = self._delivery(run, url)
        self.deliveries.append(delivery)
        await self._hold(delivery)
        await self._attempts(delivery)

    async def _wait_for_end(self, run_id: str) -> Run:
        """Return the run once it has ended. A sleep may end a little early, hence the loop."""
        while True:
            run = self._runs.get(run_id)
            remaining = run.ends_at - self._clock()
            if remaining <= 0:
                return run
            await asyncio.sleep(remaining)

    def _delivery(self, run: Run, url: str) -> Delivery:
        faults = self._faults.take(Family.CALLBACK, run_id=run.run_id)
        failed = run.error_code is not None
        if any(fault.kind == "contradict" for fault in faults):
            failed = not failed
        status = "failed" if failed else "completed"
        data: dict[str, object] = {
            "run_id": run.run_id,
            "run_type": run.subject.run_type,
            "workspace_id": run.workspace_id,
            "status": status,
        }
        if failed:
            data |= {"error_code": run.error_code or "internal_error", "error_message": run.error_message}
        now = self._clock()
        document = {
            "id": self._runs.new_id("whd"),
            "type": f"run.{status}",
            "api_version": _API_VERSION,
            "created_at": round(now * 1000),
            "data": data,
        }
        return Delivery(
            delivery_id=str(document["id"]),
            run_id=run.run_id,
            url=url,
            event=f"run.{status}",
            body=json.dumps(document, separators=(",", ":")).encode(),
            faults=faults,
            first_at=int(now),
        )

    async def _hold(self, delivery: Delivery) -> None:
        """Wait as long as the faults `delay` and `reorder` require.

        `reorder` lets the callback of another run overtake this one.
        """
        if (delay := delivery.fault("delay", 1)) is not None:
            await asyncio.sleep(delay.number("seconds"))
        if (reorder := delivery.fault("reorder", 1)) is not None:
            overtaken = asyncio.Event()
            self._held.append(overtaken)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(overtaken.wait(), reorder.number("seconds"))

    async def _attempts(self, delivery: Delivery) -> None:
        for attempt, wait in enumerate((0.0, *RETRY_SECONDS), 1):
            await asyncio.sleep(wait / self._settings.time_scale)
            duplicate = delivery.fault("duplicate", attempt)
            copies = int(duplicate.number("copies")) if duplicate is not None else 0
            sent = await asyncio.gather(
                *(self._attempt(delivery, attempt, copy) for copy in range(copies + 1))
            )
            delivery.attempts.extend(sent)
            if attempt == 1:
                self._release_held()
            if any(one.is_accepted for one in sent):
                delivery.state = "delivered"
                return
        delivery.state = "failed"

    def _release_held(self) -> None:
        for overtaken in self._held:
            overtaken.set()
        self._held.clear()

    async def _attempt(self, delivery: Delivery, attempt: int, copy: int) -> Attempt:
        signature = self._signature(delivery, attempt)
        at = round(self._clock() * 1000)
        if delivery.fault("drop", attempt) is not None:
            return Attempt(attempt, copy, at, signature, error="dropped")
        body = delivery.body
        if delivery.fault("corrupt", attempt) is not None:
            middle = len(body) // 2
            body = body[:middle] + bytes((body[middle] ^ 1,)) + body[middle + 1 :]
        headers = {
            "content-type": "application/json",
            HEADER: signature,
            "Flora-Webhook-Id": delivery.delivery_id,
            "Flora-Event": delivery.event,
        }
        try:
            status = await self._post(delivery.url, body, headers)
        except Exception as error:
            return Attempt(attempt, copy, at, signature, error=f"{type(error).__name__}: {error}")
        return Attempt(attempt, copy, at, signature, status=status)

    async def _post(self, url: str, body: bytes, headers: dict[str, str]) -> int:
        scaled = max(1.0, _TIMEOUT_SECONDS / self._settings.time_scale)
        async with asyncio.timeout(self._settings.callback_timeout_seconds or scaled):
            response = await self._http().post(url, content=body, headers=headers)
        return response.status_code

    def _http(self) -> "httpx.AsyncClient":
        if self._client is None:
            import httpx  # noqa: PLC0415  # half of this package's import time, for callbacks alone

            authority = self._settings.callback_ca
            self._client = httpx.AsyncClient(
                # With a cafile, create_default_context trusts that file and nothing else.
                verify=True if authority is None else ssl.create_default_context(cafile=authority),
                follow_redirects=False,
                trust_env=False,
                timeout=httpx.Timeout(None),  # `_post` limits the whole call
                headers={"user-agent": "flora-emulator"},
            )
        return self._client

    def _signature(self, delivery: Delivery, attempt: int) -> str:
        seconds = delivery.first_at
        refresh = delivery.fault("refresh_timestamp", attempt)
        if self._settings.refresh_timestamps if refresh is None else bool(refresh.options["refresh"]):
            seconds = int(self._clock())
        if (stale := delivery.fault("stale", attempt)) is not None:
            seconds -= int(stale.number("seconds"))
        one, *others = (
            sign(delivery.body, secret, timestamp=seconds) for secret in self._secrets(delivery, attempt)
        )
        return ",".join((one, *(other.partition(",")[2] for other in others)))

    def _secrets(self, delivery: Delivery, attempt: int) -> tuple[str, ...]:
        if delivery.fault("wrong_secret", attempt) is not None:
            return (f"whsec_{self._random.getrandbits(64):016x}",)
        secrets = self._settings.webhook_secrets
        if (old := delivery.fault("old_secret", attempt)) is not None:
            return (old.text("secret") or secrets[-1],)
        return secrets if self._settings.sign_with_all else secrets[:1]
