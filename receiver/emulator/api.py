"""The routes of FLORA's API and the shapes of their responses, as FLORA documents them."""

import base64
from collections.abc import Callable, Sequence

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from receiver.emulator.faults import Family, Fault
from receiver.emulator.gate import Gate, json_body, requested_faults
from receiver.emulator.idempotency import KeyBook, KeyScope, digest
from receiver.emulator.problems import ApiProblem, Field, invalid_input, not_found
from receiver.emulator.runs import Run, RunBook, run_to_json
from receiver.emulator.settings import API_PATH, EmulatorSettings
from receiver.emulator.starts import Starter
from receiver.emulator.techniques import TECHNIQUES, Technique, find_technique

__all__ = ["Api"]

_DEFAULT_LIMIT = 20
_MAX_LIMIT = 100
_STATUSES = ("pending", "running", "completed", "failed")


class Api:
    """The routes under `/api/v1`."""

    def __init__(
        self,
        settings: EmulatorSettings,
        runs: RunBook,
        keys: KeyBook,
        starter: Starter,
        origin: Callable[[Request], str],
    ) -> None:
        self._settings = settings
        self._runs = runs
        self._keys = keys
        self._starter = starter
        self._origin = origin

    def routes(self, gate: Gate) -> list[Route]:
        return [
            Route("/workspaces", gate(self.workspaces)),
            Route("/techniques", gate(self.techniques)),
            Route("/techniques/{technique_id}", gate(self.technique)),
            Route("/techniques/{technique_id}/runs", gate(self.start_technique), methods=["POST"]),
            Route("/techniques/{technique_id}/runs/{run_id}", gate(self.technique_run)),
            Route("/technique-runs", gate(self.technique_runs)),
            Route("/generate", gate(self.generate), methods=["POST"]),
            Route("/generations", gate(self.generations)),
            Route("/runs/{run_id}", gate(self.run)),
        ]

    async def workspaces(self, _request: Request) -> Response:
        return JSONResponse(
            {
                "workspaces": [
                    {
                        "workspace_id": self._settings.workspace_id,
                        "name": "Emulator",
                        "role": "owner",
                        "created_at": None,
                    }
                ]
            }
        )

    async def techniques(self, request: Request) -> Response:
        limit, before = _page(request)
        wanted = request.query_params.get("query", "").lower()
        first = 0 if before is None else before
        matching = [
            one for one in TECHNIQUES if wanted in f"{one.name} {one.slug} {one.description}".lower()
        ]
        if (
            request.query_params.get("workspace_id", self._settings.workspace_id)
            != self._settings.workspace_id
        ):
            matching = []
        page = matching[first : first + limit]
        cursor = _cursor(first + limit) if first + limit < len(matching) else None
        meta = {"limit": limit, "next_cursor": cursor}
        return JSONResponse({"techniques": [one.to_json() for one in page], "meta": meta})

    async def technique(self, request: Request) -> Response:
        return JSONResponse(_find_technique(request).to_json())

    async def start_technique(self, request: Request) -> Response:
        technique = _find_technique(request)
        body = await json_body(request)
        key = body.get("idempotency_key", request.headers.get("idempotency-key"))
        if key is not None and (not isinstance(key, str) or not key):
            raise invalid_input(Field("idempotency_key", "must be a non-empty string"))
        scope = self._scope("techniques.runs", technique.technique_id, key)

        def start(faults: Sequence[Fault]) -> dict[str, object]:
            return self._to_json(self._starter.technique(technique, body, faults), request)

        return self._start_once(request, scope, body, start)

    async def generate(self, request: Request) -> Response:
        body = await json_body(request)
        scope = self._scope("generate", str(body.get("project_id")), request.headers.get("idempotency-key"))

        def start(faults: Sequence[Fault]) -> dict[str, object]:
            run = self._starter.generation(body, faults)
            return {
                "run_id": run.run_id,
                "type": "generation",
                "estimated_seconds": self._starter.estimated_seconds(),
                "charged_cost": run.cost,
                "poll_url": self._api(request) + run.poll_path(),
                "project_id": run.project_id,
                "model": {"model_id": run.subject.id},
                "technique": None,
                "action": None,
            }

        return self._start_once(request, scope, body, start)

    async def technique_run(self, request: Request) -> Response:
        technique, run = _find_technique(request), self._find_run(request)
        if run.subject.id != technique.technique_id:
            raise not_found("Run")
        return JSONResponse(self._to_json(run, request))

    async def run(self, request: Request) -> Response:
        run = self._find_run(request)
        if run.subject.run_type == "technique" and self._settings.hide_technique_runs:
            raise not_found("Run")
        return JSONResponse(self._to_json(run, request))

    async def technique_runs(self, request: Request) -> Response:
        found = request.query_params.get("technique_id")
        technique = find_technique(found) if found else None
        wanted = technique.technique_id if technique is not None else found

        def describe(run: Run) -> dict[str, object]:
            technique = {"technique_id": run.subject.id, "name": run.subject.name}
            return {"technique_run_id": run.run_id, "technique": technique}

        return self._list(request, "technique", wanted, "technique_runs", describe)

    async def generations(self, request: Request) -> Response:
        def describe(run: Run) -> dict[str, object]:
            return {"generation_id": run.run_id, "model": {"model_id": run.subject.id}}

        return self._list(request, "generation", None, "generations", describe)

    def _start_once(
        self,
        request: Request,
        scope: KeyScope | None,
        body: dict[str, object],
        start: Callable[[Sequence[Fault]], dict[str, object]],
    ) -> Response:
        """Start a run unless the key was used.

        It does not await: two requests with one key cannot both start a run.
        """
        fingerprint = digest(body)
        remembered = self._keys.recall(scope) if scope is not None else None
        if remembered is not None:
            if remembered.digest != fingerprint:
                raise ApiProblem(
                    422, "idempotency_conflict", "This idempotency key was used with another request body"
                )
            if not self._settings.replay_idempotent:
                raise ApiProblem(409, "idempotency_duplicate", "This idempotency key was already used")
            return JSONResponse(
                remembered.response, status_code=201, headers={"idempotent-replayed": "true"}
            )
        document = start([fault for fault in requested_faults(request) if fault.family is not Family.API])
        if scope is not None:
            self._keys.remember(scope, fingerprint, document)
        return JSONResponse(document, status_code=201)

    def _list(
        self,
        request: Request,
        run_type: str,
        subject_id: str | None,
        name: str,
        describe: Callable[[Run], dict[str, object]],
    ) -> Response:
        limit, before = _page(request)
        status = request.query_params.get("status")
        if status is not None and status not in _STATUSES:
            raise invalid_input(Field("status", f"must be one of {', '.join(_STATUSES)}"))
        owner = {
            key: value for key in ("workspace_id", "project_id") if (value := request.query_params.get(key))
        }
        now = self._runs.clock()
        page: list[dict[str, object]] = []
        cursor: str | None = None
        last = 0
        for place, run in self._runs.newest(before):
            if run.subject.run_type != run_type or (
                subject_id is not None and run.subject.id != subject_id
            ):
                continue
            ids = {"workspace_id": run.workspace_id, "project_id": run.project_id}
            if not owner.items() <= ids.items() or (status is not None and run.status_at(now) != status):
                continue
            if len(page) == limit:
                cursor = _cursor(last)
                break
            page.append(self._to_json(run, request) | ids | describe(run))
            last = place
        return JSONResponse({name: page, "meta": {"limit": limit, "next_cursor": cursor}})

    def _scope(self, operation: str, destination: str, key: str | None) -> KeyScope | None:
        return (
            KeyScope(self._settings.workspace_id, operation, destination, key) if key is not None else None
        )

    def _find_run(self, request: Request) -> Run:
        run = self._runs.find(request.path_params["run_id"])
        if run is None:
            raise not_found("Run")
        return run

    def _api(self, request: Request) -> str:
        return self._origin(request) + API_PATH

    def _to_json(self, run: Run, request: Request) -> dict[str, object]:
        return run_to_json(run, self._runs.clock(), origin=self._origin(request), api=self._api(request))


def _find_technique(request: Request) -> Technique:
    technique = find_technique(request.path_params["technique_id"])
    if technique is None:
        raise not_found("Technique")
    return technique


def _page(request: Request) -> tuple[int, int | None]:
    """Return the limit of a list request, and the place that its cursor names."""
    given = request.query_params.get("limit", str(_DEFAULT_LIMIT))
    if not given.isascii() or not given.isdigit() or not 1 <= int(given[:4]) <= _MAX_LIMIT:
        raise invalid_input(Field("limit", f"must be a number from 1 to {_MAX_LIMIT}"))
    cursor = request.query_params.get("cursor")
    if not cursor:
        return int(given), None
    try:
        return int(given), int(base64.urlsafe_b64decode(cursor.encode()).removeprefix(b"place:"))
    except ValueError as error:
        raise invalid_input(Field("cursor", "is not a cursor of this list")) from error


def _cursor(place: int) -> str:
    return base64.urlsafe_b64encode(b"place:%d" % place).decode()
