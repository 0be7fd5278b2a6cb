"""The handler `command` with real programs: their input, their output, and what is left."""

import asyncio
import errno
import json
import os
import re
import select
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from handlers.command import Command, CommandConfig
from handlers.command.workdir import Workdir
from receiver.handler import Answer, Checks, Closes, Done, Handler, Output, Reject, Retry, SettledRun
from receiver.plugins.attempt import call_handler
from tests.support.core import registered_handler
from tests.support.media import MediaServer, page
from tests.support.patience import PATIENCE_SECONDS

ROOT = Path(__file__).parents[2]
ContextOf = Callable[..., Any]
Build = Callable[..., Command]
Script = Callable[[str], str]

ENVIRONMENT = {
    b"PATH": os.environb[b"PATH"],
    b"HOME": b"/home/of/the/service",
    b"LANG": b"C.UTF-8",
    b"FLORA_API_KEY": b"sk_live_do_not_tell",
    b"FLORA_WEBHOOK_SECRET": b"whsec_do_not_tell",
    b"RECEIVER_OPS_TOKEN": b"token_do_not_tell",
    b"AWS_SECRET_ACCESS_KEY": b"aws_do_not_tell",
}


@pytest.fixture
def work(tmp_path: Path) -> Path:
    return tmp_path / "work"


@pytest.fixture
def build(work: Path) -> Iterator[Build]:
    """Make handlers: `build(program, *arguments, **options)`. No working directory may be left."""

    def make(*command: str, **options: Any) -> Command:
        config = CommandConfig.model_validate(
            {"command": list(command), **options}, context={"environ": {}}
        )
        return Command(config, parent=work, environ=ENVIRONMENT)

    yield make
    assert leftovers(work) == []


@pytest.fixture
def script(tmp_path: Path) -> Script:
    """Write an executable /bin/sh script."""

    def write(body: str) -> str:
        path = tmp_path / "script"
        path.write_text(f"#!/bin/sh\n{body}\n")
        path.chmod(0o755)
        return str(path)

    return write


def make_directory(path: Path, mode: int) -> Path:
    path.mkdir(mode=mode)
    return path


def make_link(path: Path, target: Path) -> None:
    path.symlink_to(target)


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def leftovers(work: Path) -> list[Path]:
    return list(work.glob("*")) if work.exists() else []


def reason(answer: Answer) -> str:
    assert not isinstance(answer, Done)
    return answer.reason


def output_of(answer: Answer) -> str:
    assert isinstance(answer, Done), answer
    return str(answer.result["output"])


def text(position: int, value: str, output_id: str = "words") -> Output:
    return Output(position=position, output_id=output_id, type="text", value=value)


async def wait_for_pid(fifo: Path) -> int:
    """Return a descriptor of the process whose id a program writes into a FIFO."""
    pid = int(await asyncio.to_thread(fifo.read_text))
    return os.pidfd_open(pid)


def is_gone(process: int) -> bool:
    """Whether the process behind a descriptor ends; a kill takes a moment."""
    poll = select.poll()
    poll.register(process, select.POLLIN)
    try:
        return bool(poll.poll(PATIENCE_SECONDS * 1000))
    finally:
        os.close(process)


async def test_it_is_a_handler_with_a_check(build: Build) -> None:
    """The contract's protocols; and its own check passes where the program is there."""
    handler = build("sh")
    assert isinstance(handler, Handler)
    assert isinstance(handler, Checks)
    assert isinstance(handler, Closes)
    await handler.check()
    await handler.close()


async def test_the_run_comes_on_stdin_and_in_a_file(
    build: Build, run: SettledRun, context_of: ContextOf
) -> None:
    """The same bytes twice: the JSON form of the run."""
    output = output_of(
        await build("sh", "-c", 'cmp - "$RUN_FILE" && cat "$RUN_FILE"').handle(run, context_of())
    )
    document = json.loads(output)
    assert (document["schema"], document["run_id"], document["metadata"]) == (1, "run_1", {"market": "DE"})
    assert document["idempotency_key"] == "run_1:test:settled:0"


