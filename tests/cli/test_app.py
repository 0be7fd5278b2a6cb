"""The command line: its help, its output, and advice for every usage error."""

import errno
import json
import os
import pwd
import signal
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import httpx
import pytest

from receiver import __version__
from receiver.net import certificates
from tests.cli.conftest import (
    COMMAND,
    KEYS,
    Start,
    environment,
    read_exports,
    run_command,
    wait_until_ready,
)
from tests.support.stage import free_port

WITHOUT_LOCKS = Path(__file__).parents[1] / "support" / "without_locks.py"

COMMANDS = (
    "",
    "serve",
    "check",
    "migrate",
    "demo",
    "dev",
    "emulator",
    "trigger",
    "backup",
    "restore",
    "init",
    "dev-cert",
    "doctor",
    "handlers",
    "handlers list",
    "handlers schema",
)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str, tmp_path: Path) -> None:
    done = run_command(*command.split(), "--help", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"Usage: flora-receiver {command}".rstrip())


@pytest.mark.parametrize("group", ["", "runs", "handlers", "deliveries", "dispatches"])
def test_no_help_of_a_command_is_cut_at_80_columns(group: str, tmp_path: Path) -> None:
    done = run_command(*group.split(), "--help", cwd=tmp_path, env={"COLUMNS": "80"})
    assert "..." not in done.stdout.split("Commands:")[1]


def test_the_version_is_that_of_the_package(tmp_path: Path) -> None:
    assert run_command("--version", cwd=tmp_path).stdout == f"{__version__}\n"


def test_the_package_can_be_run_as_the_command(tmp_path: Path) -> None:
    arguments = [sys.executable, "-m", "receiver", "--version"]
    done = subprocess.run(
        arguments, cwd=tmp_path, env=environment(), capture_output=True, text=True, check=True
    )
    assert done.stdout == f"{__version__}\n"


def test_check_passes_with_two_variables(tmp_path: Path) -> None:
    """Before and after the database is created."""
    done = run_command("check", cwd=tmp_path, env=KEYS)
    assert (done.returncode, done.stderr) == (0, "")
    assert "Settings: valid" in done.stdout
    assert "Handlers: storage, log" in done.stdout
    assert "empty: `serve` will create its tables" in done.stdout
    run_command("migrate", cwd=tmp_path)
    assert "Database: up to date" in run_command("check", cwd=tmp_path, env=KEYS).stdout


def names(directory: Path) -> list[str]:
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*"))


def test_check_and_doctor_make_nothing(tmp_path: Path) -> None:
    """No ledger, no lock, no directory for outputs or programs: whoever runs them may not be the service's user."""
    home = tmp_path / "home"
    home.mkdir()
    toml = '[[handlers]]\nuse = "storage"\nurl = "far/away"\n[[handlers]]\nuse = "command"\ncommand = ["true"]\n'
    (home / "receiver.toml").write_text(toml)
    env = {**KEYS, "TMPDIR": str(home), "FLORA_BASE_URL": f"http://127.0.0.1:{free_port()}"}
    assert run_command("check", cwd=home, env=env).returncode == 0
    run_command("doctor", cwd=home, env=env)
    assert names(home) == ["receiver.toml"]
    assert run_command("migrate", cwd=home, env=env).returncode == 0
    made = names(home)
    assert run_command("check", cwd=home, env=env).returncode == 0
    assert names(home) == made


def test_what_root_makes_belongs_to_the_owner_of_the_directory(tmp_path: Path) -> None:
    """As for `migrate` in the directory of the service's user; for anyone else it is their own anyway."""
    home = tmp_path / "home"
    home.mkdir()
    if os.geteuid() == 0:
        os.chown(home, pwd.getpwnam("nobody").pw_uid, pwd.getpwnam("nobody").pw_gid)
    owner = home.stat().st_uid
    for command in (
        ("init",),
        ("dev-cert",),
        ("migrate",),
        ("backup", "copies.db"),
        ("restore", "copies.db"),
    ):
        assert run_command(*command, cwd=home, env=KEYS).returncode == 0
    run_command("trigger", "http://127.0.0.1:1/", "--record", "sent.jsonl", cwd=home, env=KEYS)
    made = names(home)
    assert {
        "sent.jsonl",
        "receiver.toml",
        ".env",
        "var/tls/ca.key",
        "var/receiver.db",
        "var/receiver.db.lock",
    } <= set(made)
    assert [name for name in made if (home / name).stat().st_uid != owner] == []


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_named_as_such(number: int, tmp_path: Path) -> None:
    """By `check` before there is a ledger too; it belongs to no other process."""
    for command in ("check", "serve", "migrate", "check"):
        done = subprocess.run(
            [sys.executable, WITHOUT_LOCKS, str(number), COMMAND, command],
            cwd=tmp_path,
            env=environment(**KEYS),
            capture_output=True,
            text=True,
            check=False,
        )
        printed = done.stdout + done.stderr
        assert done.returncode == 1
        assert "gives no locks" in printed
        assert "put it on a local disk" in printed
        assert "another running" not in printed
        assert "Traceback" not in printed


