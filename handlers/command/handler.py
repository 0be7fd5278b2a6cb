"""The handler that runs a program of yours for each run. Found by its entry point `command`.

Never a shell. The program gets the run as JSON on stdin and in a file, fields of it in the environment, and the
idempotency key as RUN_IDEMPOTENCY_KEY: an attempt that was cut comes again with the same key, and it is the program
that must make its effect one that can be repeated. The service's own environment stays with the service.
"""

import asyncio
import errno
import os
import re
import shutil
import signal
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Annotated, ClassVar, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from handlers.command.arguments import ArgumentTemplate, variables
from handlers.command.downloads import fetch_all
from handlers.command.output import Printed
from handlers.command.process import Ended, Process
from handlers.command.workdir import Workdir, default_parent, prepare, sweep
from handlers.payload import run_document, run_json
from receiver.handler import (
    Answer,
    Context,
    Done,
    Event,
    Reject,
    Retry,
    Secret,
    SettledRun,
    When,
)

THREADS = 256  # more than a dispatcher ever runs at once; only as many are started as are needed
REASON_CHARACTERS = 600

T = TypeVar("T")

_OURS = ("FLORA_", "RECEIVER_")
_USUAL = ("PATH", "HOME", "LANG", "LC_ALL", "TZ")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def _listed(value: object) -> object:
    if isinstance(value, str):
        raise ValueError('must be a list, the program first, as in ["./note.sh", "{run_id}"]: no shell')  # noqa: TRY004
    return value


def _usable_command(command: tuple[str, ...]) -> tuple[str, ...]:
    if not command or not command[0].strip():
        raise ValueError("must name a program")
    if "\x00" in command[0]:
        raise ValueError("a program's name cannot hold a NUL character")
    for argument in command[1:]:
        ArgumentTemplate(argument)
    return command


def _passable(name: str) -> str:
    if name.upper().startswith(_OURS):
        raise ValueError(
            f"{name} stays with the service: what begins with FLORA_ or RECEIVER_ may hold its secrets; "
            "give the program one of its own with env"
        )
    return _variable(name)