async def test_the_whole_environment_is_known(build: Build, run: SettledRun, context_of: ContextOf) -> None:
    """Only what is passed on, configured, and from the run; no secret of the service."""
    handler = build("env", env={"TOKEN": "for the program"}, max_output=65536)
    result = output_of(await handler.handle(run, context_of(attempt=3)))
    found = dict(line.split("=", 1) for line in result.splitlines())
    place = found.pop("RUN_FILE")
    assert place.endswith("/run.json")
    assert found == {
        "PATH": os.environ["PATH"],
        "HOME": "/home/of/the/service",
        "LANG": "C.UTF-8",
        "TOKEN": "[hidden]",
        "RUN_ATTEMPT": "3",
        "RUN_CHARGED_COST": "",
        "RUN_COMPLETED_AT": "2026-11-24T12:00:00Z",
        "RUN_CREATED_AT": "2026-11-24T11:58:00Z",
        "RUN_ERROR_CODE": "",
        "RUN_ERROR_MESSAGE": "",
        "RUN_EVENT": "settled",
        "RUN_HANDLER": "test",
        "RUN_ID": "run_1",
        "RUN_IDEMPOTENCY_KEY": "run_1:test:settled:0",
        "RUN_MAX_ATTEMPTS": "5",
        "RUN_METADATA_MARKET": "DE",
        "RUN_OUTPUTS_DIR": "",
        "RUN_PROJECT_ID": "",
        "RUN_SETTLED_AT": "2026-11-24T12:00:01Z",
        "RUN_SETTLED_BY": "callback",
        "RUN_STARTED_AT": "2026-11-24T11:59:00Z",
        "RUN_STATUS": "completed",
        "RUN_TECHNIQUE_ID": "tech_1",
        "RUN_TYPE": "technique",
        "RUN_VERDICT": "matched",
        "RUN_WORKSPACE_ID": "ws_1",
    }


async def test_metadata_cannot_take_another_name_or_burst_the_environment(
    build: Build, run: SettledRun, context_of: ContextOf
) -> None:
    """Odd keys become plain names; ambiguous or huge ones are in the JSON only."""
    metadata = {
        "path=/evil": "x",
        "two words": [1, None],
        "Twin": "a",
        "twin": "b",
        "huge": "h" * 1_000_000,
        "nul": "a\x00b\ud800",
        **{f"many{n}": "m" * 8000 for n in range(1000)},
    }
    output = output_of(
        await build("env", max_output=65536).handle(replace(run, metadata=metadata), context_of())
    )
    assert sum(line.startswith("RUN_METADATA_MANY") for line in output.splitlines()) == 8
    few = dict(list(metadata.items())[:6])
    output = output_of(
        await build("env", max_output=65536).handle(replace(run, metadata=few), context_of())
    )
    found = {line for line in output.splitlines() if line.startswith("RUN_METADATA")}
    assert found == {
        "RUN_METADATA_PATH__EVIL=x",
        "RUN_METADATA_TWO_WORDS=[1, null]",
        "RUN_METADATA_NUL=a\ufffdb\ufffd",
    }


async def test_arguments_pass_unchanged(build: Build, run: SettledRun, context_of: ContextOf) -> None:
    """There is no shell: its special characters are ordinary ones."""
    odd = [
        "$(id)",
        "; rm -rf x",
        "`id`",
        "*",
        "a b",
        "",
        "'\"",
        "-n",
        "Grüße\n2",
        "{{}}",
        "> out",
        "\\",
        "~",
    ]
    show = "import json, sys; print(json.dumps(sys.argv[1:]))"
    show = show.replace("{", "{{").replace("}", "}}")
    output = output_of(await build(sys.executable, "-c", show, *odd).handle(run, context_of()))
    assert json.loads(output) == [argument.replace("{{}}", "{}") for argument in odd]