def write_certificate(directory: Path, host: str, *, days: int) -> dict[str, str]:
    """Write a certificate, and return the variables that configure it."""
    issued = certificates.issue(certificates.make_authority(), host, life=timedelta(days=days))
    cert, key = certificates.write(issued, directory)
    return {"RECEIVER_TLS__CERT": str(cert), "RECEIVER_TLS__KEY": str(key)}


def test_check_and_serve_say_what_is_wrong_with_a_certificate(start: Start, tmp_path: Path) -> None:
    """One that is expired or for another host is said; `serve` still runs, since reads of runs need none."""
    tls = write_certificate(tmp_path, "other.example.com", days=-1)
    env = {**KEYS, **tls, "RECEIVER_PUBLIC_URL": "https://hooks.example.com"}
    done = run_command("check", cwd=tmp_path, env=env)
    assert done.returncode == 1
    assert "Error: tls.cert: has expired at" in done.stdout
    assert "Warning: tls.cert: is for other.example.com, and not for hooks.example.com" in done.stdout
    server = start("serve", "--host", "127.0.0.1", "--port", 0, "--ops-port", 0, errors=True, **env)
    lines = [json.loads(line) for line in server.until(lambda line: "service.ready" in line)]
    said = [(line["level"], line["setting"]) for line in lines if line["event"] == "tls.untrusted"]
    assert said == [("error", "tls.cert"), ("warning", "tls.cert")]


def test_a_key_that_does_not_fit_its_certificate_is_refused(tmp_path: Path) -> None:
    """So is a file of CAs without any: no connection could be made."""
    tls = write_certificate(tmp_path, "hooks.example.com", days=30)
    (tmp_path / "other").mkdir()
    tls["RECEIVER_TLS__KEY"] = write_certificate(tmp_path / "other", "x", days=30)["RECEIVER_TLS__KEY"]
    env = {**KEYS, **tls, "RECEIVER_FLORA__CA_FILE": tls["RECEIVER_TLS__KEY"]}
    checked, served = (run_command(command, cwd=tmp_path, env=env) for command in ("check", "serve"))
    assert (checked.returncode, served.returncode) == (1, 2)
    for printed in (checked.stdout, served.stderr):
        assert "tls.key: does not fit the certificate" in printed
        assert "flora.ca_file: holds no certificate" in printed
        assert "Traceback" not in printed


def test_check_prints_no_secret_as_json(tmp_path: Path) -> None:
    done = run_command("check", "--json", cwd=tmp_path, env=KEYS)
    found = json.loads(done.stdout)
    assert (done.returncode, found["ok"], found["problems"]) == (0, True, [])
    assert found["settings"]["flora"]["api_key"] == "***"
    assert not any(value in done.stdout for value in KEYS.values())


def test_check_prints_no_secret_of_a_handler_as_json(tmp_path: Path) -> None:
    """An option is a secret by its type, written in the file or taken from the environment."""
    toml = '[[handlers]]\nuse = "notify"\nurls = ["json://127.0.0.1/hunter2", "env:CHAT"]\nseconds = 5'
    (tmp_path / "receiver.toml").write_text(toml, "utf-8")
    done = run_command("check", "--json", cwd=tmp_path, env={**KEYS, "CHAT": "json://127.0.0.1/hunter3"})
    found = json.loads(done.stdout)
    assert (done.returncode, found["settings"]["handlers"][0]["options"]["seconds"]) == (0, 5)
    assert "hunter" not in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("toml", "env", "path", "advice"),
    [
        ("", {"FLORA_API_KEY": ""}, "flora.api_key", "set FLORA_API_KEY"),
        ("", {"FLORA_WEBHOOK_SECRET": ""}, "flora.webhook_secrets", "set FLORA_WEBHOOK_SECRET"),
        ("[public]\nprot = 1", {}, "public.prot", "did you mean port?"),
        ("[public]\nport = 70000", {}, "public.port", "must be less than or equal to 65535"),
        ("port = 1\n= 2", {}, "receiver.toml", "at line 2"),
        ("", {"RECEIVER_PUBLIC__PRT": "1"}, "RECEIVER_PUBLIC__PRT", "did you mean RECEIVER_PUBLIC__PORT?"),
        ("", {"RECEIVER_CONFIG": "gone.toml"}, "gone.toml", "cannot be read"),
        ("[tls]\ncert = 'gone.pem'", {}, "tls.cert", "does not exist"),
        ("public_url = 'http://hooks.example.com'", {}, "public_url", "must start with https://"),
        ("[[handlers]]\nuse = 'storge'", {}, "handlers.0.use", "; installed: "),
        ("[[handlers]]\nuse = 'a.b:C'", {}, "handlers.0.use", "cannot be imported"),
        (
            "[[handlers]]\nuse = 'storage'\nkey = '{x}'",
            {},
            "handlers.0.key",
            "unknown field {x}; there are",
        ),
        ("[[handlers]]\nuse = 'log'\nlevel = 'x'", {}, "handlers.0.level", "is no option of this handler"),
    ],
)
def test_wrong_settings_are_reported_with_advice(
    toml: str, env: dict[str, str], path: str, advice: str, tmp_path: Path
) -> None:
    """One line for each problem, on standard error, and exit code 2."""
    (tmp_path / "receiver.toml").write_text(toml, "utf-8")
    done = run_command("check", cwd=tmp_path, env=KEYS | env)
    assert (done.returncode, done.stdout) == (2, "")
    first, *problems = done.stderr.splitlines()
    assert first == "The settings cannot be used:"
    assert [problem.split(": ")[0].strip() for problem in problems] == [path]
    assert advice in done.stderr


