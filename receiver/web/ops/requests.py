"""Requests to the operations API: bodies, query parameters and cursors.

A request that cannot be used is refused with every problem and its field.
"""

import asyncio
import base64
import binascii
import json
import math
import re
from collections.abc import Callable, Sequence
from http import HTTPStatus
from typing import Annotated, Any, Literal, Self, TypeVar
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    AwareDatetime,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)
from starlette.requests import ClientDisconnect, Request

from receiver.model import DispatchState, RunState, StartState, parse_strict_json
from receiver.web.ops.responses import Refusal
from receiver.web.values import LONGEST_ID, LONGEST_KEY, find_problem

MAX_BODY_BYTES = 4 * 1024 * 1024
LONGEST_WAIT_SECONDS = 120.0
MOST_ROWS = 500
DEFAULT_ROWS = 100
_MOST_DISCARDED = 4 * MAX_BODY_BYTES
"""A body that is too large is read and discarded up to this size: a client that is cut off while
it sends does not read the response."""
_BODY_SECONDS = 30.0
_ID = re.compile(r"[^\s\x00-\x1f\x7f]{1,200}")
_RUN_ID = re.compile(r"run_[^\s\x00-\x1f\x7f/]{1,196}")
_LATEST = 2**63 - 1
LONGEST_PARAMETER = 1000
_HEADER_VALUE = re.compile(r"[!-~]([ -~]*[!-~])?")

T = TypeVar("T", bound=BaseModel)
Row = TypeVar("Row")
State = TypeVar("State", RunState, StartState, DispatchState)


def _check_id(value: str) -> str:
    if not _ID.fullmatch(value) or value in {".", ".."}:
        raise ValueError("is not an id: 1 to 200 characters without white space")
    return value


def _check_run_id(value: str) -> str:
    if not _RUN_ID.fullmatch(value):
        raise ValueError("is not the id of a run, such as run_abc")
    return value


def _check_url(value: str) -> str:
    try:
        urlsplit(value)
    except ValueError as error:
        raise ValueError("is not a URL") from error
    return value


def _check_generate(value: dict[str, Any]) -> dict[str, Any]:
    try:
        urlsplit(str(value.get("callback_url")))
    except ValueError as error:
        raise ValueError("callback_url is not a URL") from error
    return value


Id = Annotated[str, AfterValidator(_check_id)]
RunId = Annotated[str, AfterValidator(_check_run_id)]


class Body(BaseModel):
    """The JSON object in a request; an unknown key is refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, hide_input_in_errors=True)


class StartBody(Body):
    """`POST /api/runs`: `technique_id` with `inputs`, or `generate`, FLORA's own body."""

    technique_id: Id | None = None
    inputs: list[dict[str, Any]] = Field(default=[], max_length=1000)
    generate: Annotated[dict[str, Any], AfterValidator(_check_generate)] | None = None
    mode: Literal["async", "stream"] = "async"
    callback_url: Annotated[str, AfterValidator(_check_url)] | None = Field(None, max_length=2000)
    idempotency_key: str | None = Field(
        None, min_length=1, max_length=LONGEST_KEY, pattern=r"^[^\x00-\x1f\x7f]+$"
    )
    metadata: dict[str, Any] = {}
    workspace_id: Id | None = None
    wait_seconds: float = Field(30, ge=0, le=60, allow_inf_nan=False)

    @model_validator(mode="after")
    def _check_target(self) -> Self:
        if (self.technique_id is None) == (self.generate is None):
            raise ValueError("give technique_id, or generate, and not both")
        if self.generate is not None and self.inputs:
            raise ValueError("inputs belong to a technique, not to generate")
        # FLORA gets the key of a technique's run in the body, but this one in a header.
        key = self.idempotency_key
        if self.generate is not None and key is not None and not _HEADER_VALUE.fullmatch(key):
            raise ValueError("idempotency_key of generate must be ASCII without white space at its ends")
        return self


