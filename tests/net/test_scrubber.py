"""What is masked in any text, and what stays."""

import pytest

from receiver.net.scrubber import is_secret_name, mask, mask_all, scrub


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("Illegal header value b'Bearer sk_live_X'", "Illegal header value b'Bearer ***'"),
        ("postgresql://u:s3cr3t?pw@host/db", "postgresql://***@host/db"),
        ("postgresql+psycopg://u:a@b#c/d@host:5432/db", "postgresql+psycopg://***@host:5432/db"),
        ("postgresql://host/db?password=s3cr3t&x=1", "postgresql://host/db?password=***&x=1"),
        ("host=db password=s3cr3t dbname=x", "host=db password=*** dbname=x"),
        ("postgresql://u:whsec_x@host/db", "postgresql://***@host/db"),
        ("https://me:pw@h.example/a@b", "https://***@h.example/a@b"),
        ("s3://bucket/run@1.png", "s3://bucket/run@1.png"),
        ("https://hooks.example.com/callbacks/flora", "https://hooks.example.com/callbacks/flora"),
        ("nothing", "nothing"),
    ],
)
def test_secrets_are_masked_and_urls_stay(text: str, shown: str) -> None:
    assert mask(text) == shown
    assert mask_all({"a": [text, 1, None], "b": {"c": text}}) == {"a": [shown, 1, None], "b": {"c": shown}}


def test_a_log_line_shows_no_path_of_a_url() -> None:
    assert scrub("no https://me:pw@h.example/a?sig=1 now") == "no https://h.example/… now"


@pytest.mark.parametrize(
    "name", ["api_key", "apiKey", "webhook_secrets", "Flora-Signature", "AWS_SECRET_ACCESS_KEY"]
)
def test_names_of_secrets(name: str) -> None:
    assert is_secret_name(name)


@pytest.mark.parametrize("name", ["allow_private_hosts", "key", "location", "token_url", "keys"])
def test_names_of_other_things(name: str) -> None:
    assert not is_secret_name(name)
