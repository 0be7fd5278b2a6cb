"""What may be sent to the operations API: bodies, query parameters, cursors; each problem told with its field."""

import asyncio
import base64
import binascii
import json
import math
import re
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import AfterValidator, AwareDatetime, BaseModel, ConfigDict, Field, ValidationError, model_validator
from starlette.requests import ClientDisconnect, Request

from receiver.model import DispatchState, RunState, StartState
from receiver.web.ops.responses import Refusal, parsed

MAX_BODY_BYTES = 4 * 1024 * 1024
LONGEST_WAIT_SECONDS = 120.0
MOST_ROWS = 500
_MOST_DISCARDED = 4 * MAX_BODY_BYTES
"""Who is cut off while sending never reads why: up to here a body that is too large is read, and forgotten."""
_BODY_SECONDS = 30.0
_ID = re.compile(r"[^\s\x00-\x1f\x7f]{1,200}")
_RUN_ID = re.compile(r"run_[^\s\x00-\x1f\x7f/]{1,196}")
_LATEST = 2**63 - 1

T = TypeVar("T", bound=BaseModel)
State = TypeVar("State", RunState, StartState, DispatchState)


def _an_id(value: str) -> str:
    if not _ID.fullmatch(value) or value in {".", ".."}:
        raise ValueError("is not an id: 1 to 200 characters without white space")
    return value


def _a_run_id(value: str) -> str:
    if not _RUN_ID.fullmatch(value):
        raise ValueError("is not the id of a run: they look like run_abc")
    return value


Id = Annotated[str, AfterValidator(_an_id)]
RunId = Annotated[str, AfterValidator(_a_run_id)]


class Body(BaseModel):
    """A JSON object without room for a key that nobody reads."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, hide_input_in_errors=True)


class StartBody(Body):
    """`POST /api/runs`: `technique_id` with `inputs`, or `generate`, the body of FLORA's `POST /generate`."""

    technique_id: Id | None = None
    inputs: list[dict[str, Any]] = Field(default=[], max_length=1000)
    generate: dict[str, Any] | None = None
    mode: Literal["async", "stream"] = "async"
    callback_url: str | None = Field(None, max_length=2000)
    idempotency_key: str | None = Field(None, min_length=1, max_length=255, pattern=r"^[^\x00-\x1f\x7f]+$")
    metadata: dict[str, Any] = {}
    workspace_id: Id | None = None
    wait_seconds: float = Field(30, ge=0, le=60, allow_inf_nan=False)

    @model_validator(mode="after")
    def _one_of_two(self) -> Self:
        if (self.technique_id is None) == (self.generate is None):
            raise ValueError("give technique_id, or generate, and not both")
        if self.generate is not None and self.inputs:
            raise ValueError("inputs belong to a technique, not to generate")
        return self


class TrackBody(Body):
    """`POST /api/runs/track`: a run that someone else started, by its id or by its poll_url."""

    run_id: RunId | None = None
    poll_url: str | None = Field(None, min_length=1, max_length=2000)
    technique_id: Id | None = None
    run_type: Literal["technique", "generation", "action"] | None = None
    workspace_id: Id | None = None
    callback_expected: bool = False
    metadata: dict[str, Any] = {}

    @model_validator(mode="after")
    def _named(self) -> Self:
        if self.run_id is None and self.poll_url is None:
            raise ValueError("give run_id or poll_url")
        return self


class RefreshBody(Body):
    """`POST /api/runs/{run_id}/refresh`."""


class RedispatchBody(Body):
    """`POST /api/runs/{run_id}/redispatch`; `again` opens a new round, with idempotency keys of its own."""

    handler: str | None = Field(None, min_length=1, max_length=64)
    again: bool = False


class MissingBody(Body):
    """`POST /api/runs/redispatch`: the runs settled since then that a handler added later was never told of."""

    handler: str = Field(min_length=1, max_length=64)
    since: Annotated[AwareDatetime, Field(strict=False)]
    limit: int = Field(100, ge=1, le=MOST_ROWS)


class RetryBody(Body):
    """`POST /api/dispatches/retry`."""

    handler: str | None = Field(None, min_length=1, max_length=64)
    run_id: Id | None = None


