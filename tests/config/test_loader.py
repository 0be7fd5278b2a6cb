"""What `load_settings` accepts, what it refuses and how, and that no secret is shown."""

import json
import re
from collections.abc import Mapping
from pathlib import Path

import pytest

from receiver.config import Settings, describe, environment_variables, load_settings, redact
from receiver.config.callback_url import check_callback_url
from receiver.errors import ConfigError
from receiver.model import Event, When
from receiver.net.addresses import is_loopback
from receiver.net.scrubber import is_secret_name
from receiver.service.wiring import to_callback_url

KEY = "sk_live_0123456789"
SECRET = "whsec_abcdef"
BASE = {"FLORA_API_KEY": KEY, "FLORA_WEBHOOK_SECRET": SECRET}


@pytest.fixture(autouse=True)
def _empty_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run where there is no receiver.toml."""
    monkeypatch.chdir(tmp_path)


def settings(toml: str = "", environ: Mapping[str, str] = BASE) -> Settings:
    Path("given.toml").write_text(toml, "utf-8")
    return load_settings(Path("given.toml"), environ)


def problems(toml: str = "", environ: Mapping[str, str] = BASE) -> dict[str, str]:
    with pytest.raises(ConfigError) as caught:
        settings(toml, environ)
    return {problem.path: problem.message for problem in caught.value.problems}


def test_two_variables_are_enough() -> None:
    """With FLORA's two variables, everything else has a default."""
    found = load_settings(None, BASE)
    assert found.database.url == "sqlite:///var/receiver.db"
    assert [(handler.name, handler.options) for handler in found.handlers] == [
        ("storage", {"url": "outputs"}),
        ("log", {}),
    ]
    assert found.secrets_by_workspace() == ((SECRET, None),)
    assert found.api_key_for(None) == found.api_key_for("ws_any") == KEY
    assert (found.public.host, found.public.port) == ("0.0.0.0", 8080)
    assert (found.operations.host, found.operations.port) == ("127.0.0.1", 8081)
    assert found.find_warnings() == []


def test_the_file_is_the_argument_else_the_variable_else_receiver_toml() -> None:
    for name, port in (("argument.toml", 1), ("variable.toml", 2), ("receiver.toml", 3)):
        Path(name).write_text(f"[public]\nport = {port}", "utf-8")
    named = BASE | {"RECEIVER_CONFIG": "variable.toml"}
    assert load_settings(Path("argument.toml"), named).public.port == 1
    assert load_settings(None, named).public.port == 2
    assert load_settings(None, BASE).public.port == 3


def test_the_documented_file_is_accepted() -> None:
    """It has every kind of table; a handler's own keys become its options."""
    found = settings(
        """
        public_url = "https://hooks.example.com/"
        [database]
        url = "sqlite:////var/lib/receiver.db"
        [[workspaces]]
        id = "ws_abc"
        secrets = ["env:FLORA_WEBHOOK_SECRET_ABC"]
        [[handlers]]
        use = "storage"
        name = "originals"
        when = { status = "completed", technique_id = ["cctv-cam"], output_type = ["imageUrl"] }
        on = "settled"
        max_attempts = 3
        url = "s3://bucket/prefix"
        key = "{run_id}{ext}"
        options = { deep = true }
        [[handlers]]
        use = "package.module:Class"
        """,
        BASE | {"FLORA_WEBHOOK_SECRET_ABC": "whsec_abc"},
    )
    originals, own = found.handlers
    assert found.public_url == "https://hooks.example.com"
    assert originals.when == When(
        status=("completed",), technique_id=("cctv-cam",), output_type=("imageUrl",)
    )
    assert originals.on == (Event.SETTLED,)
    assert originals.max_attempts == 3
    assert originals.options == {
        "url": "s3://bucket/prefix",
        "key": "{run_id}{ext}",
        "options": {"deep": True},
    }
    assert (own.name, own.when, own.on, own.max_attempts) == ("package.module.class", None, None, None)
    assert found.secrets_by_workspace() == ((SECRET, None), ("whsec_abc", "ws_abc"))


