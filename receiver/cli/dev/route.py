"""Checks the route of a callback with two canaries: through the public URL and on loopback."""

import asyncio
from dataclasses import replace

import httpx

from receiver.cli.dev.tunnel.diagnosis import Diagnosis, FloraState, compare_request_counts, diagnose
from receiver.cli.dev.tunnel.provider import FixedUrl, LocalEndpoint, Provider
from receiver.cli.doctor.probe import probe
from receiver.config.callback_url import CALLBACK_PATH
from receiver.service.service import Service

__all__ = ["RouteCheck"]


class RouteCheck:
    """Sends canaries signed with `secret` and remembers the latest diagnosis."""

    def __init__(
        self,
        service: Service,
        local: LocalEndpoint,
        provider: Provider | None,
        *,
        secret: str,
        outside: httpx.AsyncClient,
        inside: httpx.AsyncClient,
    ) -> None:
        self._service = service
        self._local_url = local.url + CALLBACK_PATH
        self._provider = provider
        self._secret = secret
        self._outside = outside
        self._inside = inside
        self._request_counts: dict[str, float] = {}
        self._flora = FloraState.UNKNOWN
        self.latest: Diagnosis | None = None

    async def check(self, url: str | None) -> Diagnosis:
        """Send both canaries and return the diagnosis. `url` is the public URL without its path."""
        inside = probe(self._local_url, self._secret, client=self._inside)
        if url is None:
            far, near = None, await inside
        else:
            outside = probe(url + CALLBACK_PATH, self._secret, client=self._outside)
            far, near = await asyncio.gather(outside, inside)
        self._update_flora()
        is_ours = not isinstance(self._provider, FixedUrl)
        diagnosis = diagnose(far, near, self._flora, is_ours=is_ours)
        if diagnosis.code == "unreachable" and self._provider is not None and self._provider.hint:
            diagnosis = replace(diagnosis, reason=f"{diagnosis.reason}; {self._provider.hint}")
        self.latest = diagnosis
        return diagnosis

    def _update_flora(self) -> None:
        before, self._request_counts = self._request_counts, _count_requests(self._service)
        state = compare_request_counts(before, self._request_counts)
        if state is not FloraState.UNKNOWN:
            self._flora = state


def _count_requests(service: Service) -> dict[str, float]:
    """Return how many requests to FLORA's API ended with each status."""
    return {
        sample.labels["status"]: sample.value
        for metric in service.metrics.api_requests.collect()
        for sample in metric.samples
        if sample.name.endswith("_total")
    }
