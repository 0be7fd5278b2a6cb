"""The OpenAPI document of the operations API. A test holds it against the routes."""

from dataclasses import dataclass
from typing import Any

from receiver import __version__
from receiver.model import DispatchState, RunState, StartState
from receiver.web.ops import requests as bodies

_Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class _Operation:
    """One endpoint: `answers` maps status to what it means and the schema's name; every refusal is an `Error`."""

    method: str
    path: str
    summary: str
    answers: tuple[tuple[int, str, str | None], ...]
    refusals: tuple[tuple[int, str], ...] = ()
    body: type[bodies.Body] | None = None
    query: tuple[tuple[str, _Json, str], ...] = ()
    media_type: str = "application/json"


_LIMIT = ("limit", {"type": "integer", "minimum": 1, "maximum": bodies.MOST_ROWS, "default": 100}, "Rows of a page.")
_CURSOR = ("cursor", {"type": "string"}, "`next_cursor` of the page before.")
_PAGE = (_LIMIT, _CURSOR)
_UNKNOWN_RUN = ((404, "not_found: no such run in the ledger"),)


def _state(states: type[RunState | StartState | DispatchState]) -> tuple[str, _Json, str]:
    return "state", {"type": "string", "enum": [state.value for state in states]}, "Only rows in this state."