@pytest.mark.parametrize(
    ("environ", "path", "value"),
    [
        ({"RECEIVER_PUBLIC__PORT": "9000"}, "public.port", 9000),
        ({"RECEIVER_PUBLIC__PORT": ""}, "public.port", 1234),
        ({"RECEIVER_PUBLIC_URL": "https://a.example/x/"}, "public_url", "https://a.example/x"),
        ({"RECEIVER_OPERATIONS__ALLOW_PLAINTEXT": "true"}, "operations.allow_plaintext", True),
        ({"RECEIVER_RECONCILE__LADDER_SECONDS": "0,1, 2.5"}, "reconcile.ladder_seconds", (0, 1, 2.5)),
        ({"RECEIVER_RECONCILE__LADDER_SECONDS": "[0, 7]"}, "reconcile.ladder_seconds", (0, 7)),
        (
            {"RECEIVER_DOWNLOADS__ALLOW_PRIVATE_HOSTS": "a:1,b:2"},
            "downloads.allow_private_hosts",
            ("a:1", "b:2"),
        ),
        ({"RECEIVER_FLORA__TOLERANCE_PAST_SECONDS": "off"}, "flora.tolerance_past_seconds", None),
        ({"RECEIVER_FLORA__TOLERANCE_PAST_SECONDS": "0"}, "flora.tolerance_past_seconds", 0),
        ({"RECEIVER_LOG__LEVEL": "DEBUG"}, "log.level", "debug"),
        ({"RECEIVER_PUBLIC__HOST": "unix:/run/public.sock"}, "public.host", "unix:/run/public.sock"),
        # no token and no TLS are needed there, as on loopback
        ({"RECEIVER_OPERATIONS__HOST": "unix:/run/ops.sock"}, "operations.host", "unix:/run/ops.sock"),
        ({"FLORA_BASE_URL": "http://127.0.0.1:9000/v1"}, "flora.base_url", "http://127.0.0.1:9000/v1"),
    ],
)
def test_the_environment_overrides_the_file(environ: Mapping[str, str], path: str, value: object) -> None:
    found: object = settings("[public]\nport = 1234", {**BASE, **environ})
    for part in path.split("."):
        found = getattr(found, part)
    assert found == value


def test_several_webhook_secrets_are_given_while_one_is_rotated() -> None:
    found = load_settings(None, BASE | {"FLORA_WEBHOOK_SECRET": "whsec_new, whsec_old"})
    assert found.secrets_by_workspace() == (("whsec_new", None), ("whsec_old", None))


@pytest.mark.parametrize("separator", [",", ", ", ";", "; ", "\n", "\r\n", "\n\n", ",\n"])
def test_secrets_may_be_separated_in_any_usual_way(separator: str) -> None:
    """In a variable, in a file, and in one text of receiver.toml."""
    both = (("whsec_new", None), ("whsec_old", None))
    text = f"whsec_new{separator}whsec_old"
    Path("secrets").write_text(f"{text}\n", "utf-8", newline="")
    in_file = {"FLORA_API_KEY": KEY, "FLORA_WEBHOOK_SECRET_FILE": "secrets"}
    assert load_settings(None, BASE | {"FLORA_WEBHOOK_SECRET": text}).secrets_by_workspace() == both
    assert load_settings(None, in_file).secrets_by_workspace() == both
    toml = f"[flora]\nwebhook_secrets = {json.dumps(text)}"
    assert settings(toml, {"FLORA_API_KEY": KEY}).secrets_by_workspace() == both


def test_a_byte_order_mark_at_the_beginning_of_a_file_is_taken_off() -> None:
    """Notepad and PowerShell write one, in front of settings and of keys."""
    Path("bom.toml").write_text("[public]\nport = 1234", "utf-8-sig")
    Path("key").write_text(f"{KEY}\n", "utf-8-sig")
    found = load_settings(Path("bom.toml"), {"FLORA_API_KEY_FILE": "key", "FLORA_WEBHOOK_SECRET": SECRET})
    assert (found.public.port, found.api_key_for(None)) == (1234, KEY)


@pytest.mark.parametrize("content", [b"= 1", b"\xff\xfea\x00", None])
def test_nothing_is_said_about_the_content_of_a_file_that_cannot_be_read(content: bytes | None) -> None:
    """The secrets may be in it."""
    if content is not None:
        Path("broken.toml").write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        load_settings(Path("broken.toml"), {"RECEIVER_OPERATIONS__HOST": "0.0.0.0"})
    assert [problem.path for problem in caught.value.problems] == ["broken.toml"]


