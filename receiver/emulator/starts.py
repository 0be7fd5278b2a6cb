"""Starts runs from request bodies and schedules their callbacks, or refuses as FLORA does."""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from receiver.emulator.addresses import callback_problem
from receiver.emulator.callbacks import Callbacks
from receiver.emulator.faults import Family, Fault, FaultBook
from receiver.emulator.media import make_text
from receiver.emulator.problems import ApiProblem, Field, invalid_input
from receiver.emulator.runs import PlannedOutput, Run, RunBook, Subject
from receiver.emulator.settings import EmulatorSettings
from receiver.emulator.techniques import GENERATED, Technique, input_values

__all__ = ["Starter"]

_SIZE = re.compile(r"([0-9]{1,15})\s*(|B|[KMG]B|[KMG]iB)", re.IGNORECASE)
_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


@dataclass(frozen=True, slots=True)
class _Start:
    """A validated start of a technique or a generation."""

    subject: Subject
    project_id: str
    cost: float
    outputs: tuple[PlannedOutput, ...]
    callback_url: str | None
    error_code: str | None = None


class Starter:
    """Starts runs.

    A body is validated as a whole: a refusal lists every problem, as FLORA's does.
    """

    def __init__(
        self,
        settings: EmulatorSettings,
        runs: RunBook,
        faults: FaultBook,
        callbacks: Callbacks,
        *,
        clock: Callable[[], float],
    ) -> None:
        self._settings = settings
        self._runs = runs
        self._faults = faults
        self._callbacks = callbacks
        self._clock = clock

    def technique(self, technique: Technique, body: dict[str, object], faults: Sequence[Fault] = ()) -> Run:
        """Start a technique run from the body of `POST /techniques/{id}/runs`."""
        values, problems = input_values(technique, body.get("inputs"))
        if body.get("mode") not in ("async", "stream"):
            problems.append(Field("mode", "must be async or stream"))
        callback_url = self._callback_url(body, problems)
        size = self._size(values.get("size"), "inputs", problems)
        if problems:
            raise invalid_input(*problems)
        prompt = values.get("prompt", "")
        return self._start(
            _Start(
                subject=Subject("technique", technique.technique_id, technique.name),
                project_id=self._settings.project_id,
                cost=technique.run_cost,
                outputs=tuple(
                    PlannedOutput(declared.id, declared.type, prompt, size)
                    for declared in technique.outputs
                ),
                callback_url=callback_url,
                error_code=technique.error_code,
            ),
            faults,
        )

    def generation(self, body: dict[str, object], faults: Sequence[Fault] = ()) -> Run:
        """Start a generation from the body of `POST /generate`, with faults of its own."""
        problems = [
            Field(name, "must be a non-empty string")
            for name in ("type", "prompt", "workspace_id", "project_id")
            if not isinstance(body.get(name), str) or not body[name]
        ]
        kind = GENERATED.get(str(body.get("type")))
        if kind is None:
            problems.append(Field("type", f"must be one of {', '.join(GENERATED)}"))
        model, params = body.get("model"), body.get("params", {})
        if model is not None and not isinstance(model, str):
            problems.append(Field("model", "must be a string"))
        if not isinstance(params, dict):
            problems.append(Field("params", "must be an object"))
            params = {}
        callback_url = self._callback_url(body, problems)
        size = self._size(params.get("size"), "params.size", problems)
        if problems or kind is None:
            raise invalid_input(*problems)
        self._check_owner(str(body["workspace_id"]), str(body["project_id"]))
        output_type, cost, default_model = kind
        return self._start(
            _Start(
                subject=Subject("generation", str(model or default_model), str(body["type"])),
                project_id=str(body["project_id"]),
                cost=cost,
                outputs=(PlannedOutput("output_1", output_type, str(body["prompt"]), size),),
                callback_url=callback_url,
            ),
            faults,
        )

    def estimated_seconds(self) -> int:
        return math.ceil(self._settings.run_seconds)

    def bind(self, run_id: str, faults: Sequence[Fault]) -> None:
        """Bind faults to a run. Its callback is scheduled anew, since its end may have changed."""
        self._faults.add((fault for fault in faults if fault.family is not Family.RUN), run_id=run_id)
        run = self._runs.apply(run_id, (fault for fault in faults if fault.family is Family.RUN))
        self._callbacks.schedule(run)

    def _start(self, start: _Start, faults: Sequence[Fault]) -> Run:
        run_id = self._runs.new_id("run")
        settings = self._settings
        run = Run(
            run_id=run_id,
            subject=start.subject,
            workspace_id=settings.workspace_id,
            project_id=start.project_id,
            created_at=self._clock(),
            seconds=settings.run_seconds,
            cost=start.cost,
            outputs=tuple(
                replace(output, text=make_text(run_id, output.text)) if output.type == "text" else output
                for output in start.outputs
            ),
            read_lag_seconds=settings.read_lag_seconds,
            cost_lag_seconds=settings.cost_lag_seconds,
            callback_url=start.callback_url,
            error_code=start.error_code,
        )
        self._runs.add(run)
        self.bind(run_id, (*self._faults.take(Family.RUN), *faults))
        return run

    def _check_owner(self, workspace_id: str, project_id: str) -> None:
        # FLORA responds to a malformed id with 500, not 400, although a retry cannot help.
        if not workspace_id.startswith("ws_") or not project_id.startswith("prj_"):
            raise ApiProblem(500, "internal_error", "Internal server error")
        if workspace_id != self._settings.workspace_id:
            raise ApiProblem(403, "forbidden", "This API key has no access to the workspace")

    def _callback_url(self, body: dict[str, object], problems: list[Field]) -> str | None:
        url = body.get("callback_url")
        if url is None:
            return None
        if not isinstance(url, str):
            problems.append(Field("callback_url", "must be a string"))
            return None
        problem = callback_problem(url, allow_private=self._settings.allow_private_callbacks)
        if problem is not None:
            problems.append(Field("callback_url", problem))
        return url

    def _size(self, given: object, field: str, problems: list[Field]) -> int:
        if given is None:
            return self._settings.media_bytes
        found = _SIZE.fullmatch(str(given))
        if found is None:
            problems.append(Field(field, "size must be a number of bytes such as 1048576, 10MiB or 2GiB"))
            return 0
        return int(found[1]) * _UNITS[found[2].lower()]
