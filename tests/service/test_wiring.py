"""What is built from the settings."""

from datetime import UTC, datetime

import httpx

from receiver.config import Settings
from receiver.service.wiring import build_clients
from receiver.telemetry import Metrics


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
