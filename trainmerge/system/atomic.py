"""Files that are at any moment the old or the new one, also after a power cut.

A file is written under a hidden temporary name in the same folder, forced to disk, and renamed; then the
folder is forced to disk, because a rename is a change of the folder. The temporary name has the host and the
process of its writer, so that the next writer can remove what a killed one left.
"""

import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from trainmerge.system.access import check_folder_place
from trainmerge.system.disk_space import naming
from trainmerge.system.temporary_names import KINDS, aside


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name for a file; on success it is on disk as `path`, on any exception it is removed.

    Temporary files of killed writers of `path` are removed first.

    Raises:
        OSError: with `path` as its name, if the error names no file: a full disk, say.
        ValueError: its folder cannot be made or written.
    """
    check_folder_place(path.parent)
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in abandoned(path, "new"):
        left.unlink(missing_ok=True)
    temporary = aside(path, "new")
    try:
        with naming(path):
            yield temporary
            sync(temporary)
            temporary.replace(path)
            sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def temporary_folder(place: Path, name: str) -> Iterator[Path]:
    """A new hidden folder in `place`, removed at the end; those of killed processes are removed first."""
    check_folder_place(place)
    place.mkdir(parents=True, exist_ok=True)
    for left in abandoned(place / name, "new"):
        shutil.rmtree(left, ignore_errors=True)
    folder = aside(place / name, "new")
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def rename_whole(folder: Path, target: Path) -> None:
    """Rename a finished folder, once everything in it is on disk.

    Raises:
        OSError: `target` is a file, or a folder that is not empty.
    """
    sync_all(folder)
    folder.rename(target)  # replaces an empty folder, and fails on any other
    sync(target.parent)


def sync_all(folder: Path) -> None:
    """Wait until a folder with everything in it is on disk."""
    for path in (*sorted(folder.rglob("*")), folder):
        sync(path)


def write_whole(path: Path, text: str) -> None:
    """Write a text file so that at any moment it is the old or the new one."""
    write_whole_bytes(path, text.encode("utf-8"))


def write_whole_bytes(path: Path, content: bytes) -> None:
    """Write a file so that at any moment it is the old or the new one."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def append_line(path: Path, line: str, durable: bool = False) -> None:
    """Append a line to a text file in one write; `durable` waits until it is on disk.

    A killed process leaves the line, a beginning of it, or nothing.
    """
    with naming(path), path.open("ab", buffering=0) as file:
        file.write(f"{line}\n".encode())
        if durable:
            os.fsync(file.fileno())


def abandoned(target: Path, kind: str) -> list[Path]:
    """Paths named by `aside` whose processes on this machine no longer exist."""
    return [path for path in target.parent.iterdir() if _is_abandoned(path, f".{target.name}.{kind}-")]


def sweep(folder: Path) -> None:
    """Remove the temporary files and new folders in a folder whose writers on this machine no longer exist.

    An old folder may be the only copy of what a writer was replacing: `staging` restores it.
    """
    for path in list(folder.iterdir()) if folder.is_dir() else ():
        marks = [path.name.rfind(f".{kind}-") for kind in KINDS]
        if not path.name.startswith(".") or max(marks) <= 0:
            continue
        prefix = path.name[: path.name.index("-", max(marks)) + 1]
        if path.is_file() and _is_abandoned(path, prefix):
            path.unlink(missing_ok=True)
        elif path.is_dir() and prefix.endswith(".new-") and _is_abandoned(path, prefix):
            shutil.rmtree(path, ignore_errors=True)


def _is_abandoned(path: Path, prefix: str) -> bool:
    """Whether a path has a name of `aside` that begins with `prefix`, and its process ended."""
    own = f"{prefix}{socket.gethostname()}-"
    process = path.name.removeprefix(own).partition("-")[0] if path.name.startswith(own) else ""
    return process.isdigit() and not is_alive(int(process))


def is_alive(process: int) -> bool:
    """Whether a process of this machine exists."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # it exists, and belongs to another user
        return True
    return True


def seen_from(path: str | Path) -> str:
    """The folder of a relative path, for error messages: a run's recipe stores paths as given."""
    if Path(path).is_absolute():
        return ""
    filled = "; ~ and $ are no shortcuts here: write the whole path" if str(path)[:1] in ("~", "$") else ""
    return f" in {Path.cwd()}, to which paths are relative{filled}"


def sync(path: Path) -> None:
    """Wait until a file or folder is on disk.

    Some network file systems cannot force a folder to disk; then its files' own `sync` is all there is.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        if not path.is_dir():
            raise
    finally:
        os.close(descriptor)
