"""The settings of an emulator. Made by the command line and by tests."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

__all__ = ["API_PATH", "EmulatorSettings"]

API_PATH = "/api/v1"


@dataclass(frozen=True, slots=True)
class EmulatorSettings:
    """Settings of one emulator.

    `time_scale` divides the retry delays of callbacks (10 s, 60 s, 300 s) and the two hours for
    which an idempotency key is kept. All other durations are real seconds.
    """

    host: str = "127.0.0.1"
    port: int = 8787
    public_origin: str | None = None
    """The origin of media and poll URLs; None: the origin of the request."""

    api_key: str = "sk_test_emulator"
    workspace_id: str = "ws_emulator"
    project_id: str = "prj_emulator"
    webhook_secrets: tuple[str, ...] = ("whsec_emulator",)
    """The secrets of callbacks. The first signs."""
    sign_with_all: bool = False
    """Whether every secret signs, as FLORA does while a secret is rotated."""

    run_seconds: float = 5.0
    time_scale: float = 1.0
    read_lag_seconds: float = 0.0
    """How long reads still state "running" after the run has ended and its callback is sent."""
    cost_lag_seconds: float = 0.0
    """How long reads lack `charged_cost` after the end."""
    media_bytes: int = 0
    """The size of every media output; 0: its natural size, some kilobytes."""

    allow_private_callbacks: bool = False
    callback_ca: Path | None = None
    """The only CA that the callback sender trusts; None: the public ones."""
    callback_timeout_seconds: float | None = None
    """None: FLORA's 10 s divided by `time_scale`, but at least one second."""
    refresh_timestamps: bool = False
    """Whether each retry is signed anew; else all attempts share the first one's timestamp."""

    replay_idempotent: bool = False
    """Whether a repeated key gets the first response again; else it gets 409."""
    hide_technique_runs: bool = True
    """Whether /runs/{id} responds 404 for technique runs, as FLORA does."""
    faults: tuple[Mapping[str, object], ...] = ()
    """Faults in force from the start, such as {"kind": "drop", "probability": 0.1}."""
    seed: int | None = None
    """The seed of ids and faults; None: random, so that ids differ from those of an old ledger."""