_OPERATIONS = (
    _Operation(
        "post",
        "/api/runs",
        "Start a run: the intent is committed, then FLORA is asked.",
        (
            (200, "The key was used for the same request before: what became of it; nothing was started.", "Started"),
            (201, "FLORA started the run.", "Started"),
            (202, "FLORA has not answered within wait_seconds: the service goes on asking.", "Started"),
        ),
        (
            (400, "FLORA's refusal (input_validation_error, with fields), or the body is not as described here"),
            (402, "FLORA's refusal: insufficient_credits"),
            (403, "FLORA's refusal: forbidden, paid_plan_required"),
            (404, "FLORA's refusal: not_found, no such technique"),
            (409, "unknown_outcome: FLORA may have started a run; look it up, then POST /api/starts/{token}/resolve"),
            (422, "idempotency_conflict: the key was used for another request"),
            (502, "flora_unauthorized: FLORA does not take this service's API key; or another refusal of FLORA"),
        ),
        body=bodies.StartBody,
    ),
    _Operation(
        "get",
        "/api/runs",
        "List runs, newest first.",
        ((200, "A page.", "RunPage"),),
        query=(_state(RunState), *_PAGE),
    ),
    _Operation(
        "post",
        "/api/runs/track",
        "Take up a run that someone else started.",
        ((200, "The run.", "OneRun"),),
        ((400, "foreign_poll_url: poll_url is not on FLORA's API; invalid_request"),),
        body=bodies.TrackBody,
    ),
    _Operation(
        "get",
        "/api/runs/{run_id}",
        "Show a run with its outputs, artifacts and dispatches.",
        ((200, "The run.", "OneRun"),),
        _UNKNOWN_RUN,
    ),
    _Operation(
        "get",
        "/api/runs/{run_id}/wait",
        "Wait until the run is over and its dispatches are; answers the run, with `finished`.",
        ((200, "The run, finished or not.", "OneRun"),),
        (*_UNKNOWN_RUN, (400, "timeout is not a number from 0 to 120")),
        query=(
            (
                "timeout",
                {"type": "number", "minimum": 0, "maximum": bodies.LONGEST_WAIT_SECONDS, "default": 30},
                "Seconds.",
            ),
        ),
    ),
    _Operation(
        "get",
        "/api/runs/{run_id}/timeline",
        "Show what happened to a run, in order.",
        ((200, "The run, how often it was read, and the entries.", "Timeline"),),
        _UNKNOWN_RUN,
    ),
    _Operation(
        "post",
        "/api/runs/{run_id}/refresh",
        "Read the run from FLORA now; a lost one is taken up again.",
        ((200, "The run as it was; wait for it to hear more.", "OneRun"),),
        _UNKNOWN_RUN,
        body=bodies.RefreshBody,
    ),
    _Operation(
        "post",
        "/api/runs/{run_id}/redispatch",
        "Have handlers work on the run again: all, or one; `again`: under new idempotency keys.",
        ((200, "What is due again.", "Armed"),),
        _UNKNOWN_RUN,
        body=bodies.RedispatchBody,
    ),
    _Operation(
        "post",
        "/api/runs/redispatch",
        "Tell a handler that was added later of runs settled since; repeat while the answer says `more`.",
        ((200, "What is due.", "Armed"),),
        ((400, "unknown_handler: no such handler is configured, or it does not listen to `settled`"),),
        body=bodies.MissingBody,
    ),
    _Operation(
        "get",
        "/api/starts",
        "List intents to start a run, newest first.",
        ((200, "A page.", "StartPage"),),
        query=(
            _state(StartState),
            ("key", {"type": "string"}, "Only starts with this idempotency key."),
            ("prefix", {"type": "string"}, "Only starts whose idempotency key begins so."),
            *_PAGE,
        ),
    ),
    _Operation(
        "post",
        "/api/starts/{token}/resolve",
        "Say what became of a start: a run, or none at all.",
        ((200, "The start.", "Started"),),
        (
            (404, "not_found: no such start"),
            (409, "already_started: it has a run; run_taken: the run is another start's"),
        ),
        body=bodies.ResolveBody,
    ),
    _Operation(
        "get",
        "/api/techniques/{technique_id}",
        "Ask FLORA about a technique: declared inputs and outputs, run_cost.",
        ((200, "The technique.", "OneTechnique"),),
        (
            (404, "FLORA's refusal: not_found"),
            (502, "flora_unauthorized"),
            (503, "flora_rate_limited, flora_unavailable"),
        ),
        query=(("workspace_id", {"type": "string"}, "Whose API key asks."),),
    ),
    _Operation(
        "get",
        "/api/deliveries",
        "List the callbacks that arrived, newest first.",
        ((200, "A page.", "DeliveryPage"),),
        query=(("run_id", {"type": "string"}, "Only callbacks about this run."), *_PAGE),
    ),
    _Operation(
        "get",
        "/api/deliveries/{delivery_id}",
        "Show a callback with its raw body, as long as that is kept.",
        ((200, "The callback.", "OneDelivery"),),
        ((404, "not_found: no such delivery"),),
    ),
    _Operation(
        "get",
        "/api/rejections",
        "List refused requests, newest first.",
        ((200, "A page.", "RejectionPage"),),
        query=_PAGE,
    ),
    _Operation(
        "get",
        "/api/dispatches",
        "List dispatches in a state (default: dead), newest first.",
        ((200, "A page.", "DispatchPage"),),
        query=(
            _state(DispatchState),
            ("orphaned", {"type": "boolean"}, "Instead: what waits for handlers that are not configured."),
            *_PAGE,
        ),
    ),
    _Operation(
        "post",
        "/api/dispatches/retry",
        "Try dead dispatches again: all, or those of a handler or a run.",
        ((200, "What is due again.", "Armed"),),
        body=bodies.RetryBody,
    ),
    _Operation(
        "post",
        "/api/backup",
        "Copy a SQLite ledger into a new file on the service's machine, checked and synced.",
        ((200, "Where it is, and its size in bytes.", "Backup"),),
        (
            (400, "not_sqlite: PostgreSQL has pg_dump"),
            (503, "unavailable: the file is there already, or cannot be written"),
        ),
        body=bodies.BackupBody,
    ),
    _Operation(
        "get",
        "/api/channel",
        "Judge the callback channel over the last 24 hours.",
        ((200, "Health, and counts by hour.", "Channel"),),
    ),
    _Operation(
        "get",
        "/api/events",
        "Follow changes as server-sent events: run, dispatch, start; `missed` when some were.",
        ((200, "A stream without end.", None),),
        media_type="text/event-stream",
    ),
    _Operation(
        "get",
        "/api/openapi.json",
        "This document.",
        ((200, "OpenAPI 3.1.", None),),
    ),
    _Operation(
        "get",
        "/metrics",
        "Metrics for Prometheus.",
        ((200, "The exposition.", None),),
        media_type="text/plain",
    ),
    _Operation("get", "/healthz", "Say that the process is alive.", ((200, '`{"status": "ok"}`', None),)),
)

_EVERYWHERE = (
    (401, "unauthorized: the token is missing or wrong"),
    (403, "host_not_allowed, cross_site"),
    (503, "unavailable: try again later"),
)
_EVERY_CHANGE = (
    (400, "invalid_json, invalid_request"),
    (413, "body_too_large"),
    (415, "unsupported_media_type: send application/json"),
)


