"""A folder that appears whole or not at all."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from trainmerge.system.access import check_folder_place
from trainmerge.system.atomic import abandoned, sync, sync_all
from trainmerge.system.disk_space import naming_inside
from trainmerge.system.lock import locked
from trainmerge.system.temporary_names import aside


@contextmanager
def staging(target: str | Path, overwrite: bool = False) -> Iterator[Path]:
    """A new folder next to `target`; on success it is renamed to `target`, on any exception it is removed.

    With `overwrite` the old folder stays in place until the new one is complete and on disk. Leftovers of a
    killed process are restored or removed first. One process at a time writes a target.

    Raises:
        FileExistsError: before any work if `target` is a file, or is not empty and `overwrite` is off; or at
            the end, if another process made it meanwhile.
        ValueError: another process is writing `target`, or its parent cannot be written.
    """
    target = Path(target).resolve()
    check_folder_place(target.parent)
    target.parent.mkdir(parents=True, exist_ok=True)
    lock = target.with_name(f".{target.name}.lock")
    with locked(lock, str(target), "a command that writes it"):
        _recover(target)
        refuse_occupied(target, overwrite)
        new, old = aside(target, "new"), aside(target, "old")
        new.mkdir()
        try:
            with naming_inside(new, target):
                yield new
            _publish(new, target, old, overwrite)
        except BaseException:
            if old.exists() and not target.exists():
                old.rename(target)
            raise
        finally:
            for path in (new, old):
                shutil.rmtree(path, ignore_errors=True)


def refuse_occupied(target: Path, overwrite: bool = False) -> None:
    """Refuse a target that `staging` would refuse, for work that comes before it.

    Raises:
        FileExistsError: `target` is a file, or is not empty and `overwrite` is off.
    """
    occupied = target.exists() and (not target.is_dir() or any(target.iterdir()))
    if occupied and (not overwrite or not target.is_dir()):
        raise _occupied(target)


def _publish(new: Path, target: Path, old: Path, overwrite: bool) -> None:
    sync_all(new)
    if overwrite and target.exists():
        target.rename(old)
    try:
        new.rename(target)  # replaces an empty folder, and fails on any other
    except OSError as error:
        if target.exists():
            raise _occupied(target) from error
        raise
    sync(target.parent)


def _occupied(target: Path) -> FileExistsError:
    return FileExistsError(f"{target} is not an empty folder; choose another, or overwrite it (--overwrite)")


def _recover(target: Path) -> None:
    """Remove leftovers of dead processes of this machine next to `target`; restore an old folder."""
    for path in abandoned(target, "old"):
        if target.exists():
            shutil.rmtree(path)
        else:
            path.rename(target)
    for path in abandoned(target, "new"):
        shutil.rmtree(path)
