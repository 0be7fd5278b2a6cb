"""`trigger` against a real `serve` over HTTPS: every case is answered as documented, and `trigger` can tell."""

import json
from pathlib import Path

import pytest

from receiver.cli.trigger import CASES
from receiver.web.public import STATUS
from tests.cli.conftest import KEYS, Served, run_command


@pytest.mark.parametrize("case", CASES)
def test_every_case_gets_its_answer(case: str, served: Served, tmp_path: Path) -> None:
    done = run_command("trigger", served.url, "--case", case, "--ca", served.ca, "--json", cwd=tmp_path, env=KEYS)
    found = json.loads(done.stdout)
    assert (done.returncode, found["as_expected"], found["status"]) == (0, True, STATUS.get(case, 200))
    answer = json.loads(found["body"])
    assert answer["error"]["code"] == case if case in STATUS else answer == {"status": "accepted"}


def test_the_same_delivery_again_is_a_duplicate(served: Served, tmp_path: Path) -> None:
    arguments = ("trigger", served.url, "--ca", served.ca, "--delivery-id", "whd_twice", "--run-id", "run_twice")
    first, second = (run_command(*arguments, cwd=tmp_path, env=KEYS) for _ in range(2))
    assert first.stdout.splitlines() == ['200 {"status":"accepted"}', "completed: as it should be"]
    assert second.stdout.splitlines() == ['200 {"status":"duplicate"}', "completed: as it should be"]


def test_a_wrong_secret_shows(served: Served, tmp_path: Path) -> None:
    """The usual reason to run it: to know whether both ends are given the same secret."""
    done = run_command("trigger", served.url, "--ca", served.ca, "--secret", "whsec_wrong", cwd=tmp_path)
    assert done.returncode == 1
    assert "401 " in done.stdout
    assert "completed: expected 200" in done.stdout


def test_an_untrusted_certificate_says_what_to_do(served: Served, tmp_path: Path) -> None:
    done = run_command("trigger", served.url, cwd=tmp_path, env=KEYS)
    assert (done.returncode, "give its CA with --ca" in done.stderr) == (1, True)


@pytest.mark.parametrize(
    ("arguments", "env", "advice"),
    [
        (("https://127.0.0.1:1/", "--case", "compleet"), KEYS, "there are: completed, failed"),
        (("127.0.0.1:8080",), KEYS, "is not an http or https URL"),
        (("https://:8080/",), KEYS, "is not an http or https URL"),
        (("https://127.0.0.1:1/",), {}, "FLORA_WEBHOOK_SECRET: is not set"),
        (("https://127.0.0.1:1/", "--ca", "gone.pem"), KEYS, "does not exist"),
        (("https://127.0.0.1:1/", "--ca", "empty.pem"), KEYS, "holds no certificate"),
    ],
)
def test_a_mistake_says_what_to_do(
    arguments: tuple[str, ...], env: dict[str, str], advice: str, tmp_path: Path
) -> None:
    (tmp_path / "empty.pem").write_text("")
    done = run_command("trigger", *arguments, cwd=tmp_path, env=env)
    assert done.returncode == 2
    assert advice in done.stderr


def test_nobody_there_is_told(tmp_path: Path) -> None:
    done = run_command("trigger", "http://127.0.0.1:1/", cwd=tmp_path, env=KEYS)
    assert (done.returncode, "Is it running" in done.stderr) == (1, True)