def test_all_problems_are_reported_at_once(tmp_path: Path) -> None:
    """Without settings, `serve` and `check` report both that are missing; with `--json` as JSON."""
    checked, served = (run_command(command, cwd=tmp_path) for command in ("check", "serve"))
    assert (served.returncode, served.stderr) == (checked.returncode, checked.stderr)
    assert "set FLORA_API_KEY" in served.stderr
    assert "set FLORA_WEBHOOK_SECRET" in served.stderr
    as_json = run_command("check", "--json", cwd=tmp_path)
    assert (as_json.returncode, as_json.stderr) == (2, "")
    problems = json.loads(as_json.stdout)["problems"]
    assert [problem["path"] for problem in problems] == ["flora.webhook_secrets", "flora.api_key"]


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("sqlite:///broken.db", "not a database"),
        ("sqlite:///broken.db/receiver.db", "cannot create"),
        ("postgresql://flora:hunter2@/x?host=/nowhere", "/nowhere"),
    ],
)
def test_an_unusable_database_is_reported(url: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "broken.db").write_text("hello " * 1000)
    env = KEYS | {"RECEIVER_DATABASE__URL": url}
    for command in ("check", "migrate", "serve"):
        done = run_command(command, cwd=tmp_path, env=env)
        assert done.returncode == 1
        assert words in done.stdout + done.stderr
        assert "Traceback" not in done.stderr
        assert "hunter2" not in done.stdout + done.stderr
    found = json.loads(run_command("check", "--json", cwd=tmp_path, env=env).stdout)
    assert (found["ok"], [problem["path"] for problem in found["problems"]]) == (False, ["database.url"])


def test_migrate_creates_the_tables_once(tmp_path: Path) -> None:
    first = run_command("migrate", cwd=tmp_path)
    assert (first.returncode, first.stderr) == (0, "")
    assert "migrated from an empty file" in first.stdout
    assert "up to date" in run_command("migrate", cwd=tmp_path).stdout
    found = json.loads(run_command("migrate", "--json", cwd=tmp_path).stdout)
    assert found["before"] == found["after"]


def test_handlers_are_listed(tmp_path: Path) -> None:
    found = json.loads(run_command("handlers", "list", "--json", cwd=tmp_path).stdout)
    assert found["installed"] == sorted({*found["installed"], "log", "storage"})
    assert [entry["name"] for entry in found["configured"]] == ["storage", "log"]
    assert (
        f"Installed: {', '.join(found['installed'])}"
        in run_command("handlers", "list", cwd=tmp_path).stdout
    )


def test_a_plug_in_that_cannot_be_imported_is_not_listed_as_installed(tmp_path: Path) -> None:
    """An entry point alone is no handler; the reason is said."""
    package = tmp_path / "broken-1.0.dist-info"
    package.mkdir()
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1.0\n")
    (package / "entry_points.txt").write_text(
        "[flora_receiver.handlers]\nbroken = a_module_that_is_gone:Handler\n"
    )
    env = {"PYTHONPATH": str(tmp_path)}
    found = json.loads(run_command("handlers", "list", "--json", cwd=tmp_path, env=env).stdout)
    assert "broken" not in found["installed"]
    [problem] = found["broken"]
    assert (problem["name"], "a_module_that_is_gone" in problem["reason"]) == ("broken", True)
    done = run_command("handlers", "list", cwd=tmp_path, env=env)
    assert (done.returncode, "Broken: broken cannot be imported" in done.stdout) == (0, True)


