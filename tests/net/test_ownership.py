"""Who owns what is made, by root for a service user above all."""

import os
import pwd
from pathlib import Path

import pytest

from receiver.net.ownership import find_existing, make_directory, match_owner


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """Return a directory of another user; only root can make one, for anyone else it is one's own."""
    made = tmp_path / "home"
    made.mkdir()
    if os.geteuid() == 0:
        os.chown(made, pwd.getpwnam("nobody").pw_uid, 12345)
    return made


def test_directories_and_files_belong_to_the_owner_of_the_one_above(home: Path) -> None:
    make_directory(home / "a" / "b")
    file = home / "a" / "b" / "file"
    file.touch()
    match_owner(file, file.parent)
    for path in (home / "a", home / "a" / "b", file):
        assert (path.stat().st_uid, path.stat().st_gid) == (home.stat().st_uid, home.stat().st_gid)


def test_a_directory_that_exists_stays_as_it_is(tmp_path: Path) -> None:
    before = tmp_path.stat()
    make_directory(tmp_path)
    assert tmp_path.stat().st_uid == before.st_uid


def test_a_file_in_the_way_is_reported(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in ("file", "file/below"):
        with pytest.raises((FileExistsError, NotADirectoryError)):
            make_directory(tmp_path / path)


def test_what_exists_on_the_way_is_found(tmp_path: Path) -> None:
    assert find_existing(tmp_path / "a" / "b") == tmp_path
    (tmp_path / "link").symlink_to("nowhere")
    assert find_existing(tmp_path / "link" / "b") == tmp_path / "link"