def _variable(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise ValueError(f"{name!r} is no name of an environment variable")
    if name.startswith("RUN_"):
        raise ValueError(f"{name}: names that begin with RUN_ tell about the run")
    return name


def _not_ours(value: object) -> object:
    if isinstance(value, str) and value.upper().startswith(tuple(f"ENV:{name}" for name in _OURS)):
        raise ValueError(f"{value} is the service's own: give the program a secret of its own")
    return value


def _without_nul(secret: Secret) -> Secret:
    if "\x00" in secret.get_secret_value():
        raise ValueError("an environment variable cannot hold a NUL character")
    return secret


Name = Annotated[str, AfterValidator(_variable)]
Given = Annotated[Secret, BeforeValidator(_not_ours), AfterValidator(_without_nul)]
ExitCode = Annotated[int, Field(ge=1, le=255)]


class CommandConfig(BaseModel):
    """Which program, with what, and what its exit code says."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    command: Annotated[tuple[str, ...], BeforeValidator(_listed), AfterValidator(_usable_command)]
    """The program and its arguments, as a list; never a shell. Arguments may hold fields: `{run_id}`."""
    cwd: Path | None = None
    """The directory it runs in. Default: its own temporary directory, which is removed afterwards."""
    env: dict[Name, Given] = {}
    """Variables for the program; a value may be a secret: `env:NAME` or `file:/path`."""
    pass_env: tuple[Annotated[str, AfterValidator(_passable)], ...] = _USUAL
    """Variables of the service that the program gets as well; never `FLORA_…` or `RECEIVER_…`."""
    download: bool = False
    """Whether the outputs are downloaded for it beforehand, into `RUN_OUTPUTS_DIR`."""
    retry_codes: frozenset[ExitCode] = frozenset({75})
    """Exit codes that mean: later again."""
    reject_codes: frozenset[ExitCode] = frozenset()
    """Exit codes that mean: never; the dispatch is dead."""
    other_codes: Literal["retry", "reject"] = "retry"
    """What all other exit codes but 0 mean."""
    kill_after_seconds: Annotated[float, Field(ge=0, le=4)] = 3.0
    """Seconds between SIGTERM and SIGKILL when the time is up or the service stops."""
    max_output: Annotated[int, Field(ge=0, le=65536)] = 4096
    """How many of the last bytes that it writes (stdout and stderr) are kept with the dispatch."""

    @model_validator(mode="after")
    def _codes_say_one_thing(self) -> "CommandConfig":
        if both := self.retry_codes & self.reject_codes:
            raise ValueError(f"retry_codes and reject_codes both have {', '.join(map(str, sorted(both)))}")
        return self


class Command:
    """Runs a program for each run that ends; its exit code is the answer."""

    Config: ClassVar[type[BaseModel]] = CommandConfig
    on: ClassVar[tuple[Event, ...]] = (Event.SETTLED,)
    when: ClassVar[When] = When()
    concurrency: ClassVar[int] = 4

    def __init__(
        self, config: CommandConfig, *, parent: Path | None = None, environ: Mapping[bytes, bytes] | None = None
    ) -> None:
        self._config = config
        self._parent = parent or default_parent()
        environ = os.environb if environ is None else environ
        self._environ = {name.encode(): environ[name.encode()] for name in config.pass_env if name.encode() in environ}
        self._environ |= {name.encode(): value.get_secret_value().encode() for name, value in config.env.items()}
        self._program = _find(config.command[0], self._environ.get(b"PATH", environ.get(b"PATH")))
        self._arguments = [ArgumentTemplate(argument) for argument in config.command[1:]]
        self._cwd = None if config.cwd is None else config.cwd.expanduser().absolute()
        passed = [os.fsdecode(self._environ.get(name.encode(), b"")) for name in config.pass_env if name not in _USUAL]
        self._secrets = [*passed, *(value.get_secret_value() for value in config.env.values())]
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="command")

    async def handle(self, run: SettledRun, context: Context) -> Answer:
        try:
            workdir = Workdir(self._parent)
        except OSError as error:
            return Retry(f"there is no directory to work in: {_explained(error)}")
        urls = [output.value for output in run.outputs if not output.is_text]
        printed, process = Printed([*self._secrets, *urls], self._config.max_output), None
        try:
            prepared = await self._prepare(run, context, workdir, printed.keep_bytes)
            if not isinstance(prepared, Process):
                return prepared
            process = prepared
        except OSError as error:
            return Retry(f"cannot write for the program: {_explained(error)}")
        finally:
            if process is None:
                await asyncio.shield(self._in_thread(workdir.remove))
        return await self._conduct(process, workdir, printed)

    async def check(self) -> None:
        """Look for the program and its directory, and remove what killed processes have left behind."""
        await self._in_thread(self._check)

    async def close(self) -> None:
        self._threads.shutdown(wait=False)

    def _check(self) -> None:
        program = Path(self._program)
        if "/" not in self._program:
            raise FileNotFoundError(f"command: there is no program {self._program} in PATH")
        if not program.is_file():
            raise FileNotFoundError(f"command: there is no program {self._program}")
        if not os.access(program, os.X_OK):
            raise PermissionError(f"command: {program} is not executable: chmod +x {program}")
        if self._cwd is not None and not self._cwd.is_dir():
            raise NotADirectoryError(f"cwd: {self._cwd} is not a directory")
        if signal.getsignal(signal.SIGCHLD) is signal.SIG_IGN:
            raise RuntimeError("the service was started with SIGCHLD ignored, so that no exit code can be read")
        try:
            prepare(self._parent)
        except OSError as error:
            raise type(error)(f"the program's directories: {_explained(error)}") from error
        sweep(self._parent)

    async def _prepare(
        self, run: SettledRun, context: Context, workdir: Workdir, keep_bytes: int
    ) -> Process | Retry | Reject:
        """Write down what the program is told; download the outputs for it if asked."""
        document = run_document(
            run, event=context.event, idempotency_key=context.idempotency_key, artifacts=await context.stored()
        )
        outputs_dir = workdir.path / "outputs"
        if self._config.download:
            outputs_dir.mkdir(mode=0o700)
            saved = await fetch_all(run.outputs, outputs_dir, context)
            if isinstance(saved, Retry | Reject):
                return saved
            for output, each in zip(document["outputs"], saved, strict=True):
                output["path"] = str(each.path)
        run_file = workdir.path / "run.json"
        run_file.write_bytes(run_json(document))
        places = {"run_file": str(run_file), "outputs_dir": str(outputs_dir) if self._config.download else ""}
        told = variables(document) | {
            "RUN_FILE": places["run_file"],
            "RUN_OUTPUTS_DIR": places["outputs_dir"],
            "RUN_HANDLER": context.handler,
            "RUN_ATTEMPT": str(context.attempt),
            "RUN_MAX_ATTEMPTS": str(context.max_attempts),
        }
        return Process(
            [self._program, *(argument.render(run, places) for argument in self._arguments)],
            directory=self._cwd or workdir.path,
            environment=self._environ | {name.encode(): value.encode() for name, value in told.items()},
            stdin=run_file,
            keep_bytes=keep_bytes,
            grace_seconds=self._config.kill_after_seconds,
        )

    async def _conduct(self, process: Process, workdir: Workdir, printed: Printed) -> Answer:
        """Run the program in a thread, which also cleans up after it, whether or not anybody still waits here."""

        def conduct() -> Ended | OSError:
            try:
                return process.run(workdir.note)
            except OSError as error:
                return error
            finally:
                workdir.remove()

        running = self._in_thread(conduct)
        try:
            ended = await asyncio.shield(running)
        except asyncio.CancelledError:
            process.stop()
            await asyncio.wait({running})
            raise
        return self._unstarted(ended) if isinstance(ended, OSError) else self._answer(ended, printed)

    def _unstarted(self, error: OSError) -> Answer:
        if error.errno == errno.E2BIG:
            return Reject(f"{self._name} cannot be started: its arguments and environment are too long for the system")
        hint = {
            errno.ENOENT: "; is the interpreter there that its first line names?",
            errno.ENOEXEC: "; a script begins with #! and its interpreter",
        }.get(error.errno or 0, "")
        return Retry(f"{self._name} cannot be started: {_explained(error)}{hint}")

    def _answer(self, ended: Ended, printed: Printed) -> Answer:
        output = printed.text(ended.tail, size=ended.size)
        if ended.code == 0:
            return Done({"exit_code": 0, "output": output, "output_bytes": ended.size})
        said = f": {output[-REASON_CHARACTERS:]}" if output else ""
        if ended.code is None:
            return Retry(f"{self._name}: its exit code is not known{said}")
        if ended.code < 0:
            return Retry(f"{self._name} was ended by {_signal_name(-ended.code)}{said}")
        code = ended.code
        rejected = code in self._config.reject_codes or (
            self._config.other_codes == "reject" and code not in self._config.retry_codes
        )
        reason = f"{self._name} ended with code {code}{said}"
        return Reject(reason) if rejected else Retry(reason)

    @property
    def _name(self) -> str:
        return Path(self._program).name

    def _in_thread(self, work: Callable[[], T]) -> asyncio.Future[T]:
        return asyncio.get_running_loop().run_in_executor(self._threads, work)


def _find(program: str, path: bytes | None) -> str:
    """Look a program up as a shell would, once: what PATH or the working directory become later does not matter."""
    searched = os.defpath if path is None else os.fsdecode(path)
    found = program if "/" in program else shutil.which(program, path=searched)
    return str(Path(found).expanduser().absolute()) if found else program


def _explained(error: OSError) -> str:
    words = error.strerror or str(error)
    return f"{words}: {os.fsdecode(error.filename)}" if isinstance(error.filename, str | bytes) else words


def _signal_name(number: int) -> str:
    name = f"signal {number}"
    with suppress(ValueError):
        name = signal.Signals(number).name
    return f"{name} (out of memory?)" if number == signal.SIGKILL else name
