"""Checks for disk space, and the file's name for errors that lack it."""

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from trainmerge.system.temporary_names import finished

FREE_SPACE_MARGIN = 1.05
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Add this file to an error that names none, such as that of a full disk or a full memory."""
    try:
        yield
    except MemoryError as error:
        raise MemoryError(f"{path}: {str(error) or 'no memory is left'}") from error
    except OSError as error:
        if error.errno is None or (error.filename is not None and error.errno not in FULL):
            raise
        raise OSError(error.errno, _with_remedy(error), str(path)) from error


@contextmanager
def naming_inside(new: Path, target: Path) -> Iterator[None]:
    """Name the file in `target` for a full disk, where the error names one in the temporary folder `new`.

    Any other error that names no file gets the folder's name.
    """
    try:
        yield
    except OSError as error:
        if error.errno is None or (error.filename is not None and error.errno not in FULL):
            raise
        named = [Path(str(name)) for name in (error.filename2, error.filename) if name]
        inside = [str(target / name.relative_to(new)) for name in named if name.is_relative_to(new)]
        raise OSError(error.errno, _with_remedy(error), inside[0] if inside else f"{target}/") from error


def _with_remedy(error: OSError) -> str:
    remedy = ": free some space, or write elsewhere"
    words = error.strerror or ""
    return f"{words}{remedy}" if error.errno in FULL and remedy not in words else words


def check_free_space(folder: str | Path, bytes_needed: int) -> None:
    """Raise OSError with both numbers unless `folder`'s filesystem has `bytes_needed` and 5% more free."""
    folder = Path(folder).resolve()
    while not folder.exists():
        folder = folder.parent
    free, needed = shutil.disk_usage(folder).free, int(bytes_needed * FREE_SPACE_MARGIN)
    if free < needed:
        raise OSError(
            f"{finished(folder)}: {needed} bytes are needed, {free} are free. Free some space, or write "
            "elsewhere."
        )
