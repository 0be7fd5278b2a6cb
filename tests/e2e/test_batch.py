"""`runs batch` end to end: each row is stored once, bad rows cost nothing, a batch resumes."""

import asyncio
import csv
import os
import pty
import re
import shlex
import signal
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path

import pytest

from receiver.client.client import ReceiverClient
from receiver.emulator import parse_faults
from receiver.store import backup
from tests.support.batches import KEY, WEATHER, BatchStage, CommandResult
from tests.support.lives import COMMAND, ROOT, served
from tests.support.patience import PATIENCE_SECONDS
from tests.support.stage import Stage, eventually, run_stage


@pytest.fixture
async def batches(stage: Stage) -> AsyncIterator[BatchStage]:
    """A batch's surroundings, with a receiver in this loop."""
    made = BatchStage(stage)
    async with stage.service(**made.settings()):
        yield made


async def test_every_row_comes_home_in_bad_weather(tmp_path: Path) -> None:
    """Dropped and doubled callbacks, 429 and 5xx: sixty rows, sixty runs, sixty files, and the right bill."""
    async with run_stage(tmp_path, faults=WEATHER, seed=7) as stage:
        batches = BatchStage(stage)
        async with served(stage, **batches.settings()) as process, stage.client() as client:
            await process.ready(client)
            ended = await batches.batch(batches.table(60), "--yes", "--parallel", "16")
            assert ended.code == 0, ended
            assert "60 of 60 rows completed and stored" in ended.out
            assert "60 runs of emu-image × $0.04 = $2.40" in ended.err
            assert "Cost: $2.40." in ended.out
            batches.check(60)
            before = stage.emulator.gate.requests.copy()

            again = await batches.batch("spring.csv", "--json", "--technique-id", "tech_emu_image")
            assert again.code == 0, again
            assert "60 of them started before" in again.err
            data = again.data
            assert (data["ok"], data["succeeded"], len(data["outcomes"])) == (True, 60, 60)
            starts = "POST /techniques/{technique_id}/runs"
            assert stage.emulator.gate.requests[starts] == before[starts] >= 60
            batches.check(60)
            assert await process.stop() == 0


async def test_the_batch_that_the_page_shows(batches: BatchStage) -> None:
    """Its table, its command line (and a yes), its names of files."""
    section = (ROOT / "receiver/docs/batches.md").read_text("utf-8")
    assert KEY in section
    shown = dict(re.findall(r"```(\w+)\n(.*?)```", section, re.DOTALL))
    (batches.stage.directory / "spring.csv").write_text(shown["csv"], "utf-8")
    command, *arguments = shlex.split(shown["sh"])
    assert command == "flora-receiver"
    ended = await batches.end(await batches.begin(*arguments, "--yes"))
    assert ended.code == 0, ended
    assert [row["key"] for row in batches.results()] == ["de", "fr"]
    assert sorted(path.name for path in (batches.stage.outputs / "spring").glob("*.png")) == [
        "de.png",
        "fr.png",
    ]


