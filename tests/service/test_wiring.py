"""What is built from the settings."""

from datetime import UTC, datetime
from pathlib import Path

import httpx
import pytest

from receiver.config import Settings
from receiver.errors import DownloadFailedError, FloraError
from receiver.service.wiring import build_clients, build_parts, to_policy
from receiver.telemetry import Metrics
from tests.support.forward_proxy import run_forward_proxy


async def test_clients_with_the_same_api_key_share_a_rate_limit() -> None:
    """FLORA counts by key. A workspace without a key of its own uses the key for all others."""
    settings = Settings.model_validate(
        {
            "flora": {"api_key": "sk_live_1"},
            "reconcile": {"concurrency": 3},
            "workspaces": [
                {"id": "ws_1", "secrets": ["whsec_1"]},
                {"id": "ws_2", "secrets": ["whsec_2"], "api_key": "sk_live_2"},
                {"id": "ws_3", "secrets": ["whsec_3"], "api_key": "sk_live_2"},
            ],
        }
    )
    async with httpx.AsyncClient() as http:
        clients = build_clients(settings, http, Metrics(), lambda: datetime.now(UTC))
    limits = {workspace_id: client.rate_limit for workspace_id, client in clients.items()}
    assert set(limits) == {None, "ws_1", "ws_2", "ws_3"}
    assert limits["ws_1"] is limits[None]
    assert limits["ws_2"] is limits["ws_3"]
    assert limits["ws_2"] is not limits[None]
    assert {limit.allowed for limit in limits.values()} == {3}


async def test_downloads_and_the_api_go_through_the_proxies_of_the_settings(tmp_path: Path) -> None:
    """Each through its own: the API gives its name, downloads the address that was checked."""
    async with run_forward_proxy() as first, run_forward_proxy() as second:
        settings = Settings.model_validate(
            {
                "database": {"url": f"sqlite:///{tmp_path}/receiver.db"},
                "flora": {
                    "base_url": "https://flora.invalid/api/v1",
                    "api_key": "sk_live_1",
                    "proxy": f"http://127.0.0.1:{first.port}",
                },
                "downloads": {"proxy": f"127.0.0.1:{second.port}"},
                "handlers": [{"use": "log"}],
            }
        )
        parts = build_parts(settings, policy=to_policy(settings), clock=lambda: datetime.now(UTC))
        with pytest.raises(FloraError, match="the proxy"):
            await parts.clients[None].run("run_1")
        with pytest.raises(DownloadFailedError, match="the proxy"):
            async with parts.downloader.fetch("https://1.1.1.1/x"):
                pass
        await parts.api.aclose()
        await parts.downloader.aclose()
        await parts.database.close()
    assert (first.targets, second.targets) == (["flora.invalid:443"], ["1.1.1.1:443"])
