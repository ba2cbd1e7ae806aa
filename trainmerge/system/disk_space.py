"""Checks for disk space, and the file's name for errors that lack it."""

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

FREE_SPACE_MARGIN = 1.05
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Add this file to an OSError that names none, such as that of a full disk."""
    try:
        yield
    except OSError as error:
        if error.errno is None or (error.filename is not None and error.errno not in FULL):
            raise
        remedy = ": free some space, or write elsewhere" if error.errno in FULL else ""
        raise OSError(error.errno, f"{error.strerror}{remedy}", str(path)) from error


def check_free_space(folder: str | Path, bytes_needed: int) -> None:
    """Raise OSError with both numbers unless `folder`'s filesystem has `bytes_needed` and 5% more free."""
    folder = Path(folder).resolve()
    while not folder.exists():
        folder = folder.parent
    free, needed = shutil.disk_usage(folder).free, int(bytes_needed * FREE_SPACE_MARGIN)
    if free < needed:
        raise OSError(
            f"{folder}: {needed} bytes are needed, {free} are free. Free some space, or write elsewhere."
        )
