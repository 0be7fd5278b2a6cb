"""FLORA's official TypeScript SDK works against the emulator."""

import asyncio
import shutil
from pathlib import Path

import pytest

from receiver.emulator import EmulatorSettings
from tests.emulator.conftest import MakeBench
from tests.support.patience import PATIENCE_SECONDS

SDK = Path(__file__).parent / "sdk"


async def run(*command: str, cwd: Path) -> None:
    """Run a program and fail with what it said when it fails."""
    process = await asyncio.create_subprocess_exec(
        *command, cwd=cwd, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    try:
        said, _ = await asyncio.wait_for(process.communicate(), PATIENCE_SECONDS)
    except TimeoutError:
        process.kill()
        await process.wait()
        raise
    assert process.returncode == 0, f"{' '.join(command[:2])} failed:\n{said.decode(errors='replace')}"


async def test_official_sdk(make_bench: MakeBench, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Both ways to start, single reads, lists page by page, error classes and `webhooks.unwrap`."""
    for program in ("node", "npm"):
        assert shutil.which(program), (
            f"{program} is missing: install nodejs and npm to check against FLORA's own SDK"
        )
    folder = tmp_path_factory.mktemp("sdk")
    for name in ("package.json", "package-lock.json", "check.mjs"):
        shutil.copy(SDK / name, folder)
    await run("npm", "ci", "--no-audit", "--no-fund", "--ignore-scripts", cwd=folder)
    settings = EmulatorSettings(run_seconds=0.2, allow_private_callbacks=True)
    bench = await make_bench(settings)
    base_url = bench.emulator.base_url(bench.origin)
    await run("node", "check.mjs", base_url, settings.api_key, settings.webhook_secrets[0], cwd=folder)
