"""The handler `command`: runs a program of the user's for each run, without a shell.

The program gets the run as JSON on stdin and in a file, its fields in the environment, and the
idempotency key as RUN_IDEMPOTENCY_KEY. An interrupted attempt is repeated with the same key, so the
program's effect must be repeatable. It does not get the service's own environment.
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

from handlers.command.arguments import ArgumentTemplate, to_variables
from handlers.command.downloads import fetch_all
from handlers.command.output import OutputFilter
from handlers.command.process import Exit, Process
from handlers.command.workdir import Workdir, check_parent, default_parent, sweep
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

T = TypeVar("T")

_MAX_THREADS = 256  # more than a dispatcher ever runs at once; they are started as needed
_MAX_REASON = 600
_RESERVED_PREFIXES = ("FLORA_", "RECEIVER_")
_DEFAULT_VARIABLES = ("PATH", "HOME", "LANG", "LC_ALL", "TZ")
_VARIABLE_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def _check_is_list(value: object) -> object:
    if not isinstance(value, str):
        return value
    raise ValueError(
        'must be a list, the program first, as in ["./note.sh", "{run_id}"]: there is no shell'
    )


def _check_command(command: tuple[str, ...]) -> tuple[str, ...]:
    if not command or not command[0].strip():
        raise ValueError("must name a program")
    if "\x00" in command[0]:
        raise ValueError("a program's name cannot hold a NUL character")
    for argument in command[1:]:
        ArgumentTemplate(argument)
    return command


def _check_passed(name: str) -> str:
    if name.upper().startswith(_RESERVED_PREFIXES):
        raise ValueError(
            f"{name} cannot be passed: FLORA_ and RECEIVER_ variables may hold the service's "
            "secrets; use env to set a variable for the program"
        )
    return _check_variable(name)


def _check_variable(name: str) -> str:
    if not _VARIABLE_NAME.fullmatch(name):
        raise ValueError(f"{name!r} is not the name of an environment variable")
    if name.startswith("RUN_"):
        raise ValueError(f"{name}: RUN_ names are reserved for the run")
    return name


def _check_secret_source(value: object) -> object:
    if isinstance(value, str) and value.upper().startswith(
        tuple(f"ENV:{name}" for name in _RESERVED_PREFIXES)
    ):
        raise ValueError(f"{value} is the service's own secret: give the program one of its own")
    return value


def _check_no_nul(secret: Secret) -> Secret:
    if "\x00" in secret.get_secret_value():
        raise ValueError("an environment variable cannot hold a NUL character")
    return secret


Name = Annotated[str, AfterValidator(_check_variable)]
Given = Annotated[Secret, BeforeValidator(_check_secret_source), AfterValidator(_check_no_nul)]
ExitCode = Annotated[int, Field(ge=1, le=255)]


class CommandConfig(BaseModel):
    """The program to run, its input, and the meaning of its exit codes."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    command: Annotated[tuple[str, ...], BeforeValidator(_check_is_list), AfterValidator(_check_command)]
    """Program and arguments, as a list (no shell). Arguments may contain fields: `{run_id}`."""
    cwd: Path | None = None
    """Working directory. Default: a temporary directory, which is removed afterwards."""
    env: dict[Name, Given] = {}
    """Environment variables to set; a value may be a secret: `env:NAME` or `file:/path`."""
    pass_env: tuple[Annotated[str, AfterValidator(_check_passed)], ...] = _DEFAULT_VARIABLES
    """Variables of the service to pass to the program; not `FLORA_…` or `RECEIVER_…`."""
    download: bool = False
    """Whether to download the outputs beforehand, into `RUN_OUTPUTS_DIR`."""
    retry_codes: frozenset[ExitCode] = frozenset({75})
    """Exit codes after which the run is retried."""
    reject_codes: frozenset[ExitCode] = frozenset()
    """Exit codes after which the dispatch is dead, without a retry."""
    other_codes: Literal["retry", "reject"] = "retry"
    """What any other exit code except 0 means."""
    kill_after_seconds: Annotated[float, Field(ge=0, le=4)] = 3.0
    """Seconds between SIGTERM and SIGKILL at a timeout or when the service stops."""
    max_output: Annotated[int, Field(ge=0, le=65536)] = 4096
    """How many of the last bytes of stdout and stderr are kept with the dispatch."""

    @model_validator(mode="after")
    def _check_codes(self) -> "CommandConfig":
        if both := self.retry_codes & self.reject_codes:
            raise ValueError(f"retry_codes and reject_codes both have {', '.join(map(str, sorted(both)))}")
        return self