@pytest.mark.parametrize("end", ["/callbacks/flora", "/callbacks/flora/"])
def test_a_public_url_with_the_callback_path_loses_it(end: str) -> None:
    """Else FLORA would be given the path twice; a warning says so."""
    found = load_settings(None, BASE | {"RECEIVER_PUBLIC_URL": f"https://hooks.example.com/a{end}"})
    assert found.public_url == "https://hooks.example.com/a"
    assert to_callback_url(found.public_url) == "https://hooks.example.com/a/callbacks/flora"
    [warning] = found.find_warnings()
    assert (warning.path, "https://hooks.example.com/a/callbacks/flora" in warning.message) == (
        "public_url",
        True,
    )
    assert found.model_copy(update={"log": found.log}).find_warnings() == [warning]


def test_handlers_and_workspaces_can_come_from_the_environment_as_json() -> None:
    handlers = '[{"use": "log", "name": "quiet", "level": "debug"}]'
    found = load_settings(None, BASE | {"RECEIVER_HANDLERS": handlers})
    assert [(each.name, each.options) for each in found.handlers] == [("quiet", {"level": "debug"})]


def test_a_secret_is_read_from_a_file_without_its_newline() -> None:
    Path("secret").write_text(f"{SECRET}\n")
    Path("key").write_text(f"{KEY}\r\n")
    found = load_settings(None, {"FLORA_API_KEY_FILE": "key", "FLORA_WEBHOOK_SECRET_FILE": "secret"})
    assert found.secrets_by_workspace() == ((SECRET, None),)
    assert found.api_key_for(None) == KEY


def test_a_workspace_has_its_own_secrets_and_key() -> None:
    Path("two").write_text("whsec_two\n")
    toml = """
        [[workspaces]]
        id = "ws_1"
        secrets = ["env:ONE", "file:two"]
        api_key = "env:KEY_ONE"
    """
    found = settings(toml, {"ONE": "whsec_one", "KEY_ONE": "sk_test_1"})
    assert found.secrets_by_workspace() == (("whsec_one", "ws_1"), ("whsec_two", "ws_1"))
    assert (found.api_key_for("ws_1"), found.api_key_for("ws_2")) == ("sk_test_1", None)


WORKSPACE = '[[workspaces]]\nid = "ws_1"\nsecrets = ["whsec_1"]\n'


