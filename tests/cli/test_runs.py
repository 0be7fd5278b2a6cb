"""`runs`, `deliveries`, `dispatches` and `channel` against a running `serve` and emulator."""

import json
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from receiver.net import certificates
from tests.cli.conftest import KEYS, RunningCommand, read_exports, run_command
from tests.support.patience import PATIENCE_SECONDS
from tests.support.stage import free_port

PROMPT = "{id: prompt, type: text, value: a lighthouse}"


@dataclass(frozen=True)
class Operator:
    """Runs commands in the directory of a running `serve`."""

    directory: Path
    env: dict[str, str]
    flora: str

    def run(self, *arguments: object, **env: str) -> subprocess.CompletedProcess[str]:
        return run_command(*arguments, cwd=self.directory, env={**self.env, **env})

    def json(self, *arguments: object, code: int = 0) -> Any:
        done = self.run(*arguments, "--json")
        assert done.returncode == code, done.stdout + done.stderr
        return json.loads(done.stdout)

    def text(self, *arguments: object, code: int = 0) -> str:
        done = self.run(*arguments)
        assert done.returncode == code, done.stdout + done.stderr
        assert "Traceback" not in done.stderr
        return done.stdout + done.stderr

    def start(self, *arguments: object, technique: str = "emu-image") -> str:
        return self.text(
            "runs", "start", "--technique-id", technique, "--input", PROMPT, *arguments
        ).split()[0]


@pytest.fixture(scope="module")
def operator(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Operator]:
    """Run `serve` and `emulator`; the URL is in the log, the token in `var/ops-token`."""
    directory = tmp_path_factory.mktemp("served")
    authority = certificates.make_authority()
    (directory / "ca.pem").write_bytes(authority.pem)
    cert, key = certificates.write(certificates.issue(authority), directory)
    quick = (
        "--run-seconds",
        0.1,
        "--time-scale",
        60,
        "--allow-private-callbacks",
        "--callback-ca",
        "ca.pem",
    )
    emulator = RunningCommand("emulator", "--port", 0, *quick, cwd=directory, env=KEYS, errors=False)
    try:
        names = read_exports(emulator)
        port = free_port()
        env = {
            **KEYS,
            **names,
            "RECEIVER_TLS__CERT": str(cert),
            "RECEIVER_TLS__KEY": str(key),
            "RECEIVER_PUBLIC_URL": f"https://127.0.0.1:{port}",
        }
        listen = ("--host", "127.0.0.1", "--port", port, "--ops-port", 0)
        server = RunningCommand("serve", *listen, cwd=directory, env=env, errors=True)
        try:
            ready = json.loads(server.until(lambda line: "service.ready" in line)[-1])
            url = {"RECEIVER_OPS_URL": f"http://{ready['operations']}"}
            yield Operator(directory, url, names["FLORA_BASE_URL"])
        finally:
            assert server.stop() == 0
    finally:
        emulator.stop()


def test_a_run_is_started_by_floras_own_command_line(operator: Operator) -> None:
    """Only the program's name differs; it prints the run's id."""
    done = operator.text(
        "techniques:runs", "create", "--technique-id", "emu-image", "--input", PROMPT,
        "--mode", "async", "--idempotency-key", "cli-1",
    )  # fmt: skip
    assert done.strip().startswith("run_")
    assert operator.start("--idempotency-key", "cli-1") == done.strip()


def test_a_run_that_is_waited_for_prints_its_files(operator: Operator) -> None:
    done = operator.text("runs", "start", "--technique-id", "emu-two-images", "--input", PROMPT, "--wait")
    run_id, *files = done.split("\n")
    assert [Path(file).suffix for file in files if file] == [".png", ".png"]
    assert all(Path(file).is_file() for file in files if file)
    assert operator.text("runs", "wait", run_id).split("\n") == files


def test_inputs_stay_text(operator: Operator) -> None:
    """JSON or YAML, one or a list; a number, a date or a yes in YAML stays text."""
    for given in (
        "{id: prompt, type: text, value: 2026-11-24}",
        '{"id": "prompt", "type": "text", "value": "yes: no"}',
        "[{id: prompt, type: text, value: 007}]",
    ):
        run_id = operator.text("runs", "start", "--technique-id", "emu-text", "--input", given).strip()
        assert operator.json("runs", "wait", run_id)["state"] == "completed"


def test_a_generation_is_started(operator: Operator) -> None:
    body = "{type: image, prompt: a fox, workspace_id: ws_emulator, project_id: prj_emulator, params: {size: 4096}}"
    found = operator.json("runs", "start", "--generate", body, "--metadata", "{market: de}", "--wait")
    assert (found["state"], found["run_type"], found["metadata"]) == (
        "completed",
        "generation",
        {"market": "de"},
    )


