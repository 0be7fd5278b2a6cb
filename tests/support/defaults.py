"""Values that the service builds from its settings, as they are where no setting is changed."""

from dataclasses import replace
from typing import Any

from receiver.config import Settings
from receiver.service import wiring
from receiver.workers.janitor import Retention
from receiver.workers.sweeper import Discovery

_SETTINGS = Settings()


def a_discovery(**fields: Any) -> Discovery:
    return replace(wiring.discovery(_SETTINGS), **fields)


def a_retention(**fields: Any) -> Retention:
    return replace(wiring.retention(_SETTINGS), **fields)
