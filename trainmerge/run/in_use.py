"""Use a run folder alone: a fit, a search or a Pareto front; one at a time changes a run."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from trainmerge.run.folder import RunFolder
from trainmerge.system.atomic import sweep
from trainmerge.system.lock import locked


@contextmanager
def in_use(folder: RunFolder, command: str, first: bool = True) -> Iterator[None]:
    """In this context no other process changes the run; killed ones' temporary files are removed first.

    A folder that is made here and stays empty is removed again.

    Args:
        folder: The run; created if it does not exist.
        command: What this process does, for the error of another one.
        first: Whether this is the first process of the command; the others follow it.

    Raises:
        ValueError: another process changes the run, or the folder cannot be made.
    """
    if not first:
        yield
        return
    folder.check_place()
    made = [path for path in (folder.path, *folder.path.parents) if not path.exists()]
    folder.path.mkdir(parents=True, exist_ok=True)
    try:
        with locked(folder.lock, str(folder.path), command) as alone:
            _sweep(folder, alone)
            yield
    finally:
        _remove_empty(made)


def _sweep(folder: RunFolder, alone: bool) -> None:
    """Remove what killed processes left; `alone`: no process of any host writes snapshots."""
    for place in (folder.path, folder.checkpoints, folder.workspace):
        sweep(place)
    if alone and folder.checkpoints.is_dir():
        for path in folder.checkpoints.iterdir():
            if path.suffix == ".saving" or path.name.startswith(".step-"):
                path.unlink(missing_ok=True)


def _remove_empty(folders: list[Path]) -> None:
    try:
        for path in folders:
            path.rmdir()
    except OSError:  # not empty
        return