def test_a_refusal_has_floras_fields_and_request_id(operator: Operator) -> None:
    done = operator.run(
        "runs", "start", "--technique-id", "emu-image", "--input", "{id: q, type: text, value: x}"
    )
    assert done.returncode == 1
    assert "inputs.0.id" in done.stderr
    assert "req_" in done.stderr
    found = operator.json("runs", "start", "--technique-id", "nope", "--input", PROMPT, code=1)
    assert found["error"] == "not_found"
    assert found["request_id"].startswith("req_")


def test_a_failed_run_fails_the_command(operator: Operator) -> None:
    done = operator.run("runs", "start", "--technique-id", "emu-fail", "--input", PROMPT, "--wait")
    assert done.returncode == 1
    assert "failed" in done.stdout
    run_id = done.stdout.split()[0]
    explanation = operator.text("runs", "explain", run_id)
    assert "GENERATION_PROMPT_MODERATED" in explanation
    assert "It failed." in explanation


def test_a_run_is_shown_listed_and_explained(operator: Operator) -> None:
    run_id = operator.start("--wait", "--metadata", '{"market": "de"}')
    shown = operator.text("runs", "show", run_id)
    assert "completed (matched)" in shown
    assert '"market": "de"' in shown
    assert run_id in operator.text("runs", "list", "--state", "completed")
    assert [run["run_id"] for run in operator.json("runs", "list", "--limit", 1)] == [run_id]
    explanation = operator.text("runs", "explain", run_id)
    for words in ("Its callback arrived in time.", "start requested from FLORA", "storage: stored file://"):
        assert words in explanation
    results = [
        row["result"]
        for row in operator.json("runs", "show", run_id)["dispatches"]
        if row["handler"] == "storage"
    ]
    assert results[0]["files"]
    assert f"storage is done: {json.dumps(results[0])}" in explanation
    assert operator.json("runs", "show", run_id)["finished"]


def test_a_run_that_was_started_elsewhere_is_tracked(operator: Operator) -> None:
    """By its poll_url; a URL of another host is refused."""
    run_id = operator.start("--callback-url", "https://hooks.example.com/mine")
    tracked = operator.text("runs", "track", f"{operator.flora}/techniques/emu-image/runs/{run_id}")
    assert f"{run_id} is tracked" in tracked
    done = operator.run("runs", "track", "https://flora.example/api/v1/runs/run_1")
    assert (done.returncode, "base_url" in done.stderr) == (1, True)
    assert operator.run("runs", "track", "nonsense").returncode == 1


def test_a_run_that_cannot_be_read_says_why(operator: Operator) -> None:
    """A login page answers in FLORA's place: the first line of the explanation says so, and nothing was read."""
    faults = httpx.URL(operator.flora).copy_with(path="/_emulator/faults")
    fault = {"kind": "html", "path": "/techniques/tech_emu_image/runs/run_odd"}
    assert httpx.post(faults, json={"faults": [fault]}, trust_env=False).is_success
    operator.text("runs", "track", "run_odd", "--technique-id", "tech_emu_image")
    operator.text("runs", "refresh", "run_odd")
    lines = [""]
    until = time.monotonic() + PATIENCE_SECONDS
    while "last read failed" not in lines[0] and time.monotonic() < until:
        lines = operator.text("runs", "explain", "run_odd").split("\n")
    assert lines[0].startswith("run_odd is open. Its end is not known: the last read failed: HTTP 200: ")
    assert "it is text/html, not JSON" in lines[0]
    assert any(line.startswith("It was read 0 times, and ") for line in lines)
    assert any("read failed: HTTP 200" in line and "req_" in line for line in lines)
    [read, *_] = operator.json("runs", "show", "run_odd")["last_reads"]
    assert (read["outcome"], read["http_status"]) == ("failed", 200)


def test_a_run_is_refreshed_and_dispatched_again(operator: Operator) -> None:
    run_id = operator.start("--wait")
    assert f"{run_id} is due to be read, for its newest URLs." in operator.text("runs", "refresh", run_id)
    assert operator.json("runs", "redispatch", run_id, "--handler", "storage")["dispatches"] >= 1
    assert operator.json("runs", "wait", run_id)["state"] == "completed"
    assert "0 dispatches" in operator.text("runs", "redispatch", run_id, "--handler", "nobody", code=1)
    assert operator.json("runs", "redispatch", run_id, "--handler", "log", "--again")["dispatches"] == 1
    assert "0 runs" in operator.text(
        "runs", "redispatch", "--missing", "--handler", "log", "--since", "2026-11-01"
    )
    assert "--since" in operator.text("runs", "redispatch", "--missing", "--handler", "log", code=2)
    assert "No dispatches are orphaned." in operator.text("dispatches", "list", "--state", "orphaned")


