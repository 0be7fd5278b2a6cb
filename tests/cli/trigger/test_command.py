"""`trigger` against a real `serve` over HTTPS: every case gets its documented response."""

import contextlib
import itertools
import json
import socket
import ssl
import threading
from collections.abc import Iterator
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from receiver.cli.trigger.cases import CASES, CallbackFactory, from_record
from receiver.net import certificates
from receiver.web.public import STATUS
from tests.cli.conftest import KEYS, OWN_SECRET, OWN_WORKSPACE, SECRET, RunningService, run_command


@pytest.mark.parametrize("case", CASES)
def test_every_case_gets_its_response(case: str, service: RunningService, tmp_path: Path) -> None:
    """As each request of the case expects; a refusal with its documented status."""
    secret = OWN_SECRET if case == "workspace_mismatch" else SECRET
    command = ("trigger", service.url, "--case", case, "--ca", service.ca, "--secret", secret, "--json")
    done = run_command(*command, cwd=tmp_path)
    found = json.loads(done.stdout)
    (*_, last) = CASES[case](CallbackFactory("whsec_x"))
    assert (done.returncode, found["as_expected"]) == (0, True), found
    assert found["status"] == STATUS.get(last.expected, 200)
    body = json.loads(found["body"])
    if last.expected in STATUS:
        assert body["error"]["code"] == last.expected
    else:
        assert body == {"status": last.expected}


def test_every_refusal_that_a_sender_can_provoke_has_a_case() -> None:
    """`unavailable` needs a receiver that cannot commit."""
    provoked = {request.expected for case in CASES.values() for request in case(CallbackFactory("whsec_x"))}
    assert STATUS.keys() - provoked == {"unavailable"}


def test_a_callback_is_of_the_workspace_that_signs(service: RunningService, tmp_path: Path) -> None:
    """The workspace of the configured secret, or the one in `--workspace-id`."""
    two = [{"id": OWN_WORKSPACE, "secrets": [OWN_SECRET]}, {"id": "ws_far", "secrets": ["whsec_far"]}]
    env = {"RECEIVER_WORKSPACES": json.dumps(two)}
    command = ("trigger", service.url, "--ca", service.ca)
    for more in (
        (),
        ("--workspace-id", OWN_WORKSPACE),
        ("--secret", OWN_SECRET, "--workspace-id", OWN_WORKSPACE),
    ):
        done = run_command(*command, *more, cwd=tmp_path, env=env)
        assert (done.returncode, done.stdout.splitlines()[0]) == (0, '200 {"status":"accepted"}')
    far = run_command(*command, "--workspace-id", "ws_far", cwd=tmp_path, env=env)
    assert "401 " in far.stdout
    unknown = run_command(*command, "--workspace-id", "ws_x", cwd=tmp_path, env=env)
    assert (unknown.returncode, "no secret of ws_x" in unknown.stderr) == (2, True)


def test_many_callbacks_are_counted_and_timed(service: RunningService, tmp_path: Path) -> None:
    """With a rate they are sent by the clock; the summary has counts and percentiles."""
    command = ("trigger", service.url, "--ca", service.ca, "--count", "60", "--rate", "300", "--json")
    done = run_command(*command, cwd=tmp_path, env=KEYS)
    found = json.loads(done.stdout)
    assert (done.returncode, found["sent"], found["answers"]) == (0, 60, {"200 accepted": 60})
    assert 0 < found["seconds"]["p50"] <= found["seconds"]["p99"]
    assert "60  200 accepted" in run_command(*command[:-1], cwd=tmp_path, env=KEYS).stdout


def test_a_record_is_sent_again_byte_for_byte(service: RunningService, tmp_path: Path) -> None:
    """Its deliveries are then duplicates, with the same signatures and bytes."""
    record = ("trigger", service.url, "--ca", service.ca, "--case", "duplicate", "--record", "sent.jsonl")
    assert run_command(*record, cwd=tmp_path, env=KEYS).returncode == 0
    lines = (tmp_path / "sent.jsonl").read_text().splitlines()
    assert [from_record(line).body for line in lines] == [from_record(lines[0]).body] * 2
    replayed = run_command("trigger", service.url, "--ca", service.ca, "--from", "sent.jsonl", cwd=tmp_path)
    assert replayed.returncode == 0, replayed.stdout
    assert replayed.stdout.count('{"status":"duplicate"}') == 2
    again_twice = (
        "trigger",
        service.url,
        "--ca",
        service.ca,
        "--from",
        "sent.jsonl",
        "--count",
        "2",
        "--json",
    )
    assert json.loads(run_command(*again_twice, cwd=tmp_path).stdout)["answers"] == {"200 duplicate": 4}


@pytest.mark.parametrize(
    "change",
    [
        {"headers": ["a"]},
        {"headers": {"a": "b\nc"}},
        {"headers": {"ü": "b"}},
        {"method": 1},
        {"further": None},
        {"body": "?"},
        {"body": 7},
    ],
)
def test_a_malformed_record_is_refused(change: dict[str, object]) -> None:
    """Before anything is sent, whatever is wrong with a line."""
    line = {"method": "POST", "headers": {"a": "b"}, "body": "", "expected": "accepted", "further": ""}
    assert from_record(json.dumps(line)).method == "POST"
    for odd in (json.dumps(line | change), "[]", "7", "{}", ""):
        with pytest.raises(ValueError, match="was not written by --record"):
            from_record(odd)


def test_the_requests_of_a_case_stay_in_order(service: RunningService, tmp_path: Path) -> None:
    """Many pairs at a time: each second request waits for the response to its first."""
    command = ("trigger", service.url, "--ca", service.ca, "--case", "duplicate", "--count", "40", "--json")
    done = run_command(*command, cwd=tmp_path, env=KEYS)
    found = json.loads(done.stdout)
    assert (done.returncode, found["answers"]) == (0, {"200 accepted": 40, "200 duplicate": 40})


