"""The emulator's own endpoints under `/_emulator`: faults, sent callbacks, counted requests."""

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from receiver.emulator.callbacks import Callbacks
from receiver.emulator.faults import Fault, FaultBook, InvalidFaultError, parse_faults
from receiver.emulator.gate import Endpoint, Gate, json_body
from receiver.emulator.problems import ApiProblem, Field, invalid_input, not_found
from receiver.emulator.runs import RunBook
from receiver.emulator.starts import Starter

__all__ = ["Control"]


class Control:
    """The control endpoints. They need no API key."""

    def __init__(self, runs: RunBook, faults: FaultBook, callbacks: Callbacks, starter: Starter) -> None:
        self._runs = runs
        self._faults = faults
        self._callbacks = callbacks
        self._starter = starter

    def routes(self, gate: Gate) -> list[Route]:
        self._gate = gate
        return [
            Route("/faults", self._without_key(self.show), methods=["GET"]),
            Route("/faults", self._without_key(self.add), methods=["POST"]),
            Route("/faults", self._without_key(self.reset), methods=["DELETE"]),
            Route("/runs/{run_id}/faults", self._without_key(self.show), methods=["GET"]),
            Route("/runs/{run_id}/faults", self._without_key(self.bind), methods=["POST"]),
            Route("/deliveries", self._without_key(self.deliveries)),
            Route("/requests", self._without_key(self.requests)),
        ]

    async def show(self, request: Request) -> Response:
        return JSONResponse({"faults": self._faults.to_json(request.path_params.get("run_id"))})

    async def add(self, request: Request) -> Response:
        self._faults.add(await _parse_body(request))
        return await self.show(request)

    async def reset(self, request: Request) -> Response:
        self._faults.reset()
        return await self.show(request)

    async def bind(self, request: Request) -> Response:
        run_id = request.path_params["run_id"]
        if self._runs.find(run_id) is None:
            raise not_found("Run")
        self._starter.bind(run_id, await _parse_body(request))
        return await self.show(request)

    async def deliveries(self, request: Request) -> Response:
        run_id = request.query_params.get("run_id")
        found = [one.to_json() for one in self._callbacks.deliveries if run_id in (None, one.run_id)]
        return JSONResponse({"deliveries": found})

    async def requests(self, _request: Request) -> Response:
        return JSONResponse({"requests": dict(self._gate.requests)})

    def _without_key(self, endpoint: Endpoint) -> Endpoint:
        async def handle(request: Request) -> Response:
            try:
                return await endpoint(request)
            except ApiProblem as problem:
                return problem.response()

        return handle


async def _parse_body(request: Request) -> tuple[Fault, ...]:
    body = await json_body(request)
    try:
        return parse_faults(body.get("faults", body))
    except InvalidFaultError as error:
        raise invalid_input(Field("faults", str(error))) from error
