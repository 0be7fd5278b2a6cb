"""What one emulator is told: identity, pace, what it lets through. Built by the command line and by tests."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

__all__ = ["API_PATH", "EmulatorSettings"]

API_PATH = "/api/v1"


@dataclass(frozen=True, slots=True)
class EmulatorSettings:
    """Settings of one emulator. Everything named `_seconds` is real seconds; `time_scale` touches FLORA's own clocks only.

    `time_scale` divides the retry delays of callbacks (10 s, 60 s, 300 s) and the two hours an idempotency key lives.
    """

    host: str = "127.0.0.1"
    port: int = 8787
    # Absolute media and poll URLs start with this; None takes the origin of the request that asks.
    public_origin: str | None = None

    api_key: str = "sk_test_emulator"
    workspace_id: str = "ws_emulator"
    project_id: str = "prj_emulator"
    # The first signs; all of them do, as FLORA does while a secret is rotated, when `sign_with_all` is set.
    webhook_secrets: tuple[str, ...] = ("whsec_emulator",)
    sign_with_all: bool = False

    run_seconds: float = 5.0
    time_scale: float = 1.0
    # How long reads still say "running" after the run has ended and its callback is on its way.
    read_lag_seconds: float = 0.0
    # How long `charged_cost` is absent from reads after the end.
    cost_lag_seconds: float = 0.0
    # Size of every media output; 0 is the natural size (some kilobytes), anything larger is padded, streamed, never held.
    media_bytes: int = 0

    allow_private_callbacks: bool = False
    # The only certificate authority the callback sender trusts; None is the usual public ones.
    callback_ca: Path | None = None
    # None is FLORA's 10 s over `time_scale`, though never under a second: a loopback server is not faster because we pretend.
    callback_timeout_seconds: float | None = None
    # Whether each retry is signed anew; False keeps the first attempt's `t` and signature, as FLORA's documents read.
    refresh_timestamps: bool = False

    # A repeated key answers 409; True answers the original again with `idempotent-replayed: true`.
    replay_idempotent: bool = False
    # FLORA answers 404 for a technique run on /runs/{id}; False serves it there too.
    hide_technique_runs: bool = True
    # Faults in force from the start, each as the control endpoint takes them: {"kind": "drop", "probability": 0.1}.
    faults: tuple[Mapping[str, object], ...] = ()
    # None differs on every start, so that ids never meet those a receiver's ledger still holds from the last time.
    seed: int | None = None
