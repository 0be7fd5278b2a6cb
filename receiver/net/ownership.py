"""Who owns what is made: as root, the owner of the directory above, who has to work with it later.

An administrator runs `migrate`, `init` or a backup as root in the directory of a service user. What
root makes there would otherwise be closed to the service.
"""

import contextlib
import os
from pathlib import Path

__all__ = ["find_existing", "make_directory", "match_owner"]


def match_owner(file: int | Path, directory: Path) -> None:
    """As root, give a file to the owner of its directory; as anyone else, do nothing."""
    if os.geteuid() != 0:
        return
    owner = directory.stat()
    if owner.st_uid != 0 or owner.st_gid != 0:
        with contextlib.suppress(
            OSError
        ):  # root without that right, or an owner outside this user namespace
            os.chown(file, owner.st_uid, owner.st_gid)


def make_directory(path: Path, mode: int = 0o777) -> None:
    """Make a directory and those above it that are missing, each for the owner of the one above it.

    Raises FileExistsError if the path is something else.
    """
    if path.is_dir():
        return
    if path.parent != path:
        make_directory(path.parent)
    try:
        path.mkdir(mode)
    except FileExistsError:
        if not path.is_dir():
            raise
    else:
        match_owner(path, path.parent)


def find_existing(path: Path) -> Path:
    """Return the innermost directory or file on the way to `path` that exists."""
    absolute = path.absolute()
    return next(each for each in (absolute, *absolute.parents) if os.path.lexists(each))