class TrackBody(Body):
    """`POST /api/runs/track`: a run that another program started, by its id or by its poll_url."""

    run_id: RunId | None = None
    poll_url: str | None = Field(None, min_length=1, max_length=2000)
    technique_id: Id | None = None
    run_type: Literal["technique", "generation", "action"] | None = None
    workspace_id: Id | None = None
    callback_expected: bool = False
    metadata: dict[str, Any] = {}

    @model_validator(mode="after")
    def _check_run_named(self) -> Self:
        if self.run_id is None and self.poll_url is None:
            raise ValueError("give run_id or poll_url")
        return self


class RefreshBody(Body):
    """`POST /api/runs/{run_id}/refresh`."""


class RedispatchBody(Body):
    """`POST /api/runs/{run_id}/redispatch`; `again` opens a round with new idempotency keys."""

    handler: str | None = Field(None, min_length=1, max_length=64)
    again: bool = False


class MissingBody(Body):
    """`POST /api/runs/redispatch`: the runs settled since a time, for a handler added later."""

    handler: str = Field(min_length=1, max_length=64)
    since: Annotated[AwareDatetime, Field(strict=False)]
    limit: int = Field(100, ge=1, le=MOST_ROWS)


class RetryBody(Body):
    """`POST /api/dispatches/retry`; without a limit the response comes when all are due."""

    handler: str | None = Field(None, min_length=1, max_length=64)
    run_id: Id | None = None
    all: bool = False
    limit: int | None = Field(None, ge=1, le=10_000)
    cursor: str | None = Field(None, max_length=100)

    @model_validator(mode="after")
    def _check_chosen(self) -> Self:
        if self.all == (self.handler is not None or self.run_id is not None):
            raise ValueError('give handler or run_id or both, or else "all": true')
        return self


class BackupBody(Body):
    """`POST /api/backup`: the path of the copy on the service's machine; nothing is overwritten."""

    path: str = Field(min_length=2, max_length=1000, pattern=r"^/[^\x00]*[^/\x00]$")

    @field_validator("path")
    @classmethod
    def _check_name(cls, path: str) -> str:
        if path.rpartition("/")[2] in {".", ".."}:
            raise ValueError("is not the path of a file")
        return path


class ResolveBody(Body):
    """`POST /api/starts/{token}/resolve`: the run that the start made, or null if it made none."""

    run_id: RunId | None


async def read_body(request: Request, model: type[T]) -> T:
    """Return the request's body as `model`, or raise Refusal with every problem and its field."""
    try:
        async with asyncio.timeout(_BODY_SECONDS):
            body = await _bytes(request)
    except (TimeoutError, ClientDisconnect) as error:
        raise Refusal(
            HTTPStatus.REQUEST_TIMEOUT, "body_timeout", "the body did not arrive in time"
        ) from error
    try:
        return model.model_validate(_parse_object(body) if body else {})
    except ValidationError as error:
        details = error.errors(include_url=False, include_input=False, include_context=False)
        fields = [
            (".".join(str(part) for part in detail["loc"]), detail["msg"].removeprefix("Value error, "))
            for detail in details[:100]
        ]
        message = "; ".join(f"{field}: {message}" if field else message for field, message in fields[:3])
        raise Refusal(HTTPStatus.BAD_REQUEST, "invalid_request", message, fields=fields) from error