@pytest.mark.parametrize("streams", ["<&-", "2>&-", "2>&1 >&- | true", "PYTHONIOENCODING=ascii"])
async def test_a_batch_ends_well_whatever_its_streams_are(batches: BatchStage, streams: str) -> None:
    """Closed, narrow, or with nobody who reads them: every row is stored, and the results are written."""
    file = batches.table(3, "übersicht.csv")
    words = " ".join(shlex.quote(word) for word in (str(COMMAND), *batches.arguments(file, "--yes")))
    variable, redirect = (streams, "") if "=" in streams else ("", streams)
    shell = await asyncio.create_subprocess_exec(
        "/bin/bash", "-o", "pipefail", "-c", f"{variable} {words} {redirect}",
        env=batches.environment(), cwd=batches.stage.directory, stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    ended = await batches.end(shell)
    assert (ended.code, "Traceback" in ended.err) == (0, False), ended
    batches.check(3, batch="übersicht")


async def test_bad_rows_cost_nothing(batches: BatchStage) -> None:
    """All errors are reported at once, every one of them with `--json`; nothing is started."""
    (batches.stage.directory / "bad.csv").write_text(
        "market_code,headline\nde,Hallo\nde,Hi\nfr,\nit,a,b\n"
        + "".join(f"x{number},\n" for number in range(60))
    )
    ended = await batches.batch("bad.csv", "--yes")
    assert ended.code == 2
    assert "63 problems; nothing was started:" in ended.err
    assert "row 3, column 'market_code': has the key 'de' of an earlier row" in ended.err
    assert "row 4, column 'headline': is empty; input 'prompt' is required" in ended.err
    assert "row 5: has 3 fields, the header has 2" in ended.err
    assert "… and 13 more (--json shows all)" in ended.err
    reported = await batches.batch("bad.csv", "--yes", "--json")
    assert (reported.code, reported.data["total"], len(reported.data["problems"])) == (2, 63, 63)
    assert reported.data["problems"][1] == {
        "row": 4,
        "column": "headline",
        "message": "is empty; input 'prompt' is required",
    }
    assert batches.count_started() == 0


@pytest.mark.parametrize(
    ("file", "more", "given", "code", "why"),
    [
        ("spring.csv", [], None, 2, "add --yes"),
        (
            "spring.csv",
            ["--map", "colour={headline}"],
            None,
            2,
            "no input 'colour'; its inputs: prompt, image, size",
        ),
        ("spring.csv", ["--batch", "a:b"], None, 2, "cannot name a batch"),
        ("spring.csv", ["--results", "nowhere/results.csv"], None, 2, "cannot be written"),
        ("spring.csv", ["--results", "spring.csv"], None, 2, "would overwrite the table"),
        ("spring.csv", ["--technique-id", "tech_unknown"], None, 1, "not found"),
        ("missing.csv", [], None, 2, "there is no file missing.csv"),
        ("empty.csv", [], None, 2, "is empty"),
        ("-", ["--yes"], b"market_code,headline\nde,Hallo\n", 2, "name the batch with --batch"),
    ],
)
async def test_what_is_refused_before_anything_is_started(
    batches: BatchStage, file: str, more: list[str], given: bytes | None, code: int, why: str
) -> None:
    batches.table(1)
    (batches.stage.directory / "empty.csv").touch()
    ended = await batches.batch(file, *more, given=given)
    assert (ended.code, why in ended.err) == (code, True), ended
    assert batches.count_started() == 0


async def test_json_lines_from_standard_input(batches: BatchStage) -> None:
    """What programs write, down a pipe."""
    rows = b"".join(
        b'{"market_code": "r%d", "headline": "Row %d,\\nsays \\"hello\\""}\n' % (n, n) for n in range(3)
    )
    ended = await batches.batch("-", "--yes", "--batch", "piped", given=rows)
    assert ended.code == 0, ended
    batches.check(3, batch="piped")


async def test_without_a_service_it_says_what_to_do(stage: Stage) -> None:
    batches = BatchStage(stage)
    ended = await batches.batch(batches.table(1), "--yes", "--patience", "0")
    assert ended.code == 1
    assert "flora-receiver serve" in ended.err


async def test_no_credits_then_on_again(batches: BatchStage) -> None:
    """402 stops the batch but not its active rows; after topping up, the same command resumes it."""
    book = batches.stage.emulator.faults
    book.add(
        parse_faults({"kind": "insufficient_credits", "path": "/techniques/", "method": "POST", "next": 2})
    )
    file = batches.table(9)
    ended = await batches.batch(file, "--yes", "--parallel", "2")
    assert ended.code == 1
    assert "FLORA has no credits left" in ended.err
    states = [row["state"] for row in batches.results()]
    assert states[:2] == ["refused", "refused"]
    assert states.count("not_started") >= 6
    book.reset()
    again = await batches.batch(file, "--yes")
    assert again.code == 0, again
    batches.check(9)


async def test_a_refused_and_a_failed_row_do_not_keep_the_others(batches: BatchStage) -> None:
    """The exit code tells that not all succeeded, the screen and the file tell which and why."""
    batches.stage.emulator.faults.add(
        parse_faults({"kind": "fail", "error_code": "safety_blocked", "next": 1})
    )
    file = batches.stage.directory / "mixed.csv"
    file.write_text("market_code,headline,size\nr0,a,\nr1,b,nonsense\nr2,c,1000\n")
    ended = await batches.batch(file, "--yes", "--map", "size={size}", "--parallel", "1")
    assert ended.code == 1
    assert [row["state"] for row in batches.results()] == ["failed", "refused", "completed"]
    assert [row["error_code"] for row in batches.results()] == [
        "safety_blocked",
        "input_validation_error",
        "",
    ]
    assert "1 of 3 rows completed and stored" in ended.out
    assert "size must be a number" in " ".join(ended.out.split())


async def test_a_changed_row_is_not_taken_for_the_old_one(batches: BatchStage) -> None:
    """The key was used for other inputs: that row is refused with advice, nothing is started."""
    file = batches.table(2)
    assert (await batches.batch(file, "--yes")).code == 0
    file.write_text(file.read_text().replace("Row 1", "Raw 1"))
    ended = await batches.batch(file, "--yes")
    assert ended.code == 1
    assert [row["state"] for row in batches.results()] == ["completed", "refused"]
    assert "another key" in batches.results()[1]["error_message"]
    assert batches.count_started() == 2


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)],
    ids=["int", "term", "hup"],
)
async def test_an_interrupted_batch_goes_on(tmp_path: Path, number: signal.Signals, code: int) -> None:
    """It ends at once, writes what it knows, says how to go on; what was started is not started again."""
    async with run_stage(tmp_path, run_seconds=600.0) as stage:
        batches = BatchStage(stage)
        async with stage.service(**batches.settings()):
            file = batches.table(12)
            process = await batches.begin(*batches.arguments(file, "--yes", "--parallel", "4"))
            await batches.until_started(4)
            async with asyncio.timeout(PATIENCE_SECONDS):
                ended = await batches.stop(process, number)
            assert ended.code == code, ended
            assert "run the same command again" in ended.err
            assert "Traceback" not in ended.err
            states = [row["state"] for row in batches.results()]
            assert len(states) == 12
            assert "not_started" in states
            assert "unfinished" in states
            stage.end_runs()
            again = await batches.batch(file, "--yes", "--parallel", "12")
            assert again.code == 0, again
            batches.check(12)