class BackupBody(Body):
    """`POST /api/backup`: where the copy goes, as the service sees it; nothing is overwritten."""

    path: str = Field(min_length=2, max_length=1000, pattern=r"^/[^\x00]*[^/\x00]$")


class ResolveBody(Body):
    """`POST /api/starts/{token}/resolve`: the run that the start made, or null for none at all."""

    run_id: RunId | None


async def read(request: Request, model: type[T]) -> T:
    """Return the request's body as `model`, or raise Refusal with every problem and its field."""
    try:
        async with asyncio.timeout(_BODY_SECONDS):
            body = await _bytes(request)
    except (TimeoutError, ClientDisconnect) as error:
        raise Refusal(408, "body_timeout", "the body did not arrive in time") from error
    try:
        return model.model_validate(parsed(body) if body else {})
    except ValidationError as error:
        details = error.errors(include_url=False, include_input=False, include_context=False)
        fields = [
            (".".join(str(part) for part in detail["loc"]), detail["msg"].removeprefix("Value error, "))
            for detail in details[:100]
        ]
        message = "; ".join(f"{field}: {message}" if field else message for field, message in fields[:3])
        raise Refusal(400, "invalid_request", message, fields=fields) from error


async def _bytes(request: Request) -> bytes:
    body, size = bytearray(), 0
    async for chunk in request.stream():
        size += len(chunk)
        if size <= MAX_BODY_BYTES:
            body += chunk
        elif size > _MOST_DISCARDED:
            break
    if size <= MAX_BODY_BYTES:
        return bytes(body)
    raise Refusal(413, "body_too_large", f"a body has at most {MAX_BODY_BYTES} bytes", headers={"Connection": "close"})


def limit_of(request: Request) -> int:
    """Return `?limit=`, 1 to 500, 100 by default."""
    given = request.query_params.get("limit", "100")
    if not given.isascii() or not given.isdecimal() or not 1 <= int(given[:9]) <= MOST_ROWS:
        raise wrong("limit", f"must be a whole number from 1 to {MOST_ROWS}")
    return int(given)


def seconds_of(request: Request, *, default: float) -> float:
    """Return `?timeout=` in seconds, 0 to 120."""
    given = request.query_params.get("timeout")
    try:
        seconds = default if given is None else float(given)
    except ValueError:
        seconds = math.nan
    if not 0 <= seconds <= LONGEST_WAIT_SECONDS:
        raise wrong("timeout", f"must be a number of seconds from 0 to {LONGEST_WAIT_SECONDS:g}")
    return seconds


def flag_of(request: Request, name: str) -> bool:
    """Return `?name=`, `true` or `false`; false by default."""
    given = request.query_params.get(name, "false")
    if given not in {"true", "false"}:
        raise wrong(name, "must be true or false")
    return given == "true"


def state_of(request: Request, states: type[State]) -> State | None:
    """Return `?state=`, one of an enumeration's words."""
    given = request.query_params.get("state")
    if given is None:
        return None
    try:
        return states(given)
    except ValueError as error:
        raise wrong("state", f"must be one of {', '.join(state.value for state in states)}") from error


def cursor_of(request: Request) -> tuple[int, str] | None:
    """Return the key in `?cursor=`: a number, and an id."""
    given = request.query_params.get("cursor")
    if not given:
        return None
    try:
        match json.loads(base64.urlsafe_b64decode(given.encode("ascii", "strict"))):
            case [int(number), str(identifier)] if 0 <= number <= _LATEST and identifier.isprintable():
                return number, identifier
    except (ValueError, binascii.Error, RecursionError):
        pass
    raise wrong("cursor", "is not a cursor of this list")


def cursor(number: int, identifier: str = "") -> str:
    """Return the cursor that `cursor_of` reads."""
    return base64.urlsafe_b64encode(json.dumps([number, identifier]).encode()).decode()


def wrong(field: str, message: str) -> Refusal:
    """Return the refusal of one field."""
    return Refusal(400, "invalid_request", f"{field} {message}", fields=[(field, message)])
