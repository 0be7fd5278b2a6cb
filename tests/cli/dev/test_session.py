"""A session of `dev` in the test's own process: diagnoses, replaced tunnels, missed callbacks."""

import asyncio
import contextlib
import io
import json
import os
import shlex
import signal
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from receiver.cli.dev.events import CallbackEvents
from receiver.cli.dev.session import DevSession
from receiver.cli.dev.tunnel.command import Command
from receiver.cli.dev.tunnel.provider import FixedUrl, Provider
from receiver.cli.dev.tunnel.supervisor import Timing
from receiver.cli.dev.view import View
from receiver.config import Settings
from receiver.emulator import parse_faults
from receiver.flora.start_request import StartRequest
from receiver.service.service import Service
from receiver.workers.starter import Committed
from tests.support.patience import PATIENCE_SECONDS
from tests.support.stage import Stage, eventually
from tests.support.tunnel_programs import FORWARDER, wait_until_gone, write_program

QUICK = Timing(check=0.1, confirm=0.01, settle=0.0, max_retry=0.1)
Line = dict[str, Any]


@dataclass
class Session:
    """The output of a session, and the service that it runs beside."""

    service: Service
    screen: io.StringIO
    _read: int = 0

    def lines(self) -> list[Line]:
        return [json.loads(line) for line in self.screen.getvalue().splitlines()]

    async def until(self, wanted: Callable[[Line], bool]) -> Line:
        """Return the next line that is wanted."""

        async def look() -> Line | None:
            for place, line in enumerate(self.lines()[self._read :], self._read):
                if wanted(line):
                    self._read = place + 1
                    return line
            return None

        found = await eventually(look, what=self.screen.getvalue()[-2000:])
        assert found is not None
        return found

    async def start(self) -> str:
        """Start a run and return its id."""
        inputs = ({"id": "prompt", "type": "text", "value": "a lighthouse"},)
        intended = await self.service.starter.start(StartRequest(technique_id="emu-image", inputs=inputs))
        assert isinstance(intended, Committed)
        start = await self.service.starter.wait_for_response(
            intended.start.token, timeout_seconds=PATIENCE_SECONDS
        )
        assert start is not None
        assert start.run_id is not None
        return start.run_id


@contextlib.asynccontextmanager
async def run_session(stage: Stage, provider: Provider, **sections: Any) -> AsyncIterator[Session]:
    settings = Settings.model_validate(stage.document(**sections))
    screen = io.StringIO()
    view = View(as_json=True, stream=screen)
    service = Service(settings, around=lambda app: CallbackEvents(app, view))
    stopping = asyncio.Event()
    async with service.running():
        dev = DevSession(
            service,
            settings,
            view,
            provider,
            ca=stage.ca,
            timing=QUICK,
            canary_seconds=3.0,
            stranded_seconds=0.3,
        )
        working = asyncio.create_task(dev.run(stopping))
        try:
            yield Session(service, screen)
        finally:
            stopping.set()
            assert await working == 0


@pytest.fixture
def forwarder(tmp_path: Path) -> Command:
    program = write_program(tmp_path, "forwarder", FORWARDER)
    return Command(f"{shlex.quote(str(program))} {{port}}", r"listening at (https://\S+)")


def is_canary(code: str) -> Callable[[Line], bool]:
    return lambda line: line["kind"] == "canary" and line["code"] == code


def is_opened(line: Line) -> bool:
    return line["kind"] == "tunnel" and bool(line.get("url"))