@pytest.mark.parametrize(
    ("toml", "environ", "path", "words"),
    [
        ("colour = 1", {}, "colour", "not a setting"),
        ("[public]\nprt = 1", {}, "public.prt", "did you mean port"),
        ("[publik]\nport = 1", {}, "publik", "did you mean public"),
        ("public = 1", {}, "public", "must be a table"),
        ("handlers = 1", {}, "handlers", "must be a list"),
        ("[public]\nport = 65536", {}, "public.port", "less than or equal to 65535"),
        ("[public]\nhost = 'unix:public.sock'", {}, "public.host", "absolute path"),
        ("[public]\nhost = '/run/public.sock'", {}, "public.host", "unix:/path"),
        ("[operations]\nhost = 'http://127.0.0.1'", {}, "operations.host", "must be an address"),
        (f"[operations]\nhost = 'unix:/{'x' * 107}'", {}, "operations.host", "at most 107 bytes"),
        (
            "[flora]\ntolerance_past_seconds = -1",
            {},
            "flora.tolerance_past_seconds",
            "greater than or equal",
        ),
        ("[reconcile]\nladder_seconds = []", {}, "reconcile.ladder_seconds", "empty"),
        ("[reconcile]\nmax_gap_seconds = inf", {}, "reconcile.max_gap_seconds", "finite"),
        ("[tls]\ncert = 'given.toml'", {}, "tls", "both"),
        ("[tls]\ncert = 'no.pem'\nkey = 'given.toml'", {}, "tls.cert", "does not exist"),
        ("[database]\nurl = 'mysql://x'", {}, "database.url", "sqlite:///"),
        ("[database]\nurl = 'sqlite://'", {}, "database.url", "name a file"),
        ("[database]\nurl = 'postgresql://u:p@host:abc/x'", {}, "database.url", "a port that is no number"),
        (
            "[database]\nlisten_url = 'postgresql://u:p@host:${PORT}/x'",
            {},
            "database.listen_url",
            "been replaced",
        ),
        ("[database]\nlisten_url = 'sqlite:///x.db'", {}, "database.listen_url", "postgresql://"),
        ("[flora]\nbase_url = 'http://app.flora.ai'", {}, "flora.base_url", "must be https"),
        ("[flora]\nbase_url = 'https://me@app.flora.ai'", {}, "flora.base_url", "user name"),
        ("public_url = 'http://hooks.example.com'", {}, "public_url", "HTTPS"),
        ("public_url = 'https://localhost'", {}, "public_url", "local"),
        ("public_url = 'https://10.0.0.8:8443'", {}, "public_url", "private"),
        ("public_url = 'hooks.example.com'", {}, "public_url", "absolute URL"),
        ("public_url = 'https://h.example/?a=b'", {}, "public_url", "query"),
        ("[operations]\nhost = '0.0.0.0'", {}, "operations.token", "RECEIVER_OPS_TOKEN"),
        ("[operations]\nhost = '0.0.0.0'\ntoken = 't'", {}, "operations.host", "[tls]"),
        ("[[handlers]]\nname = 'x'", {}, "handlers.0.use", "required"),
        ("[[handlers]]\nuse = 'log'\nname = 'A b'", {}, "handlers.0.name", "pattern"),
        (
            "[[handlers]]\nuse = 'log'\n[[handlers]]\nuse = 'log'",
            {},
            "handlers",
            "two handlers are called log",
        ),
        ("[[handlers]]\nuse = 'log'\non = 'done'", {}, "handlers.0.on.0", "settled"),
        ("[[handlers]]\nuse = 'log'\non = []", {}, "handlers.0.on", "empty"),
        ("[[handlers]]\nuse = 'log'\nwhen = {state = 'x'}", {}, "handlers.0.when.state", "not a setting"),
        (
            "[[handlers]]\nuse = 'log'\nwhen = {status = 'done'}",
            {},
            "handlers.0.when.status.0",
            "completed",
        ),
        ("[[workspaces]]\nid = 'ws_1'", {}, "workspaces.0.secrets", "required"),
        ("[[workspaces]]\nid = 'ws_1'\nsecrets = []", {}, "workspaces.0.secrets", "empty"),
        (
            "[[workspaces]]\nid = 'ws_1'\nsecrets = ['env:NO']",
            {},
            "workspaces.0.secrets.0",
            "NO is not set",
        ),
        (
            "[[workspaces]]\nid = 'ws_1'\nsecrets = ['file:no']",
            {},
            "workspaces.0.secrets.0",
            "cannot be read",
        ),
        (WORKSPACE + WORKSPACE, {}, "workspaces", "same `id`"),
        (WORKSPACE + WORKSPACE.replace("ws_1", "ws_2"), {}, "workspaces", "same secret"),
        ("", {"FLORA_API_KEY": f"{KEY}\n"}, "flora.api_key", "white space"),
        ("", {"FLORA_WEBHOOK_SECRET": f" {SECRET}"}, "flora.webhook_secrets.0", "white space"),
        ("", {"FLORA_API_KEY": " "}, "flora.api_key", "empty"),
        ("", {"FLORA_API_KEY": ""}, "flora.api_key", "set FLORA_API_KEY"),
        ("", {"FLORA_WEBHOOK_SECRET": ""}, "flora.webhook_secrets", "set FLORA_WEBHOOK_SECRET"),
        ("", {"FLORA_API_KEY_FILE": "given.toml"}, "FLORA_API_KEY", "set twice"),
        ("", {"FLORA_API_KEY": "", "FLORA_API_KEY_FILE": "no"}, "FLORA_API_KEY_FILE", "cannot be read"),
        ("", {"RECEIVER_FLORA__API_KEY": KEY}, "flora.api_key", "set twice"),
        ("", {"RECEIVER_PUBLIC__PORT": "x"}, "public.port", "set by RECEIVER_PUBLIC__PORT"),
        ("", {"RECEIVER_PUBLIC__PRT": "1"}, "RECEIVER_PUBLIC__PRT", "did you mean RECEIVER_PUBLIC__PORT"),
        ("", {"RECEIVER_NO__THING": "1"}, "RECEIVER_NO__THING", "not a setting"),
        ("", {"RECEIVER_PUBLIC_PORT": "1"}, "RECEIVER_PUBLIC_PORT", "did you mean RECEIVER_PUBLIC__PORT"),
        ("", {"RECEIVER_PUBLICURL": "x"}, "RECEIVER_PUBLICURL", "did you mean RECEIVER_PUBLIC_URL"),
        ("", {"FLORA_WEBHOOK_SECRETS": "x"}, "FLORA_WEBHOOK_SECRETS", "did you mean FLORA_WEBHOOK_SECRET?"),
        ("a = ]", {}, "given.toml", "not valid TOML (at line 1, column 5)"),
        ("", {"FLORA_API_KEY": f'"{KEY}"'}, "flora.api_key", "a quotation mark"),
        ("", {"FLORA_WEBHOOK_SECRET": f"'{SECRET}'"}, "flora.webhook_secrets.0", "a quotation mark"),
        ("", {"FLORA_WEBHOOK_SECRET": f"{SECRET}\u201d"}, "flora.webhook_secrets.0", "U+201D"),
        ("", {"FLORA_API_KEY": f"\ufeff{KEY}"}, "flora.api_key", "byte order mark"),
        ("", {"FLORA_API_KEY": "sk_live_\u200b1"}, "flora.api_key", "U+200B"),
        ("", {"FLORA_API_KEY": f"{KEY}\n# made today"}, "flora.api_key", "a line break"),
        ("", {"FLORA_API_KEY": f"{KEY},{KEY}"}, "flora.api_key", "more than one"),
        ("", {"FLORA_WEBHOOK_SECRET": f"{SECRET} whsec_2"}, "flora.webhook_secrets.0", "with commas"),
        ("", {"FLORA_WEBHOOK_SECRET": f"{SECRET}|whsec_2"}, "flora.webhook_secrets.0", "more than one"),
        ("", {"FLORA_WEBHOOK_SECRET": f"{SECRET}\n# of today"}, "flora.webhook_secrets.1", "white space"),
        ("", {"RECEIVER_OPS_TOKEN": "a b"}, "operations.token", "white space"),
        ("", {"RECEIVER_OPS_TOKEN": "schlüssel"}, "operations.token", "not ASCII (U+00FC)"),
        (
            WORKSPACE.replace("whsec_1", "env:TWO"),
            {"TWO": "whsec_1,whsec_2"},
            "workspaces.0.secrets.0",
            "more than",
        ),
        (WORKSPACE + "api_key = '“sk_live_1”'", {}, "workspaces.0.api_key", "U+201C"),
    ],
)
def test_a_mistake_is_one_problem_with_its_path(
    toml: str, environ: Mapping[str, str], path: str, words: str
) -> None:
    """No other rule repeats it."""
    found = problems(toml, {**BASE, **environ})
    assert list(found) == [path]
    assert words in found[path]