def document() -> _Json:
    """Return the document."""
    paths: _Json = {}
    for operation in _OPERATIONS:
        paths.setdefault(operation.path, {})[operation.method] = _operation(operation)
    return {
        "openapi": "3.1.0",
        "info": {"title": "flora-receiver operations API", "version": __version__},
        "security": [{"token": []}],
        "paths": paths,
        "components": {
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
            "schemas": _SCHEMAS | {model.__name__: _schema(model) for model in _models()},
        },
    }


def _operation(operation: _Operation) -> _Json:
    responses: _Json = {}
    for status, text, schema in operation.answers:
        content: _Json = {} if schema is None else {"schema": _ref(schema)}
        responses[str(status)] = {"description": text, "content": {operation.media_type: content}}
    common = (*_EVERYWHERE, *(_EVERY_CHANGE if operation.method == "post" else ()))
    for status, text in (*operation.refusals, *common):
        responses.setdefault(
            str(status), {"description": text, "content": {"application/json": {"schema": _ref("Error")}}}
        )
    described: _Json = {"summary": operation.summary, "responses": responses, "parameters": _parameters(operation)}
    if operation.body is not None:
        content = {"application/json": {"schema": _ref(operation.body.__name__)}}
        described["requestBody"] = {"required": True, "content": content}
    return described


def _parameters(operation: _Operation) -> list[_Json]:
    named = [part.strip("{}") for part in operation.path.split("/") if part.startswith("{")]
    path = [{"name": name, "in": "path", "required": True, "schema": {"type": "string"}} for name in named]
    return path + [
        {"name": name, "in": "query", "description": text, "schema": schema} for name, schema, text in operation.query
    ]


def _models() -> list[type[bodies.Body]]:
    return [operation.body for operation in _OPERATIONS if operation.body is not None]


def _schema(model: type[bodies.Body]) -> _Json:
    return model.model_json_schema(ref_template="#/components/schemas/{model}")


def _ref(name: str) -> _Json:
    return {"$ref": f"#/components/schemas/{name}"}


def _object(**properties: Any) -> _Json:
    return {"type": "object", "properties": properties}


def _rows(name: str) -> _Json:
    return {"type": "array", "items": _ref(name)}


_TEXT: _Json = {"type": "string"}
_TEXT_OR_NULL: _Json = {"type": ["string", "null"]}
_TIME: _Json = {"type": ["string", "null"], "format": "date-time"}
_COUNT: _Json = {"type": "integer"}
_COUNT_OR_NULL: _Json = {"type": ["integer", "null"]}
_MONEY: _Json = {"type": ["number", "null"], "description": "US dollars"}
_FLAG: _Json = {"type": "boolean"}
_OPEN: _Json = {"type": "object"}
_FIELDS: _Json = {"type": "array", "items": _object(field=_TEXT, message=_TEXT)}
_NEXT = {"next_cursor": _TEXT_OR_NULL}

_RUN: _Json = {
    "run_id": _TEXT, "state": {"type": "string", "enum": [state.value for state in RunState]}, "settled": _FLAG,
    "finished": {**_FLAG, "description": "Over, and no handler has anything left to do for it."},
    "verdict": _TEXT_OR_NULL, "origin": _TEXT, "run_type": _TEXT_OR_NULL, "technique_id": _TEXT_OR_NULL,
    "workspace_id": _TEXT_OR_NULL, "project_id": _TEXT_OR_NULL, "progress": _COUNT_OR_NULL, "first_seen_at": _TIME,
    "created_at": _TIME, "started_at": _TIME, "completed_at": _TIME, "reported_at": _TIME, "settled_at": _TIME,
    "deadline_at": _TIME, "next_poll_at": _TIME, "polls": _COUNT, "callback_expected": _FLAG, "told": _TEXT_OR_NULL,
    "error_code": _TEXT_OR_NULL, "error_message": _TEXT_OR_NULL, "lost_reason": _TEXT_OR_NULL, "charged_cost": _MONEY,
    "quoted_cost": _MONEY, "cost_final": _FLAG, "metadata": _OPEN,
    "outputs": {**_rows("Output"), "description": "Not in lists, like the four below."},
    "artifacts": _rows("Artifact"), "dispatches": _rows("Dispatch"),
    "start": {"oneOf": [_ref("Start"), {"type": "null"}]},
}  # fmt: skip

