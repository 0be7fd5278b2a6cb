"""`flora-receiver init`: writes a commented `receiver.toml`, and a `.env` with mode 0600."""

import os
import tempfile
from collections.abc import Iterator
from json import dumps
from pathlib import Path

from receiver.cli.output import print_result, report_errors
from receiver.config import Setting, describe, load_settings
from receiver.errors import ConfigError, Problem
from receiver.net.ownership import make_directory, match_owner

_ENV = """# Secrets, for `set -a; . ./.env; set +a`, the env_file of a container, or systemd.
# Never commit this file.
FLORA_API_KEY=
FLORA_WEBHOOK_SECRET=
"""
_HEAD = """# Settings of flora-receiver. Lines that are commented out show the defaults.
# Secrets belong into .env."""
_TAIL = """
# Several workspaces, each with its secrets:
# [[workspaces]]
# id = "ws_abc"
# secrets = ["env:FLORA_WEBHOOK_SECRET_ABC"]

# What to do with settled runs. `flora-receiver handlers show NAME` lists the options of a handler.
[[handlers]]
use = "storage"
url = {storage}

[[handlers]]
use = "log"
"""
_OPTIONS = {"public_url": "--public-url", "database.url": "--database"}


def run(
    directory: Path,
    *,
    public_url: str | None,
    database: str | None,
    storage: str,
    force: bool,
    json: bool,
) -> None:
    with report_errors(as_json=json):
        text = _to_toml({"public_url": public_url, "database.url": database}, storage)
        _check(text)
        toml, env = directory / "receiver.toml", directory / ".env"
        existing = [] if force else [path for path in (toml, env) if path.exists()]
        if existing:
            message = "already exists; --force overwrites it"
            raise ConfigError([Problem(str(path), message) for path in existing])
        _write(toml, text, 0o644)
        _write(env, _ENV, 0o600)
        message = (
            f"Wrote {toml} and {env}.\n"
            "Next, set FLORA_API_KEY and FLORA_WEBHOOK_SECRET in .env. Then run:\n\n"
            "  set -a; . ./.env; set +a\n  flora-receiver check\n  flora-receiver serve"
        )
        print_result({"files": [str(toml), str(env)]}, message, as_json=json)


def _check(text: str) -> None:
    """Load the file as `serve` would. Raises ConfigError for an option that cannot be used."""
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch, "receiver.toml")
        file.write_text(text, "utf-8")
        try:
            load_settings(file, os.environ, need_secrets=False)
        except ConfigError as error:
            problems = [
                Problem(_OPTIONS[each.path], each.message)
                for each in error.problems
                if each.path in _OPTIONS
            ]
            if problems:  # all others come from the environment, not from this file
                raise ConfigError(problems) from error


def _write(path: Path, text: str, mode: int) -> None:
    try:
        make_directory(path.parent)
        path.unlink(missing_ok=True)  # an existing file would keep its own mode
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            match_owner(handle, path.parent)
            file.write(text)
    except OSError as error:
        message = f"cannot be written: {error.strerror}"
        raise ConfigError([Problem(str(path), message)]) from error


def _to_toml(values: dict[str, str | None], storage: str) -> str:
    """Return the file: every setting with its help, commented out unless `values` has it."""
    return "\n".join([_HEAD, *_setting_lines(values), _TAIL.format(storage=_quote(storage))])


def _setting_lines(values: dict[str, str | None]) -> Iterator[str]:
    section = ""
    for setting in describe():
        name, _, key = setting.path.rpartition(".")
        if name.endswith("[]") or setting.path in {"workspaces", "handlers"}:
            continue
        if name != section:
            section = name
            yield f"\n[{section}]"
        yield from _lines_of(setting, key, values.get(setting.path))


def _lines_of(setting: Setting, key: str, value: str | None) -> Iterator[str]:
    yield f"# {setting.help}"
    if value is not None:
        yield f"{key} = {_quote(value)}"
    else:
        yield f"# {key} = {setting.default or '…'}"


def _quote(text: str) -> str:
    """Return a TOML string. TOML has the escapes of JSON, and also requires one for DEL."""
    return dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
