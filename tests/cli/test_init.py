"""`init` and `dev-cert`: they overwrite nothing unless forced, and secrets are private."""

import ssl
import stat
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization

from receiver.config import describe, load_settings
from receiver.net import certificates
from tests.cli.conftest import KEYS, run_command


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_init_writes_what_serve_reads(tmp_path: Path) -> None:
    """The options and else the defaults, with the help of every setting."""
    done = run_command(
        "init", "--public-url", "https://hooks.example.com", "--storage", "files", cwd=tmp_path
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "flora-receiver check" in done.stdout
    settings, bare = load_settings(tmp_path / "receiver.toml", KEYS), load_settings(None, KEYS)
    assert settings.public_url == "https://hooks.example.com"
    assert settings.handlers[0].options == {"url": "files"}
    for section in (
        "public",
        "operations",
        "database",
        "reconcile",
        "dispatch",
        "downloads",
        "retention",
        "log",
    ):
        assert getattr(settings, section) == getattr(bare, section), section
    text = (tmp_path / "receiver.toml").read_text()
    assert {
        each.path for each in describe() if "[]" not in each.path and f"# {each.help}" not in text
    } == set()
    assert mode(tmp_path / ".env") == 0o600
    checked = run_command("check", cwd=tmp_path, env=KEYS)
    assert (checked.returncode, checked.stderr) == (0, "")


def test_the_defaults_in_the_file_are_those_of_the_settings(tmp_path: Path) -> None:
    """Removing the comment signs changes nothing."""
    run_command("init", cwd=tmp_path)
    lines = (tmp_path / "receiver.toml").read_text().splitlines()
    shown = [line.removeprefix("# ") if " = " in line and "…" not in line else line for line in lines]
    shown = [line for line in shown if not line.startswith(("id =", "secrets ="))]
    (tmp_path / "shown.toml").write_text("\n".join(shown))
    loaded: Any = load_settings(tmp_path / "shown.toml", KEYS)
    assert loaded.model_copy(update={"handlers": ()}) == load_settings(None, KEYS).model_copy(
        update={"handlers": ()}
    )


def test_init_quotes_what_it_writes(tmp_path: Path) -> None:
    """Quotes, backslashes and control characters survive in TOML."""
    odd = 'C:\\out "of" {run_id}\x7f\t#é'
    database = "postgresql://me:a%22b@db.example/x"
    done = run_command("init", "--storage", odd, "--database", database, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    settings = load_settings(tmp_path / "receiver.toml", KEYS)
    assert (settings.handlers[0].options["url"], settings.database.url) == (odd, database)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--public-url", "http://hooks.example.com"), "--public-url: must start with https://"),
        (("--public-url", "hooks.example.com"), "--public-url: must be an absolute URL"),
        (("--database", "receiver.db"), "--database: must be sqlite:///path"),
    ],
)
def test_init_refuses_what_serve_would_refuse(
    arguments: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    done = run_command("init", *arguments, cwd=tmp_path)
    assert (done.returncode, message in done.stderr) == (2, True), done.stderr
    assert list(tmp_path.iterdir()) == []
    assert run_command("init", cwd=tmp_path, env={"RECEIVER_PUBLIC__PROT": "1"}).returncode == 0


def test_init_overwrites_nothing_unless_forced(tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("FLORA_API_KEY=mine\n")
    refused = run_command("init", cwd=tmp_path)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "--force" in refused.stderr
    assert (tmp_path / ".env").read_text() == "FLORA_API_KEY=mine\n"
    assert not (tmp_path / "receiver.toml").exists()
    assert run_command("init", "--force", cwd=tmp_path).returncode == 0
    assert mode(tmp_path / ".env") == 0o600


def test_dev_cert_writes_a_certificate_of_a_local_ca(tmp_path: Path) -> None:
    """The CA is created once and kept; private keys are readable by their owner only."""
    first = run_command("dev-cert", "--host", "receiver.test", "--host", "127.0.0.1", cwd=tmp_path)
    assert (first.returncode, first.stderr) == (0, "")
    assert "nothing was installed" in first.stdout
    directory = tmp_path / "var/tls"
    ca = (directory / "ca.pem").read_bytes()
    assert {mode(directory / name) for name in ("ca.key", "server.key")} == {0o600}
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(directory / "server.pem", directory / "server.key")
    ssl.create_default_context(cafile=directory / "ca.pem")
    before = (directory / "server.pem").read_bytes()
    assert run_command("dev-cert", cwd=tmp_path).returncode == 0
    assert (directory / "ca.pem").read_bytes() == ca
    assert (directory / "server.pem").read_bytes() != before
    assert run_command("dev-cert", "--force", cwd=tmp_path).returncode == 0
    assert (directory / "ca.pem").read_bytes() != ca


def test_an_unusable_ca_is_reported(tmp_path: Path) -> None:
    """It is neither used nor overwritten unless forced."""
    certificates.save_authority(certificates.make_authority(), tmp_path / "a")
    certificates.save_authority(certificates.make_authority(), tmp_path / "b")
    (tmp_path / "a/ca.key").write_bytes((tmp_path / "b/ca.key").read_bytes())
    with pytest.raises(ValueError, match="do not belong together"):
        certificates.load_authority(tmp_path / "a")
    refused = run_command("dev-cert", "--dir", "a", cwd=tmp_path)
    assert refused.returncode == 2
    assert "--force" in refused.stderr
    assert certificates.load_authority(tmp_path / "nowhere") is None
    kept = (tmp_path / "a/ca.pem").read_bytes()
    (tmp_path / "a/ca.key").unlink()
    halved = run_command("dev-cert", "--dir", "a", cwd=tmp_path)
    assert (halved.returncode, "ca.key is missing; --force" in halved.stderr) == (2, True)
    assert (tmp_path / "a/ca.pem").read_bytes() == kept
    locked = serialization.BestAvailableEncryption(b"password")
    key = certificates.make_authority().key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, locked
    )
    (tmp_path / "b/ca.key").write_bytes(key)
    with pytest.raises(ValueError, match="has a password"):
        certificates.load_authority(tmp_path / "b")


@pytest.mark.parametrize(
    "host", ["https://hooks.test", "a b", "", "bücher.test", "hooks.test:8443", "a..b", "x" * 64]
)
def test_a_malformed_host_gets_no_certificate(host: str, tmp_path: Path) -> None:
    """It is refused, and nothing is written."""
    refused = run_command("dev-cert", "--host", host, cwd=tmp_path)
    assert (refused.returncode, "is not a host name or an address" in refused.stderr) == (2, True)
    assert list(tmp_path.iterdir()) == []
    assert run_command("dev-cert", "--host", "*.a-b.test", "--host", "::1", cwd=tmp_path).returncode == 0
