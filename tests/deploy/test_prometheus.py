"""Metrics and alerts as Prometheus' own tools see them."""

import asyncio
import re
import shutil
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest

from receiver.client.client import ReceiverClient
from receiver.errors import ReceiverApiError
from receiver.telemetry import Metrics
from tests.support.stage import Stage, run_stage

HERE = Path(__file__).parents[2] / "deploy/prometheus"
TOKEN = "0123456789abcdef"


@pytest.fixture
async def stage(tmp_path: Path) -> AsyncIterator[Stage]:
    async with run_stage(tmp_path) as made:
        yield made


def promtool(*words: str, given: str | None = None) -> subprocess.CompletedProcess[str]:
    program = shutil.which("promtool")
    if program is None:
        pytest.fail("promtool is missing: apt-get install prometheus", pytrace=False)
    return subprocess.run(
        [program, *words], input=given, capture_output=True, text=True, check=False, cwd=HERE
    )


async def test_a_scrape_of_a_real_service_is_clean(stage: Stage) -> None:
    """`promtool check metrics` has nothing to say; the essentials are there, with the work that was done in them."""
    async with stage.service(operations={"token": TOKEN}) as service:
        run_id = await stage.track(service)
        await stage.over(run_id)
        host, port = service.operations_address
        with ReceiverClient(f"http://{host}:{port}", TOKEN) as receiver:
            inputs = [{"id": "prompt", "type": "text", "value": "a lighthouse"}]
            started = await asyncio.to_thread(receiver.start, "emu-image", inputs, callback_url=stage.url)
            await stage.over(str(started.run_id))
            with pytest.raises(ReceiverApiError):
                await asyncio.to_thread(receiver.start, "tech_nowhere", inputs, callback_url=stage.url)
        async with httpx.AsyncClient(trust_env=False) as client:
            headers = {"Authorization": f"Bearer {TOKEN}"}
            scraped = (await client.get(f"http://{host}:{port}/metrics", headers=headers)).text
    checked = await asyncio.to_thread(promtool, "check", "metrics", given=scraped)
    assert (checked.returncode, checked.stdout, checked.stderr) == (0, "", "")
    for line in (
        'flora_receiver_callbacks_total{result="accepted"} 2.0',
        "flora_receiver_callback_seconds_count 2.0",
        'flora_receiver_runs_settled_total{state="completed"} 2.0',
        'flora_receiver_verdicts_total{verdict="matched"} 2.0',
        'flora_receiver_dispatches_total{handler="storage",outcome="done"} 2.0',
        'flora_receiver_api_requests_total{status="201"} 1.0',
        'flora_receiver_api_requests_total{status="404"} 1.0',
        'flora_receiver_dispatch_backlog{state="ready"} 0.0',
        'flora_receiver_overdue_seconds{queue="dispatch"} 0.0',
        'flora_receiver_dispatch_backlog{state="orphaned"} 0.0',
    ):
        assert line in scraped, line


def test_alerts_are_rules_that_fire_when_they_should() -> None:
    for words in (("check", "rules", "alerts.yml"), ("test", "rules", "alerts.test.yml")):
        done = promtool(*words)
        assert done.returncode == 0, done.stdout + done.stderr


def test_alerts_ask_for_metrics_that_there_are() -> None:
    """An alert on a name that nobody exposes never fires."""
    asked = set(re.findall(r"flora_receiver_\w+", (HERE / "alerts.yml").read_text()))
    assert asked <= {name for name, _, _ in Metrics().catalogue()}