async def test_after_the_restore_of_an_older_backup_it_ends(tmp_path: Path) -> None:
    """FLORA knows the keys and names no run: unknown at once, not guessed, with a way to go on."""
    async with run_stage(tmp_path, run_seconds=600.0) as stage:
        batches, older = BatchStage(stage), stage.directory / "older.db"
        file = batches.table(6)
        async with stage.service(**batches.settings()):
            await asyncio.to_thread(batches.call, lambda receiver: receiver.backup(older))
            process = await batches.begin(*batches.arguments(file, "--yes", "--parallel", "6"))
            await batches.until_started(6)
            await batches.stop(process)
        backup.restore(older, stage.database)
        async with stage.service(**batches.settings()):
            async with asyncio.timeout(PATIENCE_SECONDS):
                ended = await batches.batch(file, "--yes", "--parallel", "2")
            assert ended.code == 1, ended
            assert {row["state"] for row in batches.results()} == {"unknown"}
            assert all("not in this ledger" in row["error_message"] for row in batches.results())
            assert "6 rows are unknown" in ended.err
            assert "flora-receiver runs resolve batch:spring:r0 --run-id run_…" in ended.err
            assert batches.count_started() == 6
            for run_id in stage.emulator.runs._order:
                number = re.findall(r"Row (\d)", stage.emulator.runs.get(run_id).outputs[0].text)[0]
                resolve = partial(_resolve, start=f"batch:spring:r{number}", run_id=run_id)
                await asyncio.to_thread(batches.call, resolve)
            stage.end_runs()
            again = await batches.batch(file, "--yes")
            assert again.code == 0, again
            batches.check(6)


def _resolve(receiver: ReceiverClient, *, start: str, run_id: str) -> None:
    receiver.resolve(start, run_id)


async def test_results_that_cannot_be_written_are_printed(tmp_path: Path) -> None:
    """The directory is gone when the batch ends: exit code 1, and its lines on standard output."""
    async with run_stage(tmp_path, run_seconds=600.0) as stage:
        batches = BatchStage(stage)
        async with stage.service(**batches.settings()):
            gone = batches.stage.directory / "gone"
            gone.mkdir()
            process = await batches.begin(
                *batches.arguments(batches.table(2), "--yes", "--results", "gone/r.csv")
            )
            await batches.until_started(2)
            gone.rmdir()
            stage.end_runs()
            ended = await batches.end(process)
    assert ended.code == 1, ended
    assert "gone/r.csv cannot be written: No such file or directory" in ended.err
    assert "2 of 2 rows completed and stored" in ended.out
    assert "Results: gone" not in ended.out
    lines = ended.out[ended.out.index("\ufeff") + 1 :].splitlines()
    assert [row["key"] for row in csv.DictReader(lines)] == ["r0", "r1"]