def test_every_mistake_is_reported_at_once() -> None:
    """Those of the sources, of sections and between sections."""
    found = problems(
        "public_url = 'https://x.local'\n[public]\nport = 'a'\n[dispatch]\nconcurrency = 0\n[log]\nlevel = 'loud'",
        {"RECEIVER_OPERATIONS__HOST": "0.0.0.0", "RECEIVER_PUBLIC__HOSTS": "x"},
    )
    assert set(found) == {
        "RECEIVER_PUBLIC__HOSTS",
        "public.port",
        "dispatch.concurrency",
        "log.level",
        "public_url",
        "operations.token",
        "flora.api_key",
        "flora.webhook_secrets",
    }


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("RECEIVER_SERVICE_HOST", "10.0.0.1"),
        ("RECEIVER_SERVICE_PORT_HTTP", "80"),
        ("RECEIVER_PORT", "tcp://10.0.0.1:80"),
        ("RECEIVER_PORT_8080_TCP_ADDR", "10.0.0.1"),
        ("RECEIVER_PUBLIC_PORT", "tcp://10.0.0.1:80"),
        ("RECEIVER_OPS_URL", "http://127.0.0.1:8081"),
        ("FLORA_WEBHOOK_SECRET_ABC", "whsec_of_a_workspace"),
        ("FLORA_WORKSPACE", "ws_1"),
        ("FLORA", "x"),
    ],
)
def test_variables_of_other_programs_are_ignored(name: str, value: str) -> None:
    assert load_settings(None, {**BASE, name: value}) == load_settings(None, BASE)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "localhost", "::1"])