def test_requests_without_a_response_are_counted(tmp_path: Path) -> None:
    """A connection that is closed early does not hide the results of the others."""
    with closing_receiver() as url:
        done = run_command("trigger", url, "--count", "6", "--json", cwd=tmp_path, env=KEYS)
    found = json.loads(done.stdout)
    assert (done.returncode, found["sent"], found["as_expected"]) == (1, 6, False)
    assert found["answers"]["200 accepted"] == 3
    assert sum(number for text, number in found["answers"].items() if text.startswith("no response: ")) == 3


@contextlib.contextmanager
def closing_receiver() -> Iterator[str]:
    """Run a receiver that closes every second connection without a response."""
    turn = itertools.count()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            if next(turn) % 2 == 0:
                self.send_response(200)
                self.end_headers()
                self.wfile.write(b'{"status": "accepted"}')

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/"
        finally:
            server.shutdown()
            thread.join()


def test_a_repeated_delivery_is_a_duplicate(service: RunningService, tmp_path: Path) -> None:
    arguments = (
        "trigger",
        service.url,
        "--ca",
        service.ca,
        "--delivery-id",
        "whd_twice",
        "--run-id",
        "run_twice",
    )
    first, second = (run_command(*arguments, cwd=tmp_path, env=KEYS) for _ in range(2))
    assert first.stdout.splitlines() == ['200 {"status":"accepted"}', "completed: as expected"]
    assert second.stdout.splitlines() == ['200 {"status":"duplicate"}', "completed: as expected"]


def test_a_wrong_secret_is_reported(service: RunningService, tmp_path: Path) -> None:
    """The usual reason to run it: to check that both sides have the same secret."""
    done = run_command("trigger", service.url, "--ca", service.ca, "--secret", "whsec_wrong", cwd=tmp_path)
    assert done.returncode == 1
    assert "401 " in done.stdout
    assert "completed: expected 200" in done.stdout


def test_an_untrusted_certificate_is_reported_with_advice(service: RunningService, tmp_path: Path) -> None:
    done = run_command("trigger", service.url, cwd=tmp_path, env=KEYS)
    assert (done.returncode, "pass its CA with --ca" in done.stderr) == (1, True)


def test_the_advice_on_a_certificate_fits_what_is_wrong_with_it(
    service: RunningService, tmp_path: Path
) -> None:
    """Who passes a CA already is not asked to; and no CA helps with another host."""
    other = tmp_path / "other.pem"
    other.write_bytes(certificates.make_authority().pem)
    done = run_command("trigger", service.url, "--ca", other, cwd=tmp_path, env=KEYS)
    assert f"issued by none of the CAs in {other}" in done.stderr
    assert "pass its CA" not in done.stderr
    authority = certificates.make_authority()
    other.write_bytes(authority.pem)
    for host, life, words in (
        ("127.0.0.1", -1, "has expired"),
        ("elsewhere.example", 9, "for another host"),
    ):
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        issued = certificates.issue(authority, host, life=timedelta(hours=life))
        context.load_cert_chain(*certificates.write(issued, tmp_path))
        with socket.create_server(("127.0.0.1", 0)) as listener:
            threading.Thread(target=shake_hands, args=(listener, context), daemon=True).start()
            url = f"https://127.0.0.1:{listener.getsockname()[1]}/"
            done = run_command("trigger", url, "--ca", other, cwd=tmp_path, env=KEYS)
        assert (words in done.stderr, "pass its CA" in done.stderr) == (True, False), done.stderr


def shake_hands(listener: socket.socket, context: ssl.SSLContext) -> None:
    """Offer a certificate to one client."""
    connection, _ = listener.accept()
    with contextlib.suppress(OSError), context.wrap_socket(connection, server_side=True):
        pass


@pytest.mark.parametrize(
    ("arguments", "env", "advice"),
    [
        (("https://127.0.0.1:1/", "--case", "compleet"), KEYS, "the cases are completed, failed"),
        (("127.0.0.1:8080",), KEYS, "is not an http or https URL"),
        (("https://:8080/",), KEYS, "is not an http or https URL"),
        (("http://127.0.0.1:99999/",), KEYS, "is not an http or https URL"),
        (
            ("https://127.0.0.1:1/", "--record", "gone/sent.jsonl"),
            KEYS,
            "gone/sent.jsonl cannot be written",
        ),
        (("https://127.0.0.1:1/", "--from", "odd.jsonl"), {}, "line 1 of odd.jsonl"),
        (("https://127.0.0.1:1/", "--rate", "inf"), KEYS, "--rate"),
        (("https://127.0.0.1:1/",), {}, "FLORA_WEBHOOK_SECRET: is not set"),
        (("https://127.0.0.1:1/", "--ca", "gone.pem"), KEYS, "does not exist"),
        (("https://127.0.0.1:1/", "--ca", "empty.pem"), KEYS, "holds no certificate"),
    ],
)
def test_a_usage_error_is_reported_with_advice(
    arguments: tuple[str, ...], env: dict[str, str], advice: str, tmp_path: Path
) -> None:
    (tmp_path / "empty.pem").write_text("")
    (tmp_path / "odd.jsonl").write_text("{}\n")
    done = run_command("trigger", *arguments, cwd=tmp_path, env=env)
    assert done.returncode == 2
    assert advice in done.stderr


def test_an_unreachable_receiver_is_reported(tmp_path: Path) -> None:
    done = run_command("trigger", "http://127.0.0.1:1/", cwd=tmp_path, env=KEYS)
    assert (done.returncode, "Is the receiver running" in done.stderr) == (1, True)
