"""The handler `log`: writes one log line for every run that ends."""

from typing import ClassVar

from pydantic import BaseModel, ConfigDict

from receiver.handler import Answer, Context, Done, Event, SettledRun, When


class LogConfig(BaseModel):
    """The handler has no options."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Log:
    """Logs `run.completed` as info; `run.failed` and `run.lost`, with error code, as warnings."""

    Config: ClassVar[type[BaseModel]] = LogConfig
    on: ClassVar[tuple[Event, ...]] = (Event.SETTLED,)
    when: ClassVar[When] = When()

    def __init__(self, config: LogConfig) -> None:
        self._config = config

    async def handle(self, run: SettledRun, context: Context) -> Answer:
        values = {
            "run_id": run.run_id,
            "status": run.status,
            "outputs": len(run.outputs),
            "charged_cost": run.charged_cost,
            "verdict": run.verdict,
        }
        if run.status == "completed":
            context.log.info("run.completed", **values)
        else:
            event = f"run.{run.status}"
            context.log.warning(event, **values, error_code=run.error_code)
        return Done()