def test_callbacks_dispatches_and_the_channel_are_shown(operator: Operator) -> None:
    run_id = operator.start("--wait")
    [delivery] = operator.json("deliveries", "list", "--run-id", run_id)
    assert delivery["delivery_id"] in operator.text("deliveries", "list")
    assert run_id in operator.text("deliveries", "show", delivery["delivery_id"])
    assert "No dispatches are dead." in operator.text("dispatches", "list")
    assert run_id in operator.text("dispatches", "list", "--state", "done")
    assert "0 dispatches" in operator.text("dispatches", "retry", "--all")
    assert "0 dispatches" in operator.text("dispatches", "retry", "--run-id", run_id, "--handler", "log")
    assert "--all" in operator.text("dispatches", "retry", code=2)
    assert "--all" in operator.text("dispatches", "retry", "--all", "--handler", "log", code=2)
    assert "matched" in operator.text("channel")
    assert operator.json("channel")["health"]["ok"]


def test_an_unknown_id_is_reported(operator: Operator) -> None:
    for command in (("runs", "show"), ("runs", "wait"), ("runs", "explain"), ("deliveries", "show")):
        assert "no such" in operator.text(*command, "run_nobody", code=1)
    assert "no such start" in operator.text("runs", "resolve", "nobody", "--no-run", code=1)


@pytest.mark.parametrize(
    "arguments",
    [
        ("runs", "start"),
        ("runs", "start", "--technique-id", "a", "--generate", "{}"),
        ("runs", "start", "--technique-id", "a", "--input", "prompt"),
        ("runs", "start", "--technique-id", "a", "--input", "{id: a, type: text}"),
        ("runs", "start", "--technique-id", "a", "--input", "{id: ["),
        ("runs", "start", "--generate", "[]"),
        ("runs", "start", "--generate", "{at: 2026-11-24}"),
        ("runs", "start", "--technique-id", "a", "--metadata", "{1: 2}"),
        ("runs", "resolve", "k"),
        ("runs", "resolve", "k", "--run-id", "run_1", "--no-run"),
        ("runs", "wait", "run_1", "--timeout", "-1"),
        ("runs", "list", "--limit", "0"),
    ],
)
def test_misuse_is_exit_code_2(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    """Found before any request: no service is needed."""
    done = run_command(*arguments, cwd=tmp_path)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stderr


def test_a_missing_token_is_reported_with_its_file(tmp_path: Path) -> None:
    done = run_command("runs", "list", cwd=tmp_path)
    assert done.returncode == 2
    for words in ("RECEIVER_OPS_TOKEN", "var/ops-token", "flora-receiver serve"):
        assert words in done.stderr


def test_a_missing_service_is_reported_with_advice(tmp_path: Path) -> None:
    env = {"RECEIVER_OPS_URL": f"http://127.0.0.1:{free_port()}", "RECEIVER_OPS_TOKEN": "t"}
    done = run_command("runs", "list", cwd=tmp_path, env=env)
    assert done.returncode == 1
    assert "flora-receiver serve" in done.stderr
    done = run_command("channel", "--json", cwd=tmp_path, env=env)
    assert json.loads(done.stdout)["error"] == "unreachable"


def test_a_start_that_failed_can_be_repeated(tmp_path: Path) -> None:
    """The key that the command made up is printed."""
    env = {"RECEIVER_OPS_URL": f"http://127.0.0.1:{free_port()}", "RECEIVER_OPS_TOKEN": "t"}
    done = run_command("runs", "start", "--technique-id", "a", cwd=tmp_path, env=env)
    assert done.returncode == 1
    assert "  --idempotency-key auto-" in done.stderr
    done = run_command("runs", "start", "--technique-id", "a", "--json", cwd=tmp_path, env=env)
    assert json.loads(done.stdout)["idempotency_key"].startswith("auto-")


def test_a_wrong_token_is_reported(operator: Operator) -> None:
    done = operator.run("runs", "list", RECEIVER_OPS_TOKEN="wrong")
    assert (done.returncode, "RECEIVER_OPS_TOKEN" in done.stderr) == (1, True)


def test_the_service_is_found_by_the_settings(operator: Operator) -> None:
    """Without RECEIVER_OPS_URL, the address and the token come from the settings."""
    port = operator.env["RECEIVER_OPS_URL"].rpartition(":")[2]
    done = run_command("channel", cwd=operator.directory, env={"RECEIVER_OPERATIONS__PORT": port})
    assert done.returncode == 0, done.stderr