async def test_a_stopped_tunnel_is_replaced_and_its_runs_are_caught_up(
    stage: Stage, forwarder: Command
) -> None:
    """A run whose callback goes to the old URL settles by polling; the next one uses the new URL.

    The first run is open when the tunnel is reopened; by the policy it is not due for ten minutes.
    """
    reconcile = {"first_poll_seconds": 600, "max_gap_seconds": 600}
    async with run_session(stage, forwarder, reconcile=reconcile) as session:
        first = (await session.until(is_opened))["url"]
        await session.until(is_canary("open"))
        assert forwarder._program is not None
        pid = next(int(line.split()[1]) for line in forwarder._program.printed if line.startswith("pid "))
        os.kill(pid, signal.SIGSTOP)
        stage.emulator.faults.add(parse_faults([{"kind": "run_seconds", "seconds": 4.0, "next": 1}]))
        stranded = await session.start()
        fault = await session.until(lambda line: line.get("fault") == "tunnel")
        assert fault["kind"] == "canary"
        second = await session.until(is_opened)
        assert second["url"] != first
        assert second["moved"]
        caught = await session.until(lambda line: line["kind"] == "catch-up")
        assert caught["run_ids"] == [stranded]
        await stage.at(stranded, state="completed")
        assert stage.deliveries(stranded) == []
        await session.until(is_canary("open"))
        after = await session.start()
        await stage.at(after, state="completed", verdict="matched")
        shown = await session.until(lambda line: line["kind"] == "callback")
        assert (shown["run_id"], shown["answer"]) == (after, "accepted")


async def test_a_receiver_that_does_not_respond_is_at_fault(stage: Stage, forwarder: Command) -> None:
    """Its listener is stopped; the tunnel is not replaced."""
    async with run_session(stage, forwarder) as session:
        await session.until(is_canary("open"))
        assert session.service._public is not None
        await session.service._public.stop()
        line = await session.until(is_canary("receiver_silent"))
        assert line["fault"] == "receiver"
        assert sum(is_opened(line) for line in session.lines()) == 1


async def test_an_api_with_server_errors_is_at_fault(stage: Stage, forwarder: Command) -> None:
    """FLORA's API returns 5xx while callbacks would arrive; then it recovers."""
    async with run_session(stage, forwarder) as session:
        await session.until(is_canary("open"))
        run_id = await session.start()
        stage.emulator.faults.add(parse_faults([{"kind": "service_unavailable", "next": 3}]))
        line = await session.until(is_canary("flora_fails"))
        assert line["fault"] == "flora"
        await session.until(is_canary("open"))
        await stage.at(run_id, state="completed")


async def test_a_fixed_url_that_does_not_respond_is_unchecked(stage: Stage) -> None:
    """A router that does not route its own address back inside looks the same."""
    async with run_session(stage, FixedUrl("https://127.0.0.1:1")) as session:
        line = await session.until(is_canary("unchecked"))
        assert line["fault"] is None
        assert "cannot be checked from here" in line["reason"]


async def test_floras_rules_apply_to_the_url_of_a_tunnel(stage: Stage) -> None:
    """With the real FLORA, a private address is refused before a run uses it."""
    settings = Settings.model_validate(stage.document(flora={"base_url": "https://app.flora.ai/api/v1"}))
    screen = io.StringIO()
    view = View(as_json=True, stream=screen)
    async with Service(settings).running() as service:
        dev = DevSession(service, settings, view, FixedUrl("https://192.168.1.7"))
        assert await dev.run(asyncio.Event()) == 1
    assert "FLORA refuses private addresses" in screen.getvalue()


async def test_dev_stops_while_a_tunnel_opens(stage: Stage, tmp_path: Path) -> None:
    """Opening can take 30 seconds; stopping does not wait, and ends the program."""
    program = write_program(
        tmp_path, "slow", f"open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())); time.sleep(3600)"
    )
    settings = Settings.model_validate(stage.document())
    stopping = asyncio.Event()
    async with Service(settings).running() as service:
        view = View(as_json=True, stream=io.StringIO())
        working = asyncio.create_task(
            DevSession(service, settings, view, Command(str(program))).run(stopping)
        )

        async def begun() -> int:
            with contextlib.suppress(FileNotFoundError, ValueError):
                return int((tmp_path / "pid").read_text())
            return 0

        pid = await eventually(begun)
        stopping.set()
        assert await working == 0
        await wait_until_gone(pid)


def test_output_that_is_no_terminal_gets_plain_lines() -> None:
    screen = io.StringIO()
    with View(as_json=False, stream=screen) as view:
        view.show_status("nothing of this", is_healthy=True)
        view.show("run", "run_1  completed", run_id="run_1")
    assert screen.getvalue().endswith("  run       run_1  completed\n")
    assert len(screen.getvalue().splitlines()) == 1