def test_the_options_of_a_handler_are_those_of_its_model(tmp_path: Path) -> None:
    """An unknown handler is reported."""
    found = json.loads(run_command("handlers", "show", "storage", "--json", cwd=tmp_path).stdout)
    by_name = {option["path"]: option for option in found["options"]}
    assert (by_name["url"]["type"], by_name["url"]["default"]) == ("text", '"outputs"')
    assert by_name["max_size"]["type"] == "integer or text"
    assert all(option["help"] for option in found["options"])
    assert "no options" in run_command("handlers", "show", "log", cwd=tmp_path).stdout
    wrong = run_command("handlers", "show", "nobody", cwd=tmp_path)
    assert (wrong.returncode, wrong.stdout) == (1, "")
    assert "installed:" in wrong.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ("serve", "--port", "70000"),
        ("emulator", "--port", "x"),
        ("emulator", "--callback-ca", "gone.pem"),
        ("sevre",),
    ],
)
def test_wrong_options_are_refused_first(arguments: tuple[str, ...], tmp_path: Path) -> None:
    done = run_command(*arguments, cwd=tmp_path, env=KEYS)
    assert done.returncode == 2
    assert "Error: " in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_the_emulator_runs_until_it_is_stopped(start: Start) -> None:
    """It prints the variables that a client needs; defaults come from the environment."""
    emulator = start("emulator", "--port", 0, **KEYS)
    variables = read_exports(emulator)
    assert {name: variables[name] for name in KEYS} == KEYS
    headers = {"Authorization": f"Bearer {variables['FLORA_API_KEY']}"}
    with httpx.Client(trust_env=False) as http:
        response = http.get(f"{variables['FLORA_BASE_URL']}/techniques", headers=headers)
        assert (response.status_code, "emu-image" in response.text) == (200, True)
        assert http.get(f"{variables['FLORA_BASE_URL']}/techniques").status_code == 401
    assert emulator.stop() == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_serve_stops_on_a_signal(number: signal.Signals, start: Start) -> None:
    """Either signal ends it with exit code 0, and it logs that it stopped."""
    server = start("serve", "--host", "127.0.0.1", "--port", 0, "--ops-port", 0, errors=True, **KEYS)
    with httpx.Client(base_url=wait_until_ready(server), trust_env=False) as http:
        assert http.get("/healthz").json() == {"status": "ok"}
        assert http.get("/readyz").json() == {"status": "ready"}
    assert server.stop(number) == 0
    assert "service.stopped" in server.until(lambda line: "service.stopped" in line)[-1]


@pytest.mark.parametrize(
    "clings",
    [
        "KEPT.append(asyncio.create_task(stubborn()))",
        "threading.Thread(target=threading.Event().wait).start()",
    ],
    ids=["task", "thread"],
)
def test_serve_ends_although_a_handler_does_not(clings: str, start: Start, tmp_path: Path) -> None:
    """With a task that suppresses its cancellation, or a thread that waits for ever."""
    (tmp_path / "clinging.py").write_text(
        f"""
import asyncio, threading
from receiver.handler import Done
from receiver.plugins.functions import NoOptions

async def stubborn():
    while True:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            pass

KEPT = []

class Clinging:
    Config = NoOptions
    def __init__(self, config): pass
    async def handle(self, run, context): return Done()
    async def check(self): {clings}
"""
    )
    (tmp_path / "receiver.toml").write_text('[[handlers]]\nuse = "clinging:Clinging"\n')
    server = start(
        "serve",
        "--host",
        "127.0.0.1",
        "--port",
        0,
        "--ops-port",
        0,
        errors=True,
        PYTHONPATH=str(tmp_path),
        **KEYS,
    )
    wait_until_ready(server)
    assert server.stop() == 0
    assert "service.stopped" in server.until(lambda line: "service.stopped" in line)[-1]
    assert "service.left_behind" in server.until(lambda line: "service.left_behind" in line)[-1]


def test_a_second_serve_reports_the_conflict(start: Start, tmp_path: Path) -> None:
    """Of the same database file, then of the same port."""
    server = start("serve", "--host", "127.0.0.1", "--port", 0, "--ops-port", 0, errors=True, **KEYS)
    port = wait_until_ready(server).rpartition(":")[2]
    done = run_command("serve", "--port", 0, cwd=tmp_path, env=KEYS)
    assert (done.returncode, "another running flora-receiver" in done.stderr) == (1, True)
    assert "in use by a running service" in run_command("check", cwd=tmp_path, env=KEYS).stdout
    for command in ("serve", "emulator"):
        env = KEYS | {"RECEIVER_DATABASE__URL": "sqlite:///other.db"}
        done = run_command(command, "--host", "127.0.0.1", "--port", port, cwd=tmp_path, env=env)
        assert (done.returncode, f"cannot listen on 127.0.0.1:{port}" in done.stderr) == (2, True)
        assert "Traceback" not in done.stderr