def test_an_emulator_on_loopback_may_call_any_address(host: str) -> None:
    name = f"[{host}]" if ":" in host else host
    found = settings(
        f"public_url = 'http://127.0.0.1:8080'\n[flora]\nbase_url = 'http://{name}:9000/api/v1'"
    )
    assert found.public_url == "http://127.0.0.1:8080"


@pytest.mark.parametrize(
    ("toml", "environ"),
    [
        ("token = 't'\nallow_plaintext = true", {}),
        ("allow_plaintext = true", {"RECEIVER_OPS_TOKEN": "t"}),
        ("token = 't'\n[tls]\ncert = 'given.toml'\nkey = 'given.toml'", {}),
    ],
)
def test_operations_may_leave_loopback_with_token_and_tls(toml: str, environ: Mapping[str, str]) -> None:
    assert settings(f"[operations]\nhost = '0.0.0.0'\n{toml}", {**BASE, **environ}).operations.token


def test_commands_that_do_not_use_flora_need_no_secrets() -> None:
    assert load_settings(None, {}, need_secrets=False).flora.api_key is None


def test_odd_but_usable_values_are_warnings() -> None:
    environ = {"FLORA_API_KEY": "live_x", "FLORA_WEBHOOK_SECRET": "whsec_a,b"}
    found = settings("[flora]\ntolerance_past_seconds = 300", environ).find_warnings()
    assert [problem.path for problem in found] == [
        "flora.api_key",
        "flora.webhook_secrets.1",
        "flora.tolerance_past_seconds",
    ]


def test_filters_and_waits_that_never_match_are_warnings() -> None:
    """They are allowed, and would have no effect that is visible."""
    toml = """
[[handlers]]
use = "storage"
when = { output_type = ["imageUrl", "image"], run_type = "technique" }
[[handlers]]
use = "notify"
when = { run_type = "tecnique" }
wait_for = ["storage", "storag", "notify"]
[[handlers]]
use = "mine:Own"
wait_for = 5
"""
    assert [str(each.path) for each in settings(toml, BASE).find_warnings()] == [
        "handlers.0.when.output_type",
        "handlers.1.when.run_type",
        "handlers.1.wait_for",
        "handlers.1.wait_for",
    ]


LEAK = "whsec_LEAK"


@pytest.mark.parametrize(
    ("toml", "environ"),
    [
        (f"[public]\nport = '{LEAK}'", {}),
        (f"[flora]\napi_key = ['{LEAK}']", {}),
        (f"[flora]\nwebhook_secrets = {{a = '{LEAK}'}}", {}),
        (f"[flora]\nwebhook_secrets = ['{LEAK} ']", {}),
        (f"[flora]\nwebhook_secrets = ['{LEAK}", {}),
        (f"[flora]\napi_key = file:{LEAK}", {}),
        (f"[flora]\napi_key = 'file:{LEAK}'", {}),
        (f"[flora]\nbase_url = 'ftp://{LEAK}'", {}),
        (f"[tls]\nkey = '{LEAK}'\ncert = '{LEAK * 1000}'", {}),
        (f"[log]\nlevel = '{LEAK}'", {}),
        (f"[[handlers]]\nuse = 'log'\nname = '{LEAK}!'", {}),
        (f"[[workspaces]]\nid = 'ws_1'\nsecrets = ['{LEAK}', '{LEAK}']", {}),
        (f"[database]\nurl = 'postgres://u:{LEAK}@h/d'", {}),
        ("", {"FLORA_WEBHOOK_SECRET": f"[{{{LEAK}"}),
        ("", {"FLORA_API_KEY": f"{LEAK}\n"}),
        ("", {"FLORA_API_KEY_FILE": LEAK}),
        ("", {"RECEIVER_HANDLERS": f"[{{{LEAK}"}),
    ],
)
def test_a_mistake_never_shows_the_value(toml: str, environ: Mapping[str, str]) -> None:
    Path("given.toml").write_text(toml, "utf-8")
    with pytest.raises(ConfigError) as caught:
        load_settings(Path("given.toml"), environ)
    assert LEAK not in str(caught.value)
    assert caught.value.__cause__ is None