_SCHEMAS: _Json = {
    "Error": _object(error=_object(code=_TEXT, message=_TEXT, fields=_FIELDS, request_id=_TEXT)),
    "Run": _object(**_RUN),
    "Output": _object(position=_COUNT, output_id=_TEXT, type=_TEXT, value=_TEXT),
    "Artifact": _object(
        handler=_TEXT, position=_COUNT, output_id=_TEXT, location=_TEXT, size=_COUNT_OR_NULL, sha256=_TEXT_OR_NULL,
        content_type=_TEXT_OR_NULL, stored_at=_TIME,
    ),
    "Dispatch": _object(
        run_id=_TEXT, handler=_TEXT, event=_TEXT, round=_COUNT, attempts=_COUNT, due_at=_TIME, last_error=_TEXT_OR_NULL,
        orphaned={**_FLAG, "description": "It waits for a handler that is not configured."},
        state={"type": "string", "enum": [state.value for state in DispatchState]},
        result={"type": ["object", "null"], "description": "What the handler said when it was done; with its run alone."},
    ),
    "Start": _object(
        token=_TEXT, state={"type": "string", "enum": [state.value for state in StartState]}, run_id=_TEXT_OR_NULL,
        operation=_TEXT, technique_id=_TEXT_OR_NULL, workspace_id=_TEXT_OR_NULL, idempotency_key=_TEXT, created_at=_TIME,
        asked_again_at=_TIME, attempts=_COUNT, callback_expected=_FLAG, metadata=_OPEN,
        error={
            "type": ["object", "null"],
            "properties": {
                "code": _TEXT, "message": _TEXT, "status": _COUNT_OR_NULL, "fields": _FIELDS, "request_id": _TEXT_OR_NULL,
            },
        },
    ),
    "Delivery": _object(
        delivery_id=_TEXT, run_id=_TEXT_OR_NULL, event=_TEXT_OR_NULL, api_version=_TEXT_OR_NULL, received_at=_TIME,
        age_seconds=_COUNT, readable=_FLAG, duplicates=_COUNT, last_duplicate_at=_TIME, signature=_TEXT_OR_NULL,
        body=_TEXT_OR_NULL,
    ),
    "Rejection": _object(rejected_at=_TIME, code=_TEXT, remote=_TEXT_OR_NULL, size=_COUNT),
    "Technique": _object(
        technique_id=_TEXT, slug=_TEXT_OR_NULL, name=_TEXT_OR_NULL, run_cost=_MONEY,
        inputs={"type": "array", "items": _object(id=_TEXT, type=_TEXT, name=_TEXT_OR_NULL, optional=_FLAG)},
        outputs={"type": "array", "items": _object(id=_TEXT, type=_TEXT, name=_TEXT_OR_NULL)},
    ),
    "Channel": _object(
        since=_TIME, late=_COUNT, arrivals=_COUNT, refusals=_OPEN, hours={"type": "array", "items": _OPEN},
        health=_object(
            ok=_FLAG, matched=_COUNT, recovered=_COUNT, diverged=_COUNT, lost=_COUNT, cause=_TEXT_OR_NULL,
            cure=_TEXT_OR_NULL,
        ),
    ),
    "Timeline": _object(
        run_id=_TEXT, run=_ref("Run"), reads=_COUNT,
        entries={"type": "array", "items": {**_object(at=_TIME, kind=_TEXT), "additionalProperties": True}},
    ),
    "Backup": _object(path=_TEXT, size=_COUNT),
    "OneRun": _object(run=_ref("Run")),
    "OneTechnique": _object(technique=_ref("Technique")),
    "OneDelivery": _object(delivery=_ref("Delivery")),
    "Started": _object(
        start=_ref("Start"), run={"oneOf": [_ref("Run"), {"type": "null"}]},
        repeated={**_FLAG, "description": "The key was known: nothing was started now."},
    ),
    "Armed": _object(
        dispatches=_COUNT, armed={**_rows("Dispatch"), "description": "The first hundred."},
        more={**_FLAG, "description": "There may be more: ask again. For runs/redispatch alone."},
    ),
    "RunPage": _object(runs=_rows("Run"), **_NEXT),
    "StartPage": _object(starts=_rows("Start"), **_NEXT),
    "DeliveryPage": _object(deliveries=_rows("Delivery"), **_NEXT),
    "RejectionPage": _object(rejections=_rows("Rejection"), **_NEXT),
    "DispatchPage": _object(dispatches=_rows("Dispatch"), **_NEXT),
}  # fmt: skip