async def test_a_full_disk_is_said(batches: BatchStage) -> None:
    """Also in the JSON, which has the outcomes in any case."""
    file = batches.table(1)
    # By a link of its own, so that nothing that replaces the path can harm this machine's device.
    (batches.stage.directory / "full").symlink_to("/dev/full")
    ended = await batches.batch(file, "--yes", "--json", "--results", "full")
    assert ended.code == 1, ended
    assert "No space left on device" in ended.err
    assert (ended.data["ok"], ended.data["results"], len(ended.data["outcomes"])) == (False, None, 1)
    assert "No space left" in ended.data["results_error"]


async def test_a_semicolon_table_has_semicolon_results(batches: BatchStage) -> None:
    """As the spreadsheet that wrote it expects; a column that is not found names the separator."""
    file = batches.stage.directory / "spring.csv"
    file.write_text("market_code;headline;note, short\r\n=de;Hallo;a\r\n")
    ended = await batches.batch(file, "--yes")
    assert ended.code == 0, ended
    raw = (batches.stage.directory / "results.csv").read_bytes()
    assert raw.startswith(b"\xef\xbb\xbfkey;run_id;state;")
    assert b"\r\n'=de;run_" in raw
    wrong = await batches.batch(file, "--yes", "--separator", ",")
    assert wrong.code == 2
    assert "it has: market_code;headline;note, short (separated by ',': see --separator)" in wrong.err
    assert (await batches.batch(file, "--yes", "--separator", "ab")).code == 2
    assert batches.count_started() == 1


async def test_on_a_terminal_it_asks_shows_progress_and_leaves_it_clean(tmp_path: Path) -> None:
    """A person sees the price, says yes, watches a bar; after Ctrl-C the cursor is back."""
    async with run_stage(tmp_path, run_seconds=600.0) as stage:
        batches = BatchStage(stage)
        async with stage.service(**batches.settings()):
            batches.table(4)
            said_no = await _on_terminal(batches, [("Start them?", b"n\n")])
            assert said_no.code == 1
            assert "Nothing was started." in said_no.out
            assert batches.count_started() == 0
            ended = await _on_terminal(batches, [("Start them?", b"y\n"), ("2 in progress", b"\x03")])
    assert ended.code == 130, ended
    assert "4 runs of emu-image × $0.04 = $0.16" in ended.out
    assert re.search(r"0/4\D", ended.out)
    assert ended.out.rfind("\x1b[?25h") > ended.out.rfind("\x1b[?25l") >= 0
    assert "Interrupted." in ended.out


async def _on_terminal(batches: BatchStage, dialogue: list[tuple[str, bytes]]) -> CommandResult:
    """Run a batch on a terminal of its own, typing each answer when its cue is on the screen."""
    controller, terminal = pty.openpty()
    os.set_blocking(controller, False)
    environment = batches.environment() | {"TERM": "xterm-256color", "COLUMNS": "120", "LINES": "40"}
    process = await asyncio.create_subprocess_exec(
        COMMAND, *batches.arguments("spring.csv", "--parallel", "2"), env=environment, cwd=batches.stage.directory,
        stdin=terminal, stdout=terminal, stderr=terminal, start_new_session=True,
        preexec_fn=_take_terminal,
    )  # fmt: skip
    os.close(terminal)
    screen = bytearray()

    def read() -> str:
        try:
            while piece := os.read(controller, 65536):
                screen.extend(piece)
        except OSError:
            pass
        return screen.decode("utf-8", "replace")

    async def shows(cue: str) -> bool:
        return cue in read()

    try:
        for cue, answer in dialogue:
            await eventually(lambda cue=cue: shows(cue), what=cue)  # type: ignore[misc]
            os.write(controller, answer)

        async def over() -> bool:
            read()
            return process.returncode is not None

        await eventually(over)
        assert process.returncode is not None
        return CommandResult(process.returncode, read(), "")
    finally:
        os.close(controller)
        if process.returncode is None:
            process.kill()
            await process.wait()


def _take_terminal() -> None:
    """Make the terminal on standard input the controlling one, so that Ctrl-C typed there is a SIGINT."""
    import fcntl  # noqa: PLC0415 -- in the child, before the command
    import termios  # noqa: PLC0415

    signal.signal(signal.SIGINT, signal.default_int_handler)
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
