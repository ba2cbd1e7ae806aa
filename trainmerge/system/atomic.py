"""Atomic writes of folders and texts, and checks for disk space."""

import errno
import os
import shutil
import socket
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

FREE_SPACE_MARGIN = 1.05
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def staging(target: str | Path, overwrite: bool = False) -> Iterator[Path]:
    """A new folder next to `target`; on success it is renamed to `target`, on any exception it is removed.

    With `overwrite` the old folder stays in place until the new one is complete and on disk. Leftovers of a
    killed process are restored or removed first.

    Raises FileExistsError before any work if `target` is a file, or is not empty and `overwrite` is off.
    """
    target = Path(target).resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    _recover(target)
    occupied = target.exists() and (not target.is_dir() or any(target.iterdir()))
    if occupied and (not overwrite or not target.is_dir()):
        raise FileExistsError(
            f"{target} is not an empty folder; choose another, or overwrite it (--overwrite)"
        )
    new, old = aside(target, "new"), aside(target, "old")
    new.mkdir()
    try:
        yield new
        for path in [*sorted(new.rglob("*")), new]:
            sync(path)
        if target.exists():
            target.rename(old)
        new.rename(target)
        sync(target.parent)
    except BaseException:
        if old.exists() and not target.exists():
            old.rename(target)
        raise
    finally:
        for path in (new, old):
            shutil.rmtree(path, ignore_errors=True)


def _recover(target: Path) -> None:
    """Remove leftovers of dead processes of this machine next to `target`; restore an old folder."""
    for path in abandoned(target, "old"):
        if target.exists():
            shutil.rmtree(path)
        else:
            path.rename(target)
    for path in abandoned(target, "new"):
        shutil.rmtree(path)


def aside(target: Path, kind: str) -> Path:
    """A hidden name next to `target` that names the owning process."""
    mark = f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
    return target.with_name(f".{target.name}.{kind}-{mark}")


def abandoned(target: Path, kind: str) -> list[Path]:
    """Paths named by `aside` whose processes on this machine no longer exist."""
    prefix = f".{target.name}.{kind}-{socket.gethostname()}-"
    owners = {
        path: path.name.removeprefix(prefix).partition("-")[0]
        for path in target.parent.iterdir()
        if path.name.startswith(prefix)
    }
    return [path for path, process in owners.items() if process.isdigit() and not _alive(int(process))]


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # it exists, and belongs to another user
        return True
    return True


def seen_from(path: str | Path) -> str:
    """The folder of a relative path, for error messages: a run's recipe stores paths as given."""
    return "" if Path(path).is_absolute() else f" in {Path.cwd()}, to which paths are relative"


def sync(path: Path) -> None:
    """Wait until a file or folder is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_whole(path: Path, text: str) -> None:
    """Write a text file through a temporary one, so that at any moment it is the old or the new one."""
    aside = path.with_name(f"{path.name}.tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with naming(path):
            aside.write_text(text, encoding="utf-8")
            aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Add this file to an OSError that names none, such as that of a full disk."""
    try:
        yield
    except OSError as error:
        if error.filename is not None or error.errno is None:
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