def _parse_object(body: bytes) -> dict[str, Any]:
    """Return the JSON object in a body, fit to be stored, or raise Refusal."""
    try:
        found = parse_strict_json(body.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        message = f"the body is not JSON: {type(error).__name__}"
        raise Refusal(HTTPStatus.BAD_REQUEST, "invalid_json", message) from error
    if not isinstance(found, dict):
        raise Refusal(HTTPStatus.BAD_REQUEST, "invalid_json", "the body is not a JSON object")
    if (problem := find_problem(found, "")) is not None:
        raise _wrong_parameter(*problem)
    return found


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
    message = f"a body has at most {MAX_BODY_BYTES} bytes"
    raise Refusal(
        HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "body_too_large", message, headers={"Connection": "close"}
    )


def path_of(request: Request, name: str, *, longest: int = LONGEST_ID) -> str:
    """Return the part of the path that a route names so."""
    return _check_parameter(name, request.path_params[name], longest)


def text_of(request: Request, name: str, *, longest: int = LONGEST_PARAMETER) -> str | None:
    """Return `?name=`."""
    given = request.query_params.get(name)
    return None if given is None else _check_parameter(name, given, longest)


def _check_parameter(name: str, given: str, longest: int) -> str:
    if (problem := find_problem(given, name, longest=longest)) is not None:
        raise _wrong_parameter(*problem)
    return given


def limit_of(request: Request) -> int:
    """Return `?limit=`."""
    given = text_of(request, "limit")
    if given is None:
        return DEFAULT_ROWS
    if not given.isascii() or not given.isdecimal() or not 1 <= int(given[:9]) <= MOST_ROWS:
        raise _wrong_parameter("limit", f"must be a whole number from 1 to {MOST_ROWS}")
    return int(given)


def timeout_of(request: Request, *, default: float) -> float:
    """Return `?timeout=` in seconds, 0 to 120."""
    given = text_of(request, "timeout")
    try:
        seconds = default if given is None else float(given)
    except ValueError:
        seconds = math.nan
    if not 0 <= seconds <= LONGEST_WAIT_SECONDS:
        raise _wrong_parameter("timeout", f"must be a number of seconds from 0 to {LONGEST_WAIT_SECONDS:g}")
    return seconds


def flag_of(request: Request, name: str) -> bool:
    """Return `?name=`, `true` or `false`; false by default."""
    given = text_of(request, name)
    if given is None:
        return False
    if given not in {"true", "false"}:
        raise _wrong_parameter(name, "must be true or false")
    return given == "true"


def state_of(request: Request, states: type[State]) -> State | None:
    """Return `?state=`, a value of an enumeration."""
    given = text_of(request, "state")
    if given is None:
        return None
    try:
        return states(given)
    except ValueError as error:
        raise _wrong_parameter(
            "state", f"must be one of {', '.join(state.value for state in states)}"
        ) from error


def key_of(request: Request) -> tuple[int, str] | None:
    """Return the key in `?cursor=`, a number and an id."""
    return parse_cursor(text_of(request, "cursor"))


def parse_cursor(given: str | None) -> tuple[int, str] | None:
    """Return the key in a cursor, a number and an id."""
    if not given:
        return None
    try:
        match json.loads(base64.urlsafe_b64decode(given.encode("ascii", "strict"))):
            case [int(number), str(identifier)] if 0 <= number <= _LATEST and identifier.isprintable():
                return number, identifier
    except (ValueError, binascii.Error, RecursionError):
        pass
    raise _wrong_parameter("cursor", "is not a cursor of this list")


def sequence_of(request: Request) -> int | None:
    """Return the sequence number in `?cursor=`, of a list that is ordered by it."""
    return parse_sequence(text_of(request, "cursor"))


def parse_sequence(given: str | None) -> int | None:
    """Return the sequence number in the cursor of a list that is ordered by it."""
    key = parse_cursor(given)
    if key is None:
        return None
    number, identifier = key
    if identifier:
        raise _wrong_parameter("cursor", "is a cursor of another list")
    return number


def next_cursor(page: Sequence[Row], limit: int, key: Callable[[Row], tuple[int, str]]) -> str | None:
    """Return the cursor of the page after this one, or None if this one is not full."""
    if len(page) < limit:
        return None
    return base64.urlsafe_b64encode(json.dumps(key(page[-1])).encode()).decode()


def _wrong_parameter(name: str, message: str) -> Refusal:
    return Refusal(HTTPStatus.BAD_REQUEST, "invalid_request", f"{name} {message}", fields=[(name, message)])
