"""The OpenAPI document of the operations API; a test compares it with the routes.

The schemas are those of the models in `client.messages` and `requests`; operations are listed here.
"""

from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import GenerateJsonSchema, models_json_schema

from receiver import __version__
from receiver.client import messages
from receiver.model import DispatchState, RunState, StartState
from receiver.web.ops import requests
from receiver.web.values import LONGEST_ID, LONGEST_KEY

_Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class _Operation:
    """One endpoint. `responses` are (status, description, model); every refusal is a `Refused`."""

    method: str
    path: str
    summary: str
    responses: tuple[tuple[int, str, type[BaseModel] | None], ...]
    refusals: tuple[tuple[int, str], ...] = ()
    body: type[requests.Body] | None = None
    query: tuple[tuple[str, _Json, str], ...] = ()
    media_type: str = "application/json"


def _text(longest: int) -> _Json:
    return {"type": "string", "maxLength": longest}


_LIMIT = (
    "limit",
    {"type": "integer", "minimum": 1, "maximum": requests.MOST_ROWS, "default": requests.DEFAULT_ROWS},
    "Rows of a page.",
)
_CURSOR = ("cursor", _text(requests.LONGEST_PARAMETER), "`next_cursor` of the page before.")
_PAGE = (_LIMIT, _CURSOR)
_UNKNOWN_RUN = ((404, "not_found: no such run in the ledger"),)


def _state(states: type[RunState | StartState | DispatchState]) -> tuple[str, _Json, str]:
    return (
        "state",
        {"type": "string", "enum": [state.value for state in states]},
        "Only rows in this state.",
    )