def test_neither_repr_nor_redact_shows_a_secret() -> None:
    found = settings(
        f"""
        [operations]
        token = "{LEAK}"
        [database]
        url = "postgresql://user:{LEAK}@db/receiver"
        [[workspaces]]
        id = "ws_1"
        secrets = ["{LEAK}"]
        api_key = "{LEAK}"
        [[handlers]]
        use = "forward"
        url = "https://me:{LEAK}@example.com/x"
        secret = "{LEAK}"
        headers = {{ Authorization = "Bearer {LEAK}" }}
        """,
    )
    shown = redact(found)
    assert LEAK not in repr(shown)
    assert LEAK not in repr(found.model_copy(update={"handlers": ()}))
    assert shown["database"]["url"] == "postgresql://db/receiver"
    assert shown["public"]["port"] == 8080


def test_a_setting_is_hidden_if_it_is_a_secret_and_shown_otherwise() -> None:
    """Its type says so; the names agree with it."""
    plain = [setting for setting in describe() if "[]" not in setting.path]
    hidden = {setting.path for setting in plain if is_secret_name(setting.path.rpartition(".")[2])}
    assert hidden == {setting.path for setting in plain if "secret" in setting.type}
    shown = redact(settings("[downloads]\nallow_private_hosts = ['10.0.0.1:80']"))
    assert shown["downloads"]["allow_private_hosts"] == ["10.0.0.1:80"]


def test_every_setting_has_a_help_text() -> None:
    for setting in describe():
        assert setting.help.endswith("."), setting.path


def test_every_setting_of_a_section_can_come_from_the_environment() -> None:
    """Also every new one, by the same rule for its name."""
    paths = {".".join(variable.path) for variable in environment_variables().values()}
    assert {setting.path for setting in describe() if "[]" not in setting.path} <= paths
    assert all(re.fullmatch(r"(RECEIVER|FLORA)_[A-Z_]+", name) for name in environment_variables())


@pytest.mark.parametrize(
    "url",
    [
        "https://printer.local/x",
        "https://api.internal",
        "https://LOCALHOST",
        "https://localhost.",
        "https://metadata.google.internal",
        "https://metadata.goog",
        "https://169.254.169.254/latest",
        "https://192.168.1.1",
        "https://[::1]:8443",
        "https://[fe80::1]",
        "https://[::ffff:10.0.0.1]",
        "https://224.0.0.1",
    ],
)
def test_flora_refuses_to_call(url: str) -> None:
    assert check_callback_url(url)


@pytest.mark.parametrize(
    "url", ["https://hooks.example.com/a", "https://8.8.8.8:8443", "https://local.example.com"]
)
def test_flora_calls(url: str) -> None:
    assert check_callback_url(url) is None


@pytest.mark.parametrize("host", ["0.0.0.0", "10.0.0.1", "localhost.example.com", "", "::"])
def test_an_address_that_others_can_reach_is_not_loopback(host: str) -> None:
    assert not is_loopback(host)


def test_a_proxy_is_a_url_or_a_reference_to_one() -> None:
    """It may hold a password, so it is never shown; what cannot be used is refused at the start."""
    environ = {**BASE, "HTTPS_PROXY": "http://user:hunter2@proxy.test:3128"}
    found = settings("[flora]\nproxy = 'env:HTTPS_PROXY'\n[downloads]\nproxy = 'proxy.test:3128'", environ)
    assert found.flora.proxy == environ["HTTPS_PROXY"]
    assert "hunter2" not in f"{found!r}{redact(found)}"
    assert redact(found)["downloads"]["proxy"] == "http://proxy.test:3128"
    assert settings("", environ).flora.proxy is None
    with pytest.raises(ConfigError) as caught:
        settings("[flora]\nproxy = 'socks5://user:hunter2@proxy.test:1080'")
    [problem] = caught.value.problems
    assert (problem.path, problem.message) == (
        "flora.proxy",
        "must be an HTTP proxy; SOCKS is not supported",
    )


@pytest.mark.parametrize("value", ["127.0.0.1", "http://127.0.0.1:9100", "::1:9100"])
def test_private_hosts_are_pairs_of_host_and_port(value: str) -> None:
    """Found with the other mistakes, not by a traceback of `serve`."""
    with pytest.raises(ConfigError, match=r"downloads\.allow_private_hosts: must be host:port pairs"):
        settings(f'[downloads]\nallow_private_hosts = ["{value}"]', BASE)
