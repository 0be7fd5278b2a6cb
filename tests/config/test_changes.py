"""Settings that are loaded again: what is read, what differs, what a running service takes over."""

from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr

from receiver.config import Settings, SettingsSource, find_changes, take_over
from receiver.config.changes import RELOADABLE
from receiver.errors import ConfigError
from receiver.web.certificate import load_context

BASE: dict[str, Any] = {
    "flora": {"api_key": "sk_test_1", "webhook_secrets": ["whsec_1"]},
    "workspaces": [{"id": "ws_1", "secrets": ["whsec_a"]}, {"id": "ws_2", "secrets": ["whsec_b"]}],
    "handlers": [{"use": "log", "options": {"url": "a"}}],
}


def settings(**sections: object) -> Settings:
    return Settings.model_validate({**BASE, **sections})


def source(directory: Path, **environ: str) -> SettingsSource:
    secrets = {"FLORA_API_KEY": "sk_test_1"}
    if "FLORA_WEBHOOK_SECRET_FILE" not in environ:
        secrets["FLORA_WEBHOOK_SECRET"] = "whsec_1"
    return SettingsSource(directory / "receiver.toml", secrets | environ)


def test_the_file_is_read_again_on_request_only(tmp_path: Path) -> None:
    """An edit in progress must not be taken up because a secret was rotated meanwhile."""
    file, secret = tmp_path / "receiver.toml", tmp_path / "secret"
    file.write_text("[log]\nlevel = 'error'\n")
    secret.write_text("whsec_1")
    loader = source(tmp_path, FLORA_WEBHOOK_SECRET_FILE=str(secret))
    assert loader.load().log.level == "error"
    file.write_text("[log]\nlevel = 'debug'\n")
    secret.write_text("whsec_2")
    found = loader.load(reread=False)
    assert (found.log.level, found.flora.webhook_secrets) == ("error", (SecretStr("whsec_2"),))
    assert loader.load().log.level == "debug"


def test_a_load_that_fails_is_forgotten(tmp_path: Path) -> None:
    """What was read from an unusable file does not count at the next look at the secrets."""
    file = tmp_path / "receiver.toml"
    file.write_text("[log]\nlevel = 'error'\n")
    loader = source(tmp_path)
    loader.load()
    for text in ("[log]\nlevel = 'loud'\n", "[log"):
        file.write_text(text)
        with pytest.raises(ConfigError):
            loader.load()
        assert loader.load(reread=False).log.level == "error"
    file.unlink()  # it was there at the start: its settings must not silently become the defaults
    with pytest.raises(ConfigError, match="cannot be read"):
        loader.load()


@pytest.mark.parametrize(
    ("sections", "paths"),
    [
        ({}, ()),
        ({"log": {"level": "error"}}, ("log.level",)),
        ({"flora": {"api_key": "sk_test_2", "webhook_secrets": ["whsec_1"]}}, ("flora.api_key",)),
        ({"handlers": [{"use": "log", "options": {"url": "b"}}]}, ("handlers.0.url",)),
        ({"handlers": [*BASE["handlers"], {"use": "storage"}]}, ("handlers",)),
        ({"workspaces": BASE["workspaces"][:1]}, ("workspaces",)),
        ({"public_url": "https://hooks.example.com"}, ("public_url",)),
    ],
)
def test_changes_are_named_by_their_path(sections: dict[str, object], paths: tuple[str, ...]) -> None:
    assert find_changes(settings(), settings(**sections)) == paths


def test_a_running_service_takes_over_what_is_listed_and_nothing_else() -> None:
    """What is left to differ afterwards is what needs a restart."""
    new = settings(
        flora={"api_key": "sk_test_2", "webhook_secrets": ["whsec_2"], "timeout_seconds": 5},
        workspaces=[],
        operations={"token": "t" * 20, "port": 9},
        log={"level": "error", "format": "json"},
        dispatch={"concurrency": 2},
    )
    merged = take_over(settings(), new)
    assert all(path.startswith(RELOADABLE) for path in find_changes(settings(), merged))
    assert find_changes(merged, new) == (
        "dispatch.concurrency", "flora.timeout_seconds", "log.format", "operations.port",
    )  # fmt: skip


def test_tls_is_not_turned_on_while_the_service_runs(tmp_path: Path) -> None:
    """The listeners are open as they are; other files of a pair are taken over."""
    files = [tmp_path / name for name in "abcd"]
    for file in files:
        file.touch()
    one, other = ({"cert": str(cert), "key": str(key)} for cert, key in (files[:2], files[2:]))
    assert find_changes(take_over(settings(), settings(tls=one)), settings(tls=one)) == (
        "tls.cert",
        "tls.key",
    )
    assert take_over(settings(tls=one), settings(tls=other)).tls.cert == files[2]
    assert take_over(settings(tls=one), settings()).tls.cert == files[0]
    with pytest.raises(ConfigError, match="holds no certificate"):
        load_context(files[0], files[1], ciphers="DEFAULT")