_OPERATIONS = (
    _Operation(
        "post",
        "/api/runs",
        "Start a run: the intent is committed, then sent to FLORA.",
        (
            (
                200,
                "The key was used for the same request before: its outcome; nothing was started.",
                messages.Started,
            ),
            (201, "FLORA started the run.", messages.Started),
            (
                202,
                "Committed; FLORA or the database has not responded: the service keeps retrying.",
                messages.Started,
            ),
        ),
        (
            (400, "FLORA's refusal (input_validation_error, with fields), or an invalid body"),
            (402, "FLORA's refusal: insufficient_credits"),
            (403, "FLORA's refusal: forbidden, paid_plan_required"),
            (404, "FLORA's refusal: not_found, no such technique"),
            (409, "unknown_outcome: a run may exist; see POST /api/starts/{token}/resolve"),
            (422, "idempotency_conflict: the key was used for another request"),
            (502, "flora_unauthorized: FLORA refuses the API key; or another refusal of FLORA"),
            (503, "unavailable: send it again with the idempotency_key beside the error"),
        ),
        body=requests.StartBody,
    ),
    _Operation(
        "get",
        "/api/runs",
        "List runs, newest first.",
        ((200, "A page.", messages.RunPage),),
        query=(_state(RunState), *_PAGE),
    ),
    _Operation(
        "post",
        "/api/runs/track",
        "Track a run that another program started.",
        ((200, "The run.", messages.OneRun),),
        ((400, "foreign_poll_url: poll_url is not on FLORA's API; invalid_request"),),
        body=requests.TrackBody,
    ),
    _Operation(
        "get",
        "/api/runs/{run_id}",
        "Show a run with its outputs, artifacts and dispatches.",
        ((200, "The run.", messages.OneRun),),
        _UNKNOWN_RUN,
    ),
    _Operation(
        "get",
        "/api/runs/{run_id}/wait",
        "Wait until the run and its dispatches are over, or `timeout` has passed.",
        ((200, "The run, finished or not.", messages.OneRun),),
        (*_UNKNOWN_RUN, (400, "timeout is not a number from 0 to 120")),
        query=(
            (
                "timeout",
                {"type": "number", "minimum": 0, "maximum": requests.LONGEST_WAIT_SECONDS, "default": 30},
                "Seconds.",
            ),
        ),
    ),
    _Operation(
        "get",
        "/api/runs/{run_id}/timeline",
        "Show what happened to a run, in order.",
        ((200, "The run, how often it was read, and the entries.", messages.TimelineView),),
        _UNKNOWN_RUN,
    ),
    _Operation(
        "post",
        "/api/runs/{run_id}/refresh",
        "Read the run from FLORA now; a lost one is tracked again.",
        ((200, "The run as it was before; wait for it to get the newer state.", messages.OneRun),),
        _UNKNOWN_RUN,
        body=requests.RefreshBody,
    ),
    _Operation(
        "post",
        "/api/runs/{run_id}/redispatch",
        "Dispatch the run again, to all handlers or one; `again`: with new idempotency keys.",
        ((200, "The dispatches that are due again.", messages.Armed),),
        _UNKNOWN_RUN,
        body=requests.RedispatchBody,
    ),
    _Operation(
        "post",
        "/api/runs/redispatch",
        "Dispatch the runs settled since a time to a handler added later; repeat while `more`.",
        ((200, "The dispatches that are due.", messages.Armed),),
        ((400, "unknown_handler: it is not configured, or does not listen to `settled`"),),
        body=requests.MissingBody,
    ),
    _Operation(
        "get",
        "/api/starts",
        "List intents to start a run, newest first.",
        ((200, "A page.", messages.StartPage),),
        query=(
            _state(StartState),
            ("key", _text(LONGEST_KEY), "Only starts with this idempotency key."),
            ("prefix", _text(LONGEST_KEY), "Only starts whose idempotency key begins so."),
            *_PAGE,
        ),
    ),
    _Operation(
        "post",
        "/api/starts/{token}/resolve",
        "Resolve a start of unknown outcome: it made a run, or none.",
        ((200, "The start.", messages.Started),),
        (
            (404, "not_found: no such start"),
            (409, "already_started: it has a run; run_taken: the run is another start's"),
        ),
        body=requests.ResolveBody,
    ),
    _Operation(
        "get",
        "/api/techniques/{technique_id}",
        "Read a technique from FLORA: its inputs, outputs and run_cost.",
        ((200, "The technique.", messages.OneTechnique),),
        (
            (404, "FLORA's refusal: not_found"),
            (502, "flora_unauthorized"),
            (503, "flora_rate_limited, flora_unavailable"),
        ),
        query=(("workspace_id", _text(LONGEST_ID), "The workspace whose API key is used."),),
    ),
    _Operation(
        "get",
        "/api/deliveries",
        "List the callbacks that were received, newest first.",
        ((200, "A page.", messages.DeliveryPage),),
        query=(("run_id", _text(LONGEST_ID), "Only callbacks about this run."), *_PAGE),
    ),
    _Operation(
        "get",
        "/api/deliveries/{delivery_id}",
        "Show a callback, with its raw body until that is past its retention.",
        ((200, "The callback.", messages.OneDelivery),),
        ((404, "not_found: no such delivery"),),
    ),
    _Operation(
        "get",
        "/api/rejections",
        "List refused requests, newest first.",
        ((200, "A page.", messages.RejectionPage),),
        query=_PAGE,
    ),
    _Operation(
        "get",
        "/api/dispatches",
        "List dispatches in a state (default: dead), newest first.",
        ((200, "A page.", messages.DispatchPage),),
        query=(
            _state(DispatchState),
            (
                "orphaned",
                {"type": "boolean"},
                "Instead: those that wait for handlers that are not configured.",
            ),
            *_PAGE,
        ),
    ),
    _Operation(
        "post",
        "/api/dispatches/retry",
        "Retry dead dispatches: of a handler or a run, or `all`; repeat with the cursor while `more`.",
        ((200, "The dispatches that are due again.", messages.Armed),),
        body=requests.RetryBody,
    ),
    _Operation(
        "post",
        "/api/backup",
        "Copy a SQLite ledger into a new file on the service's machine, checked and synced.",
        ((200, "Its path, and its size in bytes.", messages.Backup),),
        (
            (400, "not_sqlite: PostgreSQL has pg_dump"),
            (409, "not_written: the file exists already, or cannot be written"),
        ),
        body=requests.BackupBody,
    ),
    _Operation(
        "get",
        "/api/channel",
        "Show the health of the callback channel over the last 24 hours.",
        ((200, "Health, and counts by hour.", messages.ChannelView),),
    ),
    _Operation(
        "get",
        "/api/events",
        "Stream changes as server-sent events: run, dispatch, start; `missed` if some were lost.",
        ((200, "A stream that ends with the service.", None),),
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
    _Operation("get", "/healthz", "Check that the process is alive.", ((200, '`{"status": "ok"}`', None),)),
)

_COMMON_REFUSALS = (
    (401, "unauthorized: the token is missing or wrong"),
    (403, "host_not_allowed, cross_site"),
    (405, "method_not_allowed"),
    (503, "unavailable: try again later"),
)
_PARAMETER_REFUSALS = ((400, "invalid_request: the fields name the value at fault"),)
_CHANGE_REFUSALS = (
    (400, "invalid_json; invalid_request: the fields name each value at fault"),
    (408, "body_timeout: the body did not arrive in time"),
    (413, "body_too_large"),
    (415, "unsupported_media_type: send application/json"),
)


def openapi_document() -> _Json:
    """Return the document."""
    schemas = _Schemas()
    paths: _Json = {}
    for operation in _OPERATIONS:
        paths.setdefault(operation.path, {})[operation.method] = _describe(operation, schemas)
    return {
        "openapi": "3.1.0",
        "info": {"title": "flora-receiver operations API", "version": __version__},
        "security": [{"token": []}],
        "paths": paths,
        "components": {
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
            "schemas": schemas.definitions,
        },
    }


class _SchemaNames(GenerateJsonSchema):
    """Names the schema of `RunView` `Run`: the suffix belongs to the Python client."""

    def normalize_name(self, name: str) -> str:
        return super().normalize_name(name).removesuffix("View")


class _Schemas:
    """The schemas of every model that an operation names, and a reference to each."""

    def __init__(self) -> None:
        named = [
            model for operation in _OPERATIONS for _, _, model in operation.responses if model is not None
        ]
        bodies = [operation.body for operation in _OPERATIONS if operation.body is not None]
        models: list[type[BaseModel]] = [messages.Refused, *named, *bodies]
        references, found = models_json_schema(
            [(model, "validation") for model in models],
            ref_template="#/components/schemas/{model}",
            schema_generator=_SchemaNames,
        )
        self._references = {model: reference for (model, _), reference in references.items()}
        self.definitions: _Json = found["$defs"]

    def reference(self, model: type[BaseModel]) -> _Json:
        """Return `{"$ref": …}`."""
        return dict(self._references[model])


def _describe(operation: _Operation, schemas: _Schemas) -> _Json:
    responses: _Json = {}
    for status, text, model in operation.responses:
        content: _Json = {} if model is None else {"schema": schemas.reference(model)}
        responses[str(status)] = {"description": text, "content": {operation.media_type: content}}
    refused = {"application/json": {"schema": schemas.reference(messages.Refused)}}
    common: tuple[tuple[int, str], ...] = _COMMON_REFUSALS
    if operation.method == "post":
        common += _CHANGE_REFUSALS
    elif operation.query or "{" in operation.path:
        common += _PARAMETER_REFUSALS
    for status, text in (*operation.refusals, *common):
        responses.setdefault(str(status), {"description": text, "content": refused})
    described: _Json = {
        "summary": operation.summary,
        "responses": responses,
        "parameters": _parameters(operation),
    }
    if operation.body is not None:
        content = {"application/json": {"schema": schemas.reference(operation.body)}}
        described["requestBody"] = {"required": True, "content": content}
    return described


def _parameters(operation: _Operation) -> list[_Json]:
    named = [part.strip("{}") for part in operation.path.split("/") if part.startswith("{")]
    schema = {"minLength": 1, **_text(LONGEST_ID)}
    path = [{"name": name, "in": "path", "required": True, "schema": schema} for name in named]
    return path + [
        {"name": name, "in": "query", "description": text, "schema": schema}
        for name, schema, text in operation.query
    ]
