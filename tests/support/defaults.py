"""Values that the service builds from its settings, as they are where no setting is changed."""

from dataclasses import replace
from typing import Any

from receiver.config import Settings
from receiver.net.download import DownloadLimits
from receiver.service import wiring
from receiver.telemetry import Metrics
from receiver.web.connection_guard import Limits
from receiver.workers.janitor import Retention
from receiver.workers.sweeper import Discovery

_SETTINGS = Settings()


def a_discovery(**fields: Any) -> Discovery:
    return replace(wiring.to_discovery(_SETTINGS), **fields)


def connection_limits(**fields: Any) -> Limits:
    guard = wiring.build_public_guard(_SETTINGS, Metrics())
    assert guard is not None
    return replace(guard.limits, **fields)


def download_limits(**fields: Any) -> DownloadLimits:
    return replace(wiring.to_download_limits(_SETTINGS), **fields)


def a_retention(**fields: Any) -> Retention:
    return replace(wiring.to_retention(_SETTINGS), **fields)
