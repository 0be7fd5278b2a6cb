"""Listening on a Unix socket: whose entry is replaced, and whose is not."""

import os
import socket
import stat
from pathlib import Path

import pytest

from receiver.errors import ConfigError
from receiver.web.server import bind, bound_address


def open_listener(path: Path) -> socket.socket:
    (listener,) = bind(f"unix:{path}", 0)
    return listener


def refusal(path: Path, setting: str = "public") -> str:
    """Return why nothing can listen on a path."""
    with pytest.raises(ConfigError) as caught:
        bind(f"unix:{path}", 0, setting=setting)
    [problem] = caught.value.problems
    assert problem.path == f"{setting}.host"
    return problem.message


def test_its_entry_is_there_while_it_is_open(tmp_path: Path) -> None:
    """Open to every user, as a port on loopback is; the directory decides who reaches it."""
    path = tmp_path / "public.sock"
    before = os.umask(0o077)
    try:
        listener = open_listener(path)
    finally:
        os.umask(before)
    assert stat.S_ISSOCK(path.stat().st_mode)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666
    assert bound_address(listener) == (f"unix:{path}", 0)
    listener.close()
    assert not path.exists()
    listener.close()


def test_the_entry_of_a_killed_process_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "public.sock"
    left = socket.socket(socket.AF_UNIX)
    left.bind(str(path))
    left.listen()
    left.close()
    assert path.exists()
    with open_listener(path) as listener:
        listener.listen()
        with socket.socket(socket.AF_UNIX) as caller:
            caller.connect(str(path))
    assert not path.exists()


def test_the_socket_of_a_living_process_is_not_replaced(tmp_path: Path) -> None:
    """Not even where its queue is full."""
    path = tmp_path / "public.sock"
    with open_listener(path) as listener:
        listener.listen(0)
        for _ in range(3):
            assert "another process listens there" in refusal(path)
    assert not path.exists()


def test_closing_leaves_the_entry_of_a_successor(tmp_path: Path) -> None:
    path = tmp_path / "public.sock"
    first = open_listener(path)  # it does not listen yet, so it looks like a left-over
    with open_listener(path):
        first.close()
        assert path.exists()
    assert not path.exists()


def test_nothing_else_is_removed(tmp_path: Path) -> None:
    """A file, a directory, a socket of datagrams, and a link to a file."""
    file = tmp_path / "file"
    file.write_text("kept")
    assert "not a socket" in refusal(file, "operations")
    assert "not a socket" in refusal(tmp_path)
    (tmp_path / "link").symlink_to(file)
    assert "not a socket" in refusal(tmp_path / "link")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as datagrams:
        datagrams.bind(str(tmp_path / "datagrams"))
        assert refusal(tmp_path / "datagrams")
    assert file.read_text() == "kept"
    assert (tmp_path / "datagrams").exists()


def test_the_reason_is_named(tmp_path: Path) -> None:
    assert "No such file or directory" in refusal(tmp_path / "missing" / "public.sock")
    assert "too long" in refusal(tmp_path / ("x" * 200))


def test_an_abstract_socket_has_a_name() -> None:
    """Systemd can hold one: `ListenStream=@name`."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"\0flora-receiver-{os.getpid()}")
        assert bound_address(listener) == (f"unix:@flora-receiver-{os.getpid()}", 0)
