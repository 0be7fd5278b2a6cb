"""Every metric that is documented moves when what it counts happens to a real service."""

import httpx
import pytest

from receiver.telemetry import Metrics
from tests.support.patience import PATIENCE_SECONDS
from tests.support.stage import Stage, eventually

TOKEN = "0123456789abcdef"


@pytest.fixture
def stage(stage: Stage, ledger_url: str | None) -> Stage:
    """Every test of this file runs on both databases."""
    stage.postgres = ledger_url
    return stage


def find_moved(scraped: str) -> set[str]:
    """Return the metrics that have a sample other than 0."""
    samples = (line.rsplit(" ", 1) for line in scraped.splitlines() if not line.startswith("#"))
    names = {
        sample.partition("{")[0] for sample, value in samples if float(value) and "_created" not in sample
    }
    return {name.removesuffix("_count") for name in names}


async def test_every_documented_metric_moves(stage: Stage) -> None:
    """One run is done, one is stalled, one waits for its place, one runs on, one caller is cut off."""
    handlers = [{"use": "storage", "concurrency": 1, "options": {"url": str(stage.outputs)}}]
    documented = {name for name, _, _ in Metrics().catalogue()}
    async with (
        stage.service(operations={"token": TOKEN}, handlers=handlers) as service,
        stage.client() as client,
        httpx.AsyncClient(trust_env=False, timeout=PATIENCE_SECONDS) as operations,
    ):
        host, port = service.operations_address

        async def find_unmoved() -> set[str]:
            answer = await operations.get(
                f"http://{host}:{port}/metrics", headers={"Authorization": f"Bearer {TOKEN}"}
            )
            return documented - find_moved(answer.text)

        assert {"flora_receiver_callbacks_total", "flora_receiver_download_bytes_total"} <= (
            await find_unmoved()
        )
        await stage.over(await stage.track(service))
        await stage.track(service, "emu-image", {"kind": "stall"})
        await stage.track(service, "emu-image", {"kind": "stall"})
        await stage.track(service, "emu-image", {"kind": "run_seconds", "seconds": 3600})
        with pytest.raises(httpx.TransportError):
            await client.get(stage.url, headers={"X-Large": "x" * 50_000})

        unmoved = documented

        async def has_moved() -> bool:
            nonlocal unmoved
            unmoved = await find_unmoved()
            return not unmoved

        try:
            await eventually(has_moved)
        except AssertionError as error:
            raise AssertionError(f"these never move: {sorted(unmoved)}") from error