async def test_fields_in_arguments_are_safe_for_file_names(
    build: Build, run: SettledRun, context_of: ContextOf
) -> None:
    """Ids and times are unchanged; what could leave a directory or become an option is changed."""
    run = replace(run, metadata={"market": "../../etc", "option": "--delete", "n": 3}, project_id=None)
    arguments = [
        "{run_id}/{completed_at:%Y/%m}",
        "--market={metadata[market]}",
        "{metadata[option]}",
        "{metadata[n]}{metadata[none]}",
        "{project_id}",
        "{created_at}",
    ]
    output = output_of(await build("printf", "%s\n", *arguments).handle(run, context_of())).splitlines()
    assert output[0] == "run_1/2026/11"
    assert output[1].startswith("--market=_.._etc-")
    assert output[2:] == ["_--delete", "3_", "_", "20261124T115800Z"]


@pytest.mark.parametrize(
    ("options", "code", "kind"),
    [
        ({}, 0, Done),
        ({}, 75, Retry),
        ({}, 1, Retry),
        ({"reject_codes": [65]}, 65, Reject),
        ({"reject_codes": [65]}, 1, Retry),
        ({"other_codes": "reject"}, 1, Reject),
        ({"other_codes": "reject"}, 75, Retry),
        ({"other_codes": "reject", "retry_codes": [1]}, 75, Reject),
        ({"reject_codes": [75], "retry_codes": []}, 75, Reject),
    ],
)
async def test_the_exit_code_is_the_answer(
    build: Build,
    run: SettledRun,
    context_of: ContextOf,
    options: dict[str, Any],
    code: int,
    kind: type[Answer],
) -> None:
    """0 is done, 75 retries, others as configured; the reason has code and last output."""
    answer = await build("sh", "-c", f"echo last words >&2; exit {code}", **options).handle(
        run, context_of()
    )
    assert type(answer) is kind
    if not isinstance(answer, Done):
        assert answer.reason == f"sh ended with code {code}: last words"
    else:
        assert answer.result == {"exit_code": 0, "output": "last words", "output_bytes": 11}


@pytest.mark.parametrize(("number", "name"), [("SEGV", "SIGSEGV"), ("KILL", "SIGKILL (out of memory?)")])
async def test_death_by_a_signal_is_tried_again(
    build: Build, run: SettledRun, context_of: ContextOf, number: str, name: str
) -> None:
    """A crash says nothing about the run, whatever other codes mean."""
    answer = await build("sh", "-c", f"kill -{number} $$", other_codes="reject").handle(run, context_of())
    assert answer == Retry(f"sh was ended by {name}")


async def test_an_exit_code_that_cannot_be_read_is_no_success(
    build: Build, run: SettledRun, context_of: ContextOf
) -> None:
    """With SIGCHLD ignored the system discards exit codes: the check fails, and nothing is done."""
    handler, before = build("false"), signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        with pytest.raises(RuntimeError, match="SIGCHLD"):
            await handler.check()
        assert await handler.handle(run, context_of()) == Retry("false: its exit code is not known")
    finally:
        signal.signal(signal.SIGCHLD, before)


