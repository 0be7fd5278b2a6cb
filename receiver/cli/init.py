"""`flora-receiver init`: writes a commented `receiver.toml` and a `.env` that nobody else can read."""

import os
import tempfile
from collections.abc import Iterator
from json import dumps
from pathlib import Path

from receiver.cli.output import print_result, report_errors
from receiver.config import Setting, describe, load_settings
from receiver.errors import ConfigError, Problem

_ENV = """# Secrets, for `set -a; . ./.env; set +a`, a container's env_file, or systemd. Never commit this file.
FLORA_API_KEY=
FLORA_WEBHOOK_SECRET=
"""
_OPTIONS = {"public_url": "--public-url", "database.url": "--database"}
_LISTS = {
    "workspaces": '# [[workspaces]]\n# id = "ws_abc"\n# secrets = ["env:FLORA_WEBHOOK_SECRET_ABC"]',
    "handlers": "",
}


def run(
    directory: Path, *, public_url: str | None, database: str | None, storage: str, force: bool, json: bool
) -> None:
    with report_errors(as_json=json):
        given = {"public_url": public_url, "database.url": database}
        text = "\n".join(_toml(given, storage)) + "\n"
        _check(text)
        files = {
            directory / "receiver.toml": (text, 0o644),
            directory / ".env": (_ENV, 0o600),
        }
        there = (
            []
            if force
            else [Problem(str(path), "is there already: --force overwrites it") for path in files if path.exists()]
        )
        if there:
            raise ConfigError(there)
        for path, (text, mode) in files.items():
            _write(path, text, mode)
        told = (
            f"Wrote {' and '.join(map(str, files))}.\nNext: put FLORA_API_KEY and FLORA_WEBHOOK_SECRET into .env, then\n\n"
            "  set -a; . ./.env; set +a\n  flora-receiver check\n  flora-receiver serve"
        )
        print_result({"files": [str(path) for path in files]}, told, as_json=json)


def _check(text: str) -> None:
    """Read it as `serve` would. Raises ConfigError that names the option which cannot be used."""
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch, "receiver.toml")
        file.write_text(text, "utf-8")
        try:
            load_settings(file, os.environ, need_secrets=False)
        except ConfigError as error:
            wrong = [Problem(_OPTIONS[each.path], each.message) for each in error.problems if each.path in _OPTIONS]
            if wrong:  # what else is wrong stands in the environment
                raise ConfigError(wrong) from error


def _write(path: Path, text: str, mode: int) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)  # an older file would keep its wider mode
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "w", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise ConfigError([Problem(str(path), f"cannot be written: {error.strerror}")]) from error


def _toml(given: dict[str, str | None], storage: str) -> Iterator[str]:
    """Every setting with its help and default, commented out unless it is given: what is commented out holds anyway."""
    yield "# Settings of flora-receiver. What is commented out is the default. Secrets belong into .env."
    section = ""
    for setting in describe():
        name, _, key = setting.path.rpartition(".")
        if name.endswith("[]"):
            continue
        if name != section:
            section = name
            yield f"\n[{section}]"
        yield from _line(setting, key, given.get(setting.path))
    yield "\n# Several workspaces, each with its secrets:"
    yield _LISTS["workspaces"]
    yield "\n# What becomes of settled runs; `flora-receiver handlers show NAME` lists a handler's options."
    yield f'[[handlers]]\nuse = "storage"\nurl = {_quoted(storage)}\n\n[[handlers]]\nuse = "log"'


def _line(setting: Setting, key: str, given: str | None) -> Iterator[str]:
    yield f"# {setting.help}"
    if given is not None:
        yield f"{key} = {_quoted(given)}"
    else:
        yield f"# {key} = {setting.default or '…'}"


def _quoted(text: str) -> str:
    """Return a TOML string: it has JSON's escapes, and DEL must not stand in it as it is."""
    return dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
