"""Whether a file or folder can be read, or made: asked before the work that needs it."""

import errno
import os
from pathlib import Path


def check_readable(path: Path) -> Path:
    """The path itself. Raises ValueError if it exists and the permissions forbid to read it."""
    place = _nearest(path)
    if not os.access(place, os.R_OK | os.X_OK if place.is_dir() else os.R_OK):
        words = "no permission to read it: change that, or copy it to a folder of your own"
        raise ValueError(f"{place}: {words}")
    return path


def is_folder(path: Path) -> bool:
    """Whether it is a folder; False, not an error, for a name that is too long for any file."""
    try:
        return path.is_dir()
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
        return False


def check_folder_place(path: str | Path, what: str = "an output folder") -> None:
    """Raise ValueError, with the obstacle, if a folder cannot be made at `path`, or written if it exists."""
    place = _nearest(path)
    if not place.is_dir():
        raise ValueError(f"{place} is not a folder, so {path} cannot be {what}: choose another one")
    if not can_write(place):
        raise ValueError(f"{place}: no permission to write there: choose another folder, or change that")


def can_write(folder: Path) -> bool:
    """Whether files can be made in an existing folder."""
    return os.access(folder, os.W_OK | os.X_OK)


def check_file_place(path: str | Path) -> None:
    """Raise ValueError if a file cannot be written at `path`: it is a folder, or its folder forbids it."""
    place = Path(path).absolute()
    check_folder_place(place.parent)
    if place.is_dir():
        raise ValueError(f"{path} is a folder: name a file to write")


def _nearest(path: str | Path) -> Path:
    """The path itself, or the nearest parent that can be looked at."""
    place = Path(path).absolute()
    while not os.path.lexists(place) and place != place.parent:
        place = place.parent
    return place