class Command:
    """Runs a program for each run that ends. Its exit code decides what happens next."""

    Config: ClassVar[type[BaseModel]] = CommandConfig
    on: ClassVar[tuple[Event, ...]] = (Event.SETTLED,)
    when: ClassVar[When] = When()
    concurrency: ClassVar[int] = 4

    def __init__(
        self,
        config: CommandConfig,
        *,
        parent: Path | None = None,
        environ: Mapping[bytes, bytes] | None = None,
    ) -> None:
        self._config = config
        self._parent = parent or default_parent()
        environ = os.environb if environ is None else environ
        self._environ = {
            name.encode(): environ[name.encode()] for name in config.pass_env if name.encode() in environ
        }
        self._environ |= {
            name.encode(): value.get_secret_value().encode() for name, value in config.env.items()
        }
        self._program = _find_program(config.command[0], self._environ.get(b"PATH", environ.get(b"PATH")))
        self._arguments = [ArgumentTemplate(argument) for argument in config.command[1:]]
        self._cwd = None if config.cwd is None else config.cwd.expanduser().absolute()
        passed = [
            os.fsdecode(self._environ.get(name.encode(), b""))
            for name in config.pass_env
            if name not in _DEFAULT_VARIABLES
        ]
        self._secrets = [*passed, *(value.get_secret_value() for value in config.env.values())]
        self._threads = ThreadPoolExecutor(_MAX_THREADS, thread_name_prefix="command")

    async def handle(self, run: SettledRun, context: Context) -> Answer:
        try:
            workdir = Workdir(self._parent)
        except OSError as error:
            return Retry(f"cannot create the working directory: {_describe(error)}")
        urls = [output.value for output in run.outputs if not output.is_text]
        output, process = OutputFilter([*self._secrets, *urls], self._config.max_output), None
        try:
            prepared = await self._prepare(run, context, workdir, output.keep_bytes)
            if not isinstance(prepared, Process):
                return prepared
            process = prepared
        except OSError as error:
            return Retry(f"cannot write the program's input: {_describe(error)}")
        finally:
            if process is None:
                await asyncio.shield(self._in_thread(workdir.remove))
        return await self._run(process, workdir, output)

    async def check(self) -> None:
        """Look for the program and its directory, and clean up after killed services."""
        await self._in_thread(self._check)

    async def close(self) -> None:
        self._threads.shutdown(wait=False)

    def _check(self) -> None:
        program = Path(self._program)
        if "/" not in self._program:
            raise FileNotFoundError(f"command: {self._program} is not in PATH")
        if not program.is_file():
            raise FileNotFoundError(f"command: {self._program} does not exist")
        if not os.access(program, os.X_OK):
            raise PermissionError(f"command: {program} is not executable: chmod +x {program}")
        if self._cwd is not None and not self._cwd.is_dir():
            raise NotADirectoryError(f"cwd: {self._cwd} is not a directory")
        if signal.getsignal(signal.SIGCHLD) is signal.SIG_IGN:
            raise RuntimeError("the service was started with SIGCHLD ignored, so exit codes cannot be read")
        try:
            check_parent(self._parent)
        except OSError as error:
            raise type(error)(f"the program's directories: {_describe(error)}") from error
        sweep(self._parent)

    async def _prepare(
        self, run: SettledRun, context: Context, workdir: Workdir, keep_bytes: int
    ) -> Process | Retry | Reject:
        """Write the program's input, and download the outputs if configured."""
        document = run_document(
            run,
            event=context.event,
            idempotency_key=context.idempotency_key,
            artifacts=await context.stored(),
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
        paths = {
            "run_file": str(run_file),
            "outputs_dir": str(outputs_dir) if self._config.download else "",
        }
        variables = to_variables(document) | {
            "RUN_FILE": paths["run_file"],
            "RUN_OUTPUTS_DIR": paths["outputs_dir"],
            "RUN_HANDLER": context.handler,
            "RUN_ATTEMPT": str(context.attempt),
            "RUN_MAX_ATTEMPTS": str(context.max_attempts),
        }
        return Process(
            [self._program, *(argument.render(run, paths) for argument in self._arguments)],
            directory=self._cwd or workdir.path,
            environment=self._environ
            | {name.encode(): value.encode() for name, value in variables.items()},
            stdin=run_file,
            keep_bytes=keep_bytes,
            grace_seconds=self._config.kill_after_seconds,
        )

    async def _run(self, process: Process, workdir: Workdir, output: OutputFilter) -> Answer:
        """Run the program in a thread, which also cleans up, even if this attempt is cancelled."""

        def run() -> Exit | OSError:
            try:
                return process.run(workdir.record_program)
            except OSError as error:
                return error
            finally:
                workdir.remove()

        running = self._in_thread(run)
        try:
            result = await asyncio.shield(running)
        except asyncio.CancelledError:
            process.stop()
            await asyncio.wait({running})
            raise
        if isinstance(result, OSError):
            return self._answer_start_error(result)
        return self._answer_exit(result.code, output.to_text(result.tail, size=result.size), result.size)

    def _answer_start_error(self, error: OSError) -> Answer:
        if error.errno == errno.E2BIG:
            return Reject(f"{self._name} cannot be started: its arguments exceed the system's limit")
        hint = {
            errno.ENOENT: "; does the interpreter in its first line exist?",
            errno.ENOEXEC: "; a script must start with #! and its interpreter",
        }.get(error.errno or 0, "")
        return Retry(f"{self._name} cannot be started: {_describe(error)}{hint}")

    def _answer_exit(self, code: int | None, output: str, size: int) -> Answer:
        if code == 0:
            return Done({"exit_code": 0, "output": output, "output_bytes": size})
        excerpt = f": {output[-_MAX_REASON:]}" if output else ""
        if code is None:
            return Retry(f"{self._name}: its exit code is not known{excerpt}")
        if code < 0:
            return Retry(f"{self._name} was ended by {_signal_name(-code)}{excerpt}")
        is_rejected = code in self._config.reject_codes or (
            self._config.other_codes == "reject" and code not in self._config.retry_codes
        )
        reason = f"{self._name} ended with code {code}{excerpt}"
        return Reject(reason) if is_rejected else Retry(reason)

    @property
    def _name(self) -> str:
        return Path(self._program).name

    def _in_thread(self, function: Callable[[], T]) -> asyncio.Future[T]:
        return asyncio.get_running_loop().run_in_executor(self._threads, function)


def _find_program(program: str, path: bytes | None) -> str:
    """Resolve a program as a shell would, once: later changes of PATH have no effect."""
    directories = os.defpath if path is None else os.fsdecode(path)
    found = program if "/" in program else shutil.which(program, path=directories)
    return str(Path(found).expanduser().absolute()) if found else program


def _describe(error: OSError) -> str:
    reason = error.strerror or str(error)
    return f"{reason}: {os.fsdecode(error.filename)}" if isinstance(error.filename, str | bytes) else reason


def _signal_name(number: int) -> str:
    name = f"signal {number}"
    with suppress(ValueError):
        name = signal.Signals(number).name
    return f"{name} (out of memory?)" if number == signal.SIGKILL else name