async def test_where_the_system_cannot_look_without_reaping(
    build: Build, run: SettledRun, context_of: ContextOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without `waitid`, as on older macOS, exit codes and signals are still read."""
    monkeypatch.delattr(os, "waitid")
    assert output_of(await build("echo", "fine").handle(run, context_of())) == "fine"
    assert reason(await build("sh", "-c", "exit 7").handle(run, context_of())) == "sh ended with code 7"
    assert "SIGSEGV" in reason(await build("sh", "-c", "kill -SEGV $$").handle(run, context_of()))


@pytest.mark.parametrize(
    "body", ["exec <&-; exit 0", "exit 0", "exec >&- 2>&-; exit 0", "head -c 1; exit 0"]
)
async def test_a_program_may_ignore_what_it_is_given(
    build: Build, run: SettledRun, context_of: ContextOf, body: str
) -> None:
    """A megabyte of metadata does no harm, whether or not the program reads stdin."""
    run = replace(run, metadata={"long": "x" * 1_000_000})
    assert isinstance(await build("sh", "-c", body).handle(run, context_of()), Done)


async def test_output_without_end_costs_no_memory(
    build: Build, run: SettledRun, context_of: ContextOf, tmp_path: Path
) -> None:
    """Of 128 MiB, the end is kept, in the configured size."""
    before = resident()
    body = "head -c 134217728 /dev/zero | tr '\\0' a; printf end"
    answer = await build("sh", "-c", body, max_output=1000).handle(run, context_of())
    assert isinstance(answer, Done)
    assert answer.result["output_bytes"] == 2**27 + 3
    assert answer.result["output"] == "a" * 997 + "end"
    assert resident() - before < 32 * 2**20


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


async def test_output_is_text_whatever_it_is(build: Build, run: SettledRun, context_of: ContextOf) -> None:
    """Invalid UTF-8, control and cut characters harm neither the record nor a terminal."""
    body = "printf '\\377\\000\\033[31mred\\r\\nnext\\304\\223'"
    assert (
        output_of(await build("sh", "-c", body).handle(run, context_of()))
        == "\ufffd\ufffd\ufffd[31mred\nnextē"
    )
    body = "printf 'aēē'"
    assert output_of(await build("sh", "-c", body, max_output=3).handle(run, context_of())) == "ē"
    assert output_of(await build("sh", "-c", body, max_output=0).handle(run, context_of())) == ""


@pytest.mark.parametrize("padding", range(60, 110, 7))
async def test_secrets_and_media_urls_are_not_kept(
    build: Build, run: SettledRun, context_of: ContextOf, padding: int
) -> None:
    """Not even in part, wherever the output is cut: hidden in the record and in the reason."""
    url = "https://media.example/" + "u" * 60
    picture = Output(position=0, output_id="hero", type="imageUrl", value=url)
    body = f"echo $TOKEN {url} $TOKEN {'.' * padding}; exit 3"
    handler = build("sh", "-c", body, env={"TOKEN": "tok-" + "t" * 30}, max_output=100)
    output = reason(await handler.handle(replace(run, outputs=(picture,)), context_of()))
    assert "ttt" not in output
    assert "uuu" not in output
    assert output.endswith("...")


async def test_what_is_passed_on_may_be_a_secret_too(
    build: Build, run: SettledRun, context_of: ContextOf
) -> None:
    """A passed variable is hidden in the record; the usual ones are not secrets."""
    handler = build(
        "sh", "-c", 'echo "$AWS_SECRET_ACCESS_KEY at $HOME"', pass_env=["AWS_SECRET_ACCESS_KEY", "HOME"]
    )
    assert output_of(await handler.handle(run, context_of())) == "[hidden] at /home/of/the/service"


async def test_outputs_are_downloaded_beforehand_if_configured(
    build: Build, run: SettledRun, context_of: ContextOf, media: MediaServer, work: Path
) -> None:
    """Each in a file whose name is safe, in one directory, named in the JSON."""
    picture = media.output("/x", page(b"PNG bytes"), output_id="../../-rf")
    run = replace(run, outputs=(picture, text(1, "Grüße")))
    body = 'ls "$RUN_OUTPUTS_DIR"; cat "$RUN_OUTPUTS_DIR"/*; echo; cat'
    listed = output_of(await build("sh", "-c", body, download=True).handle(run, context_of())).splitlines()
    *names, contents, document = listed
    assert contents == "PNG bytesGrüße"
    paths = [Path(output["path"]) for output in json.loads(document)["outputs"]]
    assert [path.name for path in paths] == names
    assert names[0].startswith("0-")
    assert names[0].endswith(".png")
    assert names[1] == "1-words.txt"
    assert all(path.is_relative_to(work) for path in paths)


async def test_a_download_that_fails_starts_no_program(
    build: Build, run: SettledRun, context_of: ContextOf, media: MediaServer, tmp_path: Path
) -> None:
    """What may work later is retried, with new URLs if they have expired; the rest is rejected."""
    handler = build("touch", str(tmp_path / "started"), download=True)
    gone = media.output("/gone", page(b"", status="404 Not Found"))
    refused = Output(position=1, output_id="b", type="imageUrl", value="ftp://media.example/x")
    answer = await handler.handle(replace(run, outputs=(gone, refused)), context_of())
    assert isinstance(answer, Retry)
    assert answer.reread
    assert answer.after_seconds is None
    busy = media.output("/busy", page(b"", "text/plain", "Retry-After: 90", status="503 Busy"))
    waiting = await handler.handle(replace(run, outputs=(gone, busy)), context_of())
    assert isinstance(waiting, Retry)
    assert (waiting.after_seconds, waiting.reread) == (90, True)
    answer = await handler.handle(replace(run, outputs=(refused,)), context_of())
    assert isinstance(answer, Reject)
    assert not (tmp_path / "started").exists()


async def test_cancelled_while_downloading_it_leaves_nothing(
    build: Build, run: SettledRun, context_of: ContextOf, media: MediaServer, tmp_path: Path
) -> None:
    """The directory is removed with the download (by the fixture), and no program is started."""
    picture = media.output(
        "/x", replace(page(b"PNG"), raw=b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nPNG", hold=True)
    )
    handler = build("touch", str(tmp_path / "started"), download=True)
    task = asyncio.create_task(handler.handle(replace(run, outputs=(picture,)), context_of()))
    await media.held.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not (tmp_path / "started").exists()


STUBBORN = """
trap '' TERM
sh -c 'trap "" TERM; echo $$ > "$1"; while :; do sleep 1000; done' stubborn {fifo} &
wait; wait; wait
"""


@pytest.mark.parametrize("grace", [0, 0.2])
async def test_time_up_means_the_whole_group(
    build: Build, run: SettledRun, context_of: ContextOf, script: Script, tmp_path: Path, grace: float
) -> None:
    """A program and its child that ignore SIGTERM are killed after the grace period."""
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    handler = build(script(STUBBORN.format(fifo=fifo)), kill_after_seconds=grace)
    task = asyncio.create_task(handler.handle(run, context_of()))
    grandchild = await wait_for_pid(fifo)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert is_gone(grandchild)


async def test_sigterm_comes_first(
    build: Build, run: SettledRun, context_of: ContextOf, script: Script, tmp_path: Path
) -> None:
    """A program that cleans up on SIGTERM can do so, and takes no longer than it needs."""
    fifo, tidy = tmp_path / "fifo", tmp_path / "tidy"
    os.mkfifo(fifo)
    body = f"trap 'touch {tidy}; exit 0' TERM; echo $$ > {fifo}; while :; do sleep 0.01; done"
    task = asyncio.create_task(build(script(body), kill_after_seconds=4).handle(run, context_of()))
    process = await wait_for_pid(fifo)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert is_gone(process)
    assert tidy.exists()


async def test_endless_output_ends_with_the_attempt(
    build: Build, run: SettledRun, context_of: ContextOf
) -> None:
    """`yes` is stopped by the attempt's own time, and the service's own call says so."""
    handler = build("yes")
    answer = await call_handler(handler, run, context_of(), timeout_seconds=0.3)
    assert answer == Retry("it took longer than 0.3 s")
    assert registered_handler("x", handler).handler is handler


async def test_cancelled_twice_the_clean_up_goes_on(
    build: Build, run: SettledRun, context_of: ContextOf, script: Script, tmp_path: Path
) -> None:
    """A second cancellation returns at once; the thread still ends the program."""
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    handler = build(script(STUBBORN.format(fifo=fifo)), kill_after_seconds=0.5)
    task = asyncio.create_task(handler.handle(run, context_of()))
    grandchild = await wait_for_pid(fifo)
    task.cancel()
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert is_gone(grandchild)
    await asyncio.to_thread(handler._threads.shutdown)


async def test_what_a_program_leaves_running_is_ended(
    build: Build, run: SettledRun, context_of: ContextOf, script: Script, tmp_path: Path
) -> None:
    """A background child that holds the output open neither delays the attempt nor outlives it."""
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    body = f"(trap '' TERM; echo begun; sh -c 'echo $PPID' > {fifo}; while :; do sleep 1000; done) & cat {fifo}.go; exit 0"
    os.mkfifo(f"{fifo}.go")
    task = asyncio.create_task(build(script(body)).handle(run, context_of()))
    child = await wait_for_pid(fifo)
    await asyncio.to_thread(Path(f"{fifo}.go").write_text, "go\n")
    assert output_of(await task) == "begun\ngo"
    assert is_gone(child)


async def test_a_child_that_has_left_the_group_hangs_nothing(
    build: Build, run: SettledRun, context_of: ContextOf, script: Script, tmp_path: Path
) -> None:
    """A child with its own session cannot be found and lives on; the attempt ends without it."""
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    body = f"setsid sh -c 'echo $$ > {fifo}; exec sleep 1000' & cat {fifo}.go; exit 0"
    os.mkfifo(f"{fifo}.go")
    task = asyncio.create_task(build(script(body)).handle(run, context_of()))
    process = await wait_for_pid(fifo)
    await asyncio.to_thread(Path(f"{fifo}.go").write_text, "go\n")
    try:
        assert output_of(await task) == "go"
    finally:
        signal.pidfd_send_signal(process, signal.SIGKILL)
    assert is_gone(process)


async def test_nothing_of_ours_is_inherited(build: Build, run: SettledRun, context_of: ContextOf) -> None:
    """Only descriptors 0, 1 and 2 are inherited, not even an inheritable listening socket."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.set_inheritable(True)
        output = output_of(await build("ls", "-l", "/proc/self/fd").handle(run, context_of()))
    assert "socket" not in output
    numbers = [line.split()[-3] for line in output.splitlines() if "->" in line]
    assert numbers == ["0", "1", "2", "3"], output  # 3 is ls reading the directory
    assert "/proc/" in output.splitlines()[-1]


async def test_it_leads_a_session_and_gets_signals(
    build: Build, run: SettledRun, context_of: ContextOf
) -> None:
    """Its own session and group; SIGPIPE as usual, and no signal blocked."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        show = (
            "import os; print(os.getsid(0) == os.getpgid(0) == os.getpid());"
            "print(*[l.split()[1] for l in open('/proc/self/status') if l[:6] in ('SigBlk', 'SigIgn')])"
        )
        output = output_of(await build(sys.executable, "-c", show).handle(run, context_of())).splitlines()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    assert output[0] == "True"
    blocked, ignored = (int(mask, 16) for mask in output[1].split())
    assert blocked == 0
    assert not ignored & (1 << (signal.SIGTERM - 1))


async def test_its_directory_is_private_and_fresh(
    build: Build, run: SettledRun, context_of: ContextOf
) -> None:
    """It runs in its own directory, for this user only, and cannot prevent its removal."""
    handler = build(
        "sh", "-c", "stat -c %a .; ls; mkdir -p a/b; touch a/b/c; ln -s /etc link; chmod 0 a; pwd"
    )
    output = output_of(await handler.handle(run, context_of())).splitlines()
    assert output[:2] == ["700", "run.json"]
    again = output_of(await handler.handle(run, context_of())).splitlines()
    assert again[:2] == ["700", "run.json"]
    assert again[2] != output[2]


async def test_it_runs_in_the_configured_directory(
    build: Build, run: SettledRun, context_of: ContextOf, tmp_path: Path
) -> None:
    assert output_of(await build("pwd", cwd=str(tmp_path)).handle(run, context_of())) == str(tmp_path)


@pytest.mark.parametrize(
    ("content", "mode", "words"),
    [
        ("#!/no/such/interpreter\n", 0o755, "interpreter"),
        ("no first line\n", 0o755, "#!"),
        ("#!/bin/sh\n", 0o644, "Permission denied"),
        (None, 0, "No such file"),
    ],
)
async def test_a_program_that_cannot_be_started_is_tried_again(
    build: Build,
    run: SettledRun,
    context_of: ContextOf,
    tmp_path: Path,
    content: str | None,
    mode: int,
    words: str,
) -> None:
    """It may be in the middle of a deployment; the reason says what is wrong."""
    path = tmp_path / "program"
    if content is not None:
        path.write_text(content)
        path.chmod(mode)
    answer = await build(str(path)).handle(run, context_of())
    assert isinstance(answer, Retry)
    assert words in answer.reason


async def test_what_no_system_takes_is_rejected(
    build: Build, run: SettledRun, context_of: ContextOf
) -> None:
    """Arguments beyond the system's limit never fit."""
    answer = await build("true", "x" * 1_000_000).handle(run, context_of())
    assert isinstance(answer, Reject)
    assert "exceed the system's limit" in answer.reason


async def test_a_full_disk_is_tried_again(
    build: Build, run: SettledRun, context_of: ContextOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the input cannot be written, the program is not started."""

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    handler = build("true")
    monkeypatch.setattr(Path, "write_bytes", full)
    assert reason(await handler.handle(run, context_of())).endswith("No space left on device")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"command": "rm -rf {run_id}"}, "must be a list"),
        ({"command": []}, "must name a program"),
        ({"command": [""]}, "must name a program"),
        ({"command": ["a\x00"]}, "NUL"),
        ({"command": ["a", "b\x00"]}, "NUL"),
        ({"command": ["a", "{runid}"]}, "unknown field {runid}"),
        ({"command": ["awk", "{print $1}"]}, "written twice"),
        ({"command": ["a", "{"]}, "written twice"),
        ({"command": ["a", "{run_id!r}"]}, "no conversion"),
        ({"command": ["a", "{run_id:>9}"]}, "no conversion"),
        ({"command": ["a", "{run_id.__class__}"]}, "unknown field"),
        ({"command": ["a", "{url}"]}, "unknown field"),
        ({"pass_env": ["FLORA_API_KEY"]}, "cannot be passed"),
        ({"pass_env": ["receiver_ops_token"]}, "cannot be passed"),
        ({"pass_env": ["A=B"]}, "not the name"),
        ({"env": {"RUN_ID": "x"}}, "RUN_"),
        ({"env": {"A B": "x"}}, "not the name"),
        ({"env": {"A": "env:FLORA_API_KEY"}}, "the service's own"),
        ({"env": {"A": "env:MISSING"}}, "MISSING is not set"),
        ({"env": {"A": "a\x00b"}}, "NUL"),
        ({"retry_codes": [0]}, "greater than or equal to 1"),
        ({"reject_codes": [75]}, "both have 75"),
        ({"kill_after_seconds": 5}, "less than or equal to 4"),
        ({"shell": True}, "Extra inputs"),
    ],
)
def test_a_wrong_configuration_is_refused_at_once(options: dict[str, Any], words: str) -> None:
    """Before anything runs, with a message that says what to do."""
    with pytest.raises(ValidationError) as caught:
        CommandConfig.model_validate({"command": ["true"], **options}, context={"environ": {}})
    assert words in str(caught.value)


def test_every_option_has_a_description() -> None:
    assert all(field.description for field in CommandConfig.model_fields.values())


def test_a_secret_is_not_shown_with_the_configuration() -> None:
    config = CommandConfig.model_validate(
        {"command": ["true"], "env": {"TOKEN": "env:MINE"}}, context={"environ": {"MINE": "tell nobody"}}
    )
    assert config.env["TOKEN"].get_secret_value() == "tell nobody"
    assert "tell nobody" not in repr(config)


async def test_the_check_says_what_is_missing(build: Build, tmp_path: Path, work: Path) -> None:
    """Program, permission, directory, and a parent directory of this user alone."""
    with pytest.raises(FileNotFoundError, match="nowhere-to-be-found is not in PATH"):
        await build("nowhere-to-be-found").check()
    with pytest.raises(FileNotFoundError, match="/nowhere/to/be does not exist"):
        await build("/nowhere/to/be").check()
    plain = tmp_path / "plain"
    plain.touch()
    with pytest.raises(PermissionError, match=r"not executable: chmod \+x"):
        await build(str(plain)).check()
    with pytest.raises(NotADirectoryError, match="cwd"):
        await build("true", cwd=str(plain)).check()
    make_directory(work, 0o755)
    with pytest.raises(PermissionError, match="belongs to this user alone"):
        await build("true").check()


async def test_a_place_that_others_prepared_is_not_used(
    build: Build, run: SettledRun, context_of: ContextOf, work: Path, tmp_path: Path
) -> None:
    """In a shared /tmp, another user may have made a link or an open directory of this name."""
    make_link(work, make_directory(tmp_path / "elsewhere", 0o700))
    answer = await build("true").handle(run, context_of())
    assert isinstance(answer, Retry)
    assert "this user alone" in answer.reason


async def test_directories_of_dead_processes_are_swept_up(build: Build, work: Path) -> None:
    """What a killed service left is removed at the next start; what is locked stays."""
    used, dead = Workdir(work), Workdir(work)
    (dead.path / "outputs").mkdir()
    (dead.path / "outputs" / "big").write_bytes(b"x")
    os.close(dead._lock)  # as the system does for a process that is killed
    await build("true").check()
    assert leftovers(work) == [used.path.parent]
    used.remove()


SERVICE = """
import asyncio, sys
from pathlib import Path
from types import SimpleNamespace
from handlers.command import Command, CommandConfig
from receiver.handler import Event
from tests.support.handler_kit import RUN

async def stored():
    return []

context = SimpleNamespace(
    event=Event.SETTLED, idempotency_key="key", stored=stored, handler="test", attempt=1, max_attempts=2
)
handler = Command(CommandConfig(command=(sys.argv[1],)), parent=Path(sys.argv[2]))
asyncio.run(handler.handle(RUN, context))
"""


async def test_a_killed_service_leaves_neither_program_nor_directory(
    build: Build, script: Script, tmp_path: Path, work: Path
) -> None:
    """The next start kills what still runs, since its attempt is repeated; and no other process."""
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    program = script(STUBBORN.format(fifo=fifo))
    service = await asyncio.create_subprocess_exec(
        sys.executable, "-c", SERVICE, program, str(work), cwd=ROOT
    )
    orphan = await wait_for_pid(fifo)
    await build("true").check()
    assert len(leftovers(work)) == 1, "what is in use stays"
    service.kill()
    await service.wait()
    await build("true").check()
    assert is_gone(orphan)


async def test_a_number_that_another_process_has_now_is_spared(build: Build, work: Path) -> None:
    """A group leader whose number is in a leftover record, but which began later, lives on."""
    bystander = await asyncio.create_subprocess_exec("sleep", "1000", start_new_session=True)
    try:
        for record in (f"{bystander.pid} another-boot 1", f"{bystander.pid}", "x y", "", "-1 x", "1 x"):
            dead = Workdir(work)
            (dead.path.parent / "program").write_text(record)
            os.close(dead._lock)
            await build("true").check()
            assert leftovers(work) == []
        assert bystander.returncode is None
    finally:
        bystander.kill()
    assert await bystander.wait() == -signal.SIGKILL


async def test_many_at_once_keep_apart(build: Build, run: SettledRun, context_of: ContextOf) -> None:
    """Twenty runs at a time: each gets its own, and no descriptor is left open."""
    handler = build("sh", "-c", "cat >copy; cat copy | wc -c >n; echo $RUN_ID")
    await handler.handle(run, context_of())
    before = open_files()
    names = [f"run_{n}" for n in range(20)]
    answers = await asyncio.gather(
        *(handler.handle(replace(run, run_id=name), context_of(name)) for name in names)
    )
    assert [output_of(answer) for answer in answers] == names
    assert open_files() == before


async def test_the_example_in_the_readme_does_what_it_says(
    build: Build, run: SettledRun, context_of: ContextOf, tmp_path: Path
) -> None:
    """One line for each run, delivered three times at once and again later."""
    (source,) = re.findall(
        r"```python\n(#!/usr/bin/env python3\n.*?)```",
        (ROOT / "handlers/README.md").read_text("utf-8"),
        re.DOTALL,
    )
    program = tmp_path / "costs.py"
    program.write_text(source, "utf-8")
    program.chmod(0o755)
    handler = build(str(program), cwd=str(tmp_path))
    runs = [replace(run, run_id=f"run_{n % 3}", charged_cost=0.25) for n in range(6)]
    answers = await asyncio.gather(*(handler.handle(each, context_of(each.run_id)) for each in runs))
    assert all(isinstance(answer, Done) for answer in answers), answers
    assert isinstance(await handler.handle(run, context_of()), Done)
    lines = (tmp_path / "costs.csv").read_text().splitlines()
    assert sorted(lines) == ["run_0,completed,0.25", "run_1,completed,0.25", "run_2,completed,0.25"]
