"""Commands with standard streams that are closed, broken or narrow, and what they never print."""

import json
import subprocess
from pathlib import Path

import pytest

from tests.cli.conftest import COMMAND, KEYS, Start, environment, run_command, wait_until_ready
from tests.support.patience import PATIENCE_SECONDS

COMMANDS = (
    "--version",
    "init --dir new",
    "check",
    "check --json",
    "migrate",
    "handlers list",
    "doctor --json",
)


def shell(line: str, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """Run a line of the shell in which `$C` is the command."""
    return subprocess.run(
        ["/bin/sh", "-c", line],
        cwd=cwd,
        env=environment(C=str(COMMAND), FLORA_BASE_URL="http://127.0.0.1:1", **KEYS, **env),
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE_SECONDS,
    )


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_a_command_does_its_work_with_closed_streams(closed: str, tmp_path: Path) -> None:
    """Its exit code is the same, and no traceback takes the place of its output."""
    for number, command in enumerate(COMMANDS):
        open_directory, closed_directory = tmp_path / f"{number}-open", tmp_path / f"{number}-closed"
        open_directory.mkdir()
        closed_directory.mkdir()
        expected = shell(f"$C {command}", open_directory)
        done = shell(f"$C {command} {closed}", closed_directory)
        assert (done.returncode, "Traceback" in done.stderr) == (expected.returncode, False), command


@pytest.mark.parametrize("closed", [{"stdin": False}, {"stderr": False}])
def test_a_closed_stream_does_not_get_into_the_ledger(closed: dict[str, bool], tmp_path: Path) -> None:
    """What is opened next would otherwise have the descriptor, and be written to by every print."""
    redirect = "<&-" if "stdin" in closed else "2>&-"
    assert shell(f"$C migrate {redirect}", tmp_path).returncode == 0
    assert "up to date" in run_command("check", cwd=tmp_path, env=KEYS).stdout


def test_serve_runs_without_standard_error(tmp_path: Path) -> None:
    """Its log has nowhere to go; callbacks have."""
    line = (
        "$C serve --host 127.0.0.1 --port 0 --ops-port 0 2>&- >&- <&- & pid=$!; "
        "until [ -s var/ops-token ]; do kill -0 $pid || exit 9; done; "
        "until kill -TERM $pid && wait $pid; do :; done"
    )
    assert shell(line, tmp_path).returncode == 0


def test_json_stays_json_in_a_narrow_encoding(tmp_path: Path) -> None:
    """Characters that it lacks are escaped, in text as in JSON."""
    toml = '[[handlers]]\nuse = "storage"\nurl = "Übersicht–🎬"\n'
    (tmp_path / "receiver.toml").write_text(toml, "utf-8")
    for encoding in ("ascii", "latin-1", "cp1252", "utf-8"):
        done = shell("$C check --json", tmp_path, PYTHONIOENCODING=encoding)
        assert (done.returncode, done.stderr) == (0, "")
        assert json.loads(done.stdout)["settings"]["handlers"][0]["options"]["url"] == "Übersicht–🎬"
    done = shell("$C handlers show 'Übersicht:🎬'", tmp_path, PYTHONIOENCODING="ascii")
    assert (done.returncode, "Traceback" in done.stderr, "\\xdc" in done.stderr) == (1, False, True)


def test_the_log_stays_json_in_a_narrow_encoding(start: Start, tmp_path: Path) -> None:
    toml = '[[handlers]]\nuse = "storage"\nname = "x"\nurl = "out"\nwhen = { run_type = "Übersicht" }\n'
    (tmp_path / "receiver.toml").write_text(toml, "utf-8")
    server = start(
        "serve",
        "--host",
        "127.0.0.1",
        "--port",
        0,
        "--ops-port",
        0,
        errors=True,
        PYTHONIOENCODING="ascii",
        **KEYS,
    )
    line = json.loads(server.until(lambda line: "config.odd" in line)[-1])
    assert "Übersicht" in line["reason"]
    wait_until_ready(server)


def test_output_that_is_lost_is_an_error(tmp_path: Path) -> None:
    done = shell("$C handlers list > /dev/full", tmp_path)
    assert (done.returncode, done.stderr) == (
        1,
        "Error: the output cannot be written: No space left on device\n",
    )
    assert shell("$C handlers list | true", tmp_path).stderr == ""
    assert shell("$C nonsense 2> /dev/full", tmp_path).returncode == 2


def test_no_warning_of_a_library_is_printed(tmp_path: Path) -> None:
    """Of none that is imported, and none that a filter in the settings would cause."""
    (tmp_path / "warning.py").write_text(
        """
import logging, warnings
warnings.warn("old", stacklevel=1)
warnings.warn("older", DeprecationWarning, stacklevel=1)
logging.getLogger("lib").warning("with sk_live_SECRET")

def handle(run, context): pass
"""
    )
    toml = """
[[handlers]]
use = "warning:handle"
when = { status = "completed", metadata = { a = 1 }, output_type = ["imageUrl"] }
"""
    (tmp_path / "receiver.toml").write_text(toml)
    printed = ""
    for command in ("handlers show warning:handle", "check", "check --json"):
        done = shell(f"PYTHONWARNINGS= $C {command}", tmp_path, PYTHONPATH=str(tmp_path))
        assert (done.returncode, done.stderr) == (0, "with sk_live_***\n")
        printed = done.stdout
    found = json.loads(printed)["settings"]["handlers"][0]
    assert (found["when"]["status"], found["when"]["metadata"]) == (["completed"], {"a": 1})


def test_the_traceback_of_a_bug_shows_no_secret(tmp_path: Path) -> None:
    script = (
        "import receiver.cli.app as app\n"
        "@app.app.command()\n"
        "def broken(): raise RuntimeError('Bearer abc sk_live_SECRET')\n"
        "app.main()\n"
    )
    (tmp_path / "broken.py").write_text(script)
    python = COMMAND.with_name("python")
    done = shell(f"{python} broken.py broken", tmp_path)
    assert done.returncode == 1
    assert "RuntimeError: Bearer *** sk_live_***" in done.stderr
    assert "SECRET" not in done.stderr
