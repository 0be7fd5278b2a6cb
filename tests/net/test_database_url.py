"""How the URL of the ledger's database is read and shown: as SQLAlchemy reads it, and never a secret of it."""

from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from sqlalchemy import make_url

from receiver.net.database_url import parse_database_url, show_database_url

SERVERS = [
    ("postgresql://host/db", "postgresql://host/db"),
    ("postgresql://u:s3cr3t@host:6432/db", "postgresql://host:6432/db"),
    ("postgresql://u:s3cr3t?pw@host/db", "postgresql://host/db"),
    ("postgresql://u:s3cr3t/#pw@host/db", "postgresql://host/db"),
    ("postgresql://u:s3cr3t%40pw@[::1]:5432/db", "postgresql://[::1]:5432/db"),
    ("postgresql://u:s3cr3t@/db?host=/run/pg", "postgresql:///db"),
    ("postgresql://host/db?password=s3cr3t&sslmode=require", "postgresql://host/db"),
    ("postgresql://s3cr3t@/", "postgresql:///"),
    ("postgresql:///db?host=a:1&host=b:2", "postgresql:///db"),
    ("postgresql://u:${s3cr3t}@host/db%20x", "postgresql://host/db x"),
]


@pytest.mark.parametrize(("text", "shown"), SERVERS)
def test_a_server_is_read_as_sqlalchemy_reads_it(text: str, shown: str) -> None:
    found, theirs = parse_database_url(text), make_url(text)
    assert (found.username, found.password) == (theirs.username, theirs.password)
    assert (found.host, found.port) == (theirs.host, theirs.port)
    assert (found.name, found.options, found.path) == (theirs.database, dict(theirs.normalized_query), None)
    assert show_database_url(text) == shown
    assert "s3cr3t" not in f"{found}{found!r}"


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("sqlite:///var/receiver.db", "var/receiver.db"),
        ("sqlite:////var/lib/receiver.db", "/var/lib/receiver.db"),
        ("sqlite:///a%20b.db?mode=ro", "a b.db"),
        ("sqlite:///a@b.db", "a@b.db"),
    ],
)
def test_a_file_is_a_path(text: str, path: str) -> None:
    assert parse_database_url(text).path == Path(path)
    assert show_database_url(text) == f"sqlite:///{path}"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "must be sqlite"),
        ("mysql://u:s3cr3t@host/x", "must be sqlite"),
        ('"sqlite:///x.db"', "must be sqlite"),
        ("sqlite://x.db", "name a file"),
        ("sqlite:///", "name a file"),
        ("sqlite:////", "name a file"),
        ("sqlite:///:memory:", "name a file"),
        ("postgresql://u:s3cr3t@host:abc/x", "a port that is no number from 1 to 65535"),
        ("postgresql://u:s3cr3t@host:${PORT}/x", "has a variable in it not been replaced"),
        ("postgresql://u:s3cr3t@host:/x", "has a variable in it not been replaced"),
        ("postgresql://u:s3cr3t@host:0/x", "a port"),
        ("postgresql://u:s3cr3t@host:99999/x", "a port"),
        ("postgresql://u:s3c@r3t@host/x", "write one in a user name or a password as %40"),
        ("postgresql://u/s:s3c@r3t@host/x", "%40"),
        ("postgresql://u:s3cr3t@ho st/x", "white space"),
        ("postgresql://[::1/x", "is not a URL"),
    ],
)
def test_what_cannot_be_used_is_refused_without_its_value(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=r"^(must|has|is not)") as caught:
        parse_database_url(text)
    assert words in str(caught.value)
    assert "s3c" not in str(caught.value)
    assert show_database_url(text) == "***"


@given(st.text(st.characters(codec="utf-8"), max_size=20))
def test_any_text_is_parsed_or_refused(text: str) -> None:
    """Never another error, and what is accepted SQLAlchemy can read."""
    for url in (text, f"sqlite:///{text}", f"postgresql://{text}", f"postgresql://u:{text}@host:1/db"):
        try:
            found = parse_database_url(url)
        except ValueError:
            continue
        theirs = make_url(url)
        assert (found.password, found.host, found.port) == (theirs.password, theirs.host, theirs.port)


@given(st.text(st.characters(codec="utf-8", categories=["L", "N", "P", "S"]), min_size=4, max_size=20))
@example("00@?")  # the rest becomes the query, which is not shown
def test_no_password_is_ever_shown(password: str) -> None:
    """Whether or not it was escaped; even a part of it would be too much."""
    shown = show_database_url(f"postgresql://u:{password}S3CRET@host/db")
    assert "S3CRET" not in shown
    assert shown in {"postgresql://host/db", "postgresql://", "***"}
